"""Values of a graph: their makers, types, constants, and shapes in symbols.

Sizes are numbers where they are known and names where they are not; two equal names are the same size. What onnx's
shape inference leaves open (a Reshape to a shape that is computed) is worked out here on demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Size = int | str
Dims = list[Size]
_T = TypeVar("_T")
_DEPTH = 60
SMALL = 4096
"""Elements of a constant worth looking at: scalars and shapes, not weights."""


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value; ``default`` where it is not given."""
    from onnx import helper

    for given in node.attribute:
        if given.name == name:
            return helper.get_attribute_value(given)
    return default


def operand(node: NodeProto, index: int) -> str:
    """The name of an input; "" where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def result(node: NodeProto, index: int) -> str:
    """The name of an output; "" where it is left out."""
    return node.output[index] if index < len(node.output) else ""


class Values:
    """What is known of the values of a model's main graph.

    Args:
        model: A checked model (``reading.load``).
        typed: The same model after shape inference, small external tensors read.
    """

    def __init__(self, model: ModelProto, typed: ModelProto) -> None:
        graph = model.graph
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.inputs = {given.name for given in graph.input}
        self.initializers = {t.name: t for t in typed.graph.initializer if t.name not in self.inputs}
        self.types = {
            given.name: given.type
            for given in (*typed.graph.value_info, *typed.graph.input, *typed.graph.output)
            if given.HasField("type")
        }
        self.makers: dict[str, NodeProto] = {}
        self.memory: dict[tuple[str, str], Any] = {}
        """What was worked out before, by (question, name): a value that many others depend on is looked at once."""

    def maker(self, name: str, *operators: str) -> NodeProto | None:
        """The node that makes a value, if its operator (of the standard's domain) is one of these."""
        node = self.makers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        return node if not operators or node.op_type in operators else None

    def dtype(self, name: str) -> int:
        """``TensorProto.DataType`` of a value, 0 where it is not known."""
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        kind = self.types.get(name)
        if kind is not None:
            return int(kind.tensor_type.elem_type)
        for _ in range(_DEPTH):  # a node made here, of which shape inference knows nothing
            node = self.maker(name)
            if node is None or node.op_type == "Cast":
                return int(attribute(node, "to", 0)) if node is not None else 0
            if node.op_type in _TESTS or not node.input:
                return 9 if node.op_type in _TESTS else 0
            name = node.input[1 if node.op_type == "Where" else 0]
            if name in self.types or name in self.initializers:
                return self.dtype(name)
        return 0

    # Constants

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a small initializer or Constant node in the file; None for anything else."""
        from onnx import numpy_helper

        tensor = self.initializers.get(name)
        if tensor is None:
            node = self.maker(name, "Constant")
            if node is None:
                return None
            for given in node.attribute:
                if given.name in ("value_float", "value_int", "value_floats", "value_ints"):
                    value = attribute(node, given.name)
                    return np.asarray(value, np.float32 if "float" in given.name else np.int64)
                if given.name == "value":
                    tensor = given.t
        if tensor is None or tensor.data_location == 1 or math.prod(tensor.dims) > SMALL or tensor.data_type == 8:
            return None
        return np.asarray(numpy_helper.to_array(tensor))

    def number(self, name: str, depth: int = _DEPTH) -> float | None:
        """The one number that a value is, where that follows from constants and shapes; None otherwise."""
        return self.remember("number", name, depth, self._number)

    def remember(self, question: str, name: str, depth: int, answer: Callable[[str, int], _T | None]) -> _T | None:
        """The answer to a question about a value, worked out once; None where it would take more than ``depth``
        steps back, or depends on itself."""
        key = question, name
        if key not in self.memory:
            self.memory[key] = None
            if depth > 0:
                self.memory[key] = answer(name, depth - 1)
        return self.memory[key]  # type: ignore[no-any-return]

    def _number(self, name: str, depth: int) -> float | None:
        found = self.constant(name)
        if found is not None:
            return float(found.reshape(-1)[0]) if found.size == 1 else None
        node = self.maker(name)
        if node is None:
            return None
        if node.op_type in ("Unsqueeze", "Squeeze", "Reshape", "Expand", "CastLike"):
            return self.number(node.input[0], depth)
        if node.op_type in _FOLDED:
            known = [self.number(x, depth) for x in node.input]
            if None in known:
                return None
            try:
                value = float(_FOLDED[node.op_type](*known))
            except (ValueError, ZeroDivisionError, OverflowError, TypeError):
                return None
            return float(math.trunc(value)) if self.dtype(name) in (6, 7) and math.isfinite(value) else value
        sizes = self.sizes(name, depth)
        return float(sizes[0]) if sizes is not None and len(sizes) == 1 and isinstance(sizes[0], int) else None

    # Shapes

    def dims(self, name: str, depth: int = _DEPTH) -> Dims | None:
        """The shape of a value: numbers, and names for sizes that are not known. None if even the rank is not."""
        return self.remember("dims", name, depth, self._dims)

    def _dims(self, name: str, depth: int) -> Dims | None:
        declared = self._declared(name)
        if declared is None or any(isinstance(size, str) and size.startswith("?") for size in declared):
            computed = self._computed(name, depth)
            return declared if computed is None else _merged(computed, declared)
        return declared

    def rank(self, name: str) -> int | None:
        """The number of axes of a value."""
        dims = self.dims(name)
        return None if dims is None else len(dims)

    def _declared(self, name: str) -> Dims | None:
        if name in self.initializers:
            return list(self.initializers[name].dims)
        kind = self.types.get(name)
        if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
            return None
        return [_size(d, f"?{name}:{axis}") for axis, d in enumerate(kind.tensor_type.shape.dim)]

    def _computed(self, name: str, depth: int) -> Dims | None:
        node = self.maker(name)
        if node is None or not node.input:
            found = self.constant(name)
            return None if found is None else list(found.shape)
        first = self.dims(node.input[0], depth)
        if node.op_type in _SAME_SHAPE:
            return first
        if node.op_type in _BROADCAST:
            shapes = [self.dims(x, depth) for x in node.input]
            return broadcast([s for s in shapes if s is not None]) if None not in shapes else None
        if node.op_type in ("ConstantOfShape", "Range"):
            count = self.number(node.input[1], depth) if node.op_type == "Range" else None
            size = int(count) if count is not None and self.number(node.input[0]) == 0 else f"?{name}:0"
            return self.sizes(node.input[0], depth) if node.op_type == "ConstantOfShape" else [size]
        if first is None:
            return None
        if node.op_type == "Transpose":
            order = attribute(node, "perm") or list(reversed(range(len(first))))
            return [first[axis] for axis in order] if sorted(order) == list(range(len(first))) else None
        if node.op_type == "Slice":
            return self._sliced(node, first, name)
        if node.op_type == "Pad":
            return [f"?{name}:{axis}" for axis in range(len(first))]
        if node.op_type == "Unsqueeze":
            return self._unsqueezed(node, first)
        if node.op_type == "Squeeze":
            gone = {axis % len(first) for axis in self.axes(node) or ()} if first else set()
            return [size for axis, size in enumerate(first) if axis not in gone] if gone else None
        if node.op_type in ("Reshape", "Expand"):
            target = self.sizes(operand(node, 1), depth)
            if target is None:
                return None
            if node.op_type == "Expand":
                return broadcast([first, target])
            return reshaped(first, target, name, bool(attribute(node, "allowzero", 0)))
        second = self.dims(operand(node, 1), depth)
        if node.op_type == "Concat" and len(node.input) == 2 and second is not None and len(first) == len(second):
            axis = attribute(node, "axis", 0)
            sizes = [first[axis], second[axis]] if -len(first) <= axis < len(first) else []
            total = sum(x for x in sizes if isinstance(x, int))
            known = all(isinstance(x, int) for x in sizes)
            return [*first[:axis], total if known else f"?{name}:{axis}", *first[axis:][1:]]
        if node.op_type == "MatMul" and second is not None and min(len(first), len(second)) >= 2:
            batch = broadcast([first[:-2], second[:-2]])
            return None if batch is None else [*batch, first[-2], second[-1]]
        return None

    def _sliced(self, node: NodeProto, first: Dims, name: str) -> Dims:
        """Only a slice of one axis, from a known place to a known place, is worked out."""
        given = [self.constant(x) for x in node.input[1:4]]
        numbers = [int(x.reshape(-1)[0]) for x in given if x is not None and x.size == 1]
        if len(node.input) != 4 or len(numbers) != 3 or not -len(first) <= numbers[2] < len(first):
            return [f"?{name}:{axis}" for axis in range(len(first))]
        begin, end, axis = numbers
        out, size = list(first), first[axis]
        out[axis] = len(range(size)[begin:end]) if isinstance(size, int) else f"?{name}:{axis}"
        return out

    def _unsqueezed(self, node: NodeProto, first: Dims) -> Dims | None:
        axes = self.axes(node)
        if axes is None:
            return None
        rank = len(first) + len(axes)
        if any(not -rank <= axis < rank for axis in axes):
            return None
        rest = iter(first)
        new = {axis % rank for axis in axes}
        return [1 if axis in new else next(rest, 1) for axis in range(rank)]

    def axes(self, node: NodeProto, index: int = 1) -> list[int] | None:
        """Axes of Unsqueeze and its like: an attribute up to opset 12, an input from 13."""
        given = attribute(node, "axes")
        if given is not None:
            return [int(axis) for axis in given]
        found = self.constant(operand(node, index))
        return None if found is None else [int(axis) for axis in found.reshape(-1)]

    def sizes(self, name: str, depth: int = _DEPTH) -> Dims | None:
        """The elements of an integer list that says a shape, as numbers and names; at most 64 of them."""
        found = self.remember("sizes", name, depth, self._sizes)
        return found if found is not None and len(found) <= 64 else None

    def _sizes(self, name: str, depth: int) -> Dims | None:
        found = self.constant(name)
        if found is not None:
            flat = found.reshape(-1)
            return [int(x) for x in flat] if flat.size <= 64 and flat.dtype.kind in "iu" else None
        node = self.maker(name)
        if node is None:
            return None
        if node.op_type == "Shape":
            dims = self.dims(node.input[0], depth)
            if dims is None:
                return None
            return dims[attribute(node, "start", 0) : attribute(node, "end", len(dims))]
        if node.op_type in ("Cast", "Identity", "Unsqueeze", "Squeeze"):
            return self.sizes(node.input[0], depth)
        if node.op_type == "Reshape":
            inner = self.sizes(node.input[0], depth)
            return inner if inner is not None and (self.rank(name) or 1) <= 1 else None
        if node.op_type == "Concat":
            parts = [self.sizes(x, depth) for x in node.input]
            return [size for part in parts if part is not None for size in part] if None not in parts else None
        if node.op_type in ("Slice", "Gather"):
            return self._picked(node, depth)
        if node.op_type in _FOLDED and self.dims(name, depth) in ([], [1]) and self.dtype(name) in (6, 7):
            value = self.number(name, depth)
            return [int(value)] if value is not None and math.isfinite(value) else None
        return None

    def _picked(self, node: NodeProto, depth: int) -> Dims | None:
        inner = self.sizes(node.input[0], depth)
        given = [self.constant(x) for x in node.input[1:]]
        if inner is None or any(x is None for x in given):
            return None
        numbers = [[int(i) for i in x.reshape(-1)] for x in given if x is not None]
        if node.op_type == "Gather":
            inside = all(-len(inner) <= i < len(inner) for i in numbers[0])
            return [inner[i] for i in numbers[0]] if inside else None
        if len(numbers) < 2 or any(len(x) != 1 for x in numbers) or (len(numbers) > 3 and numbers[3] == [0]):
            return None
        start, end = numbers[0][0], numbers[1][0]
        return inner[start : end : numbers[3][0] if len(numbers) > 3 else 1]


def _size(dim: Any, unknown: str) -> Size:
    """One declared size. Some exporters give numbers as names; names that shape inference makes up stand for sizes that
    it could not work out."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    name = str(dim.dim_param)
    if name.isascii() and name.isdigit() and len(name) < 12:
        return int(name)
    return "?" + name if name.startswith("unk__") else name or unknown


def broadcast(shapes: Sequence[Dims]) -> Dims | None:
    """The shape of an elementwise operation; None where sizes contradict each other."""
    rank = max((len(shape) for shape in shapes), default=0)
    out: Dims = []
    for axis in range(rank):
        column = {shape[axis - rank + len(shape)] for shape in shapes if axis - rank + len(shape) >= 0} - {1}
        numbers = {size for size in column if isinstance(size, int)}
        if len(numbers) > 1:
            return None
        named = {size for size in column if isinstance(size, str) and not size.startswith("?")}
        chosen = numbers or named or column
        # Any of several unknown sizes may turn out to be 1, so their result is one more unknown size.
        out.append(chosen.pop() if len(chosen) == 1 else "?" + "|".join(sorted(map(str, chosen))) if chosen else 1)
    return out


def reshaped(before: Dims, target: Dims, name: str, allowzero: bool) -> Dims | None:
    """The shape that Reshape gives; a -1 is solved where everything else cancels."""
    out: Dims = []
    for axis, size in enumerate(target):
        if size == 0 and not allowzero:
            if axis >= len(before):
                return None
            size = before[axis]
        out.append(size)
    if -1 not in out:
        return out
    free = out.index(-1)
    left, right = list(before), [size for size in out if size != -1]
    for size in list(right):
        if size in left and isinstance(size, str):
            left.remove(size)
            right.remove(size)
    if all(isinstance(x, int) for x in right):
        known, product = [x for x in left if isinstance(x, int)], math.prod(x for x in right if isinstance(x, int))
        unknown = [x for x in left if isinstance(x, str)]
        if product and math.prod(known) % product == 0:
            quotient = math.prod(known) // product
            if not unknown:
                out[free] = quotient
                return out
            if len(unknown) == 1 and quotient == 1:
                out[free] = unknown[0]
                return out
    out[free] = f"?{name}:{free}"
    return out


def _merged(computed: Dims, declared: Dims | None) -> Dims:
    if declared is None or len(declared) != len(computed):
        return computed
    vague = [isinstance(b, str) and b.startswith("?") for b in declared]
    return [a if hidden else b for a, b, hidden in zip(computed, declared, vague, strict=True)]


_SAME_SHAPE = ("Cast", "Identity", "Softmax", "IsNaN", "Neg", "Dropout", "Sqrt", "Tanh", "Not")
_TESTS = ("And", "Or", "Not", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "IsNaN", "IsInf")
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Where", "Max", "Min", *_TESTS)
_FOLDED: dict[str, Callable[..., float]] = {
    "Identity": lambda x: x, "Cast": lambda x: x, "Sqrt": math.sqrt, "Neg": lambda x: -x, "Reciprocal": lambda x: 1 / x,
    "Mul": lambda a, b: a * b, "Div": lambda a, b: a / b, "Pow": math.pow, "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b, "Mod": lambda a, b: a % b, "Equal": lambda a, b: a == b, "Not": lambda a: not a,
    "And": lambda a, b: bool(a and b), "Or": lambda a, b: bool(a or b), "Where": lambda c, a, b: a if c else b,
}  # fmt: skip
