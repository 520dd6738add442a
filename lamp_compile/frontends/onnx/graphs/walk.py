"""Steps that the readers share: looking through casts, transposes and repeated kv heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Dims, Graph, attribute
from lamp_compile.frontends.onnx.graphs.sites import BOOL, FLOATS, OnnxSite
from lamp_compile.passes.patterns._base import Refuse

if TYPE_CHECKING:
    from onnx import NodeProto


_STEPS = 100


def through(graph: Graph, name: str, passed: list[NodeProto]) -> str:
    """Walk back over nodes that change nothing: casts between floats, copies, inactive dropout."""
    for _ in range(_STEPS):
        node = graph.maker(name, "Identity", "Cast", "Dropout")
        if node is None:
            break
        if node.op_type == "Cast" and not {graph.dtype(node.input[0]), graph.dtype(name)} <= FLOATS.keys():
            return name
        if node.op_type == "Dropout" and training(graph, node):
            raise Refuse("attention weights are dropped out: exported in training mode", "export it in eval mode")
        passed.append(node)
        name = node.input[0]
    return name


def training(graph: Graph, node: NodeProto) -> bool:
    """Whether a Dropout may drop anything."""
    if graph.opset < 12 or len(node.input) < 3 or not node.input[2]:
        return False
    return graph.number(node.input[2]) != 0


def swapped(order: list[int]) -> bool:
    """Whether a permutation swaps the last two axes and nothing else."""
    rank = len(order)
    return rank >= 2 and order == [*range(rank - 2), rank - 1, rank - 2]


def transposed(graph: Graph, name: str, emit: Emitter) -> str:
    """The value whose last two axes, swapped, are this one; a new Transpose where there is none to look through."""
    node = graph.maker(name, "Transpose")
    if node is not None:
        order = list(attribute(node, "perm") or reversed(range(graph.rank(name) or 0)))
        if len(order) >= 2:
            order[-1], order[-2] = order[-2], order[-1]
            return emit.transpose(node.input[0], *order)
    found = _transposed_flat(graph, name)
    if found:
        return found
    rank = graph.rank(name)
    if rank is None or rank < 2:
        raise Refuse("the rank of the keys is not known", "export it with shapes")
    return emit.transpose(name, *range(rank - 2), rank - 1, rank - 2)


def _transposed_flat(graph: Graph, name: str) -> str:
    """Reshape to three axes, swap the last two, reshape back: how exporters transpose with a rank that may vary."""
    after = graph.maker(name, "Reshape")
    middle = graph.maker(after.input[0], "Transpose") if after is not None else None
    before = graph.maker(middle.input[0], "Reshape") if middle is not None else None
    if before is None or middle is None or list(attribute(middle, "perm") or []) != [0, 2, 1]:
        return ""
    source = before.input[0]
    dims, flat, end = graph.dims(source), graph.dims(before.output[0]), graph.dims(name)
    if dims is None or flat is None or end is None or len(flat) != 3:
        return ""
    return source if flat[1:] == dims[-2:] and end == [*dims[:-2], dims[-1], dims[-2]] else ""


def true_kv(graph: Graph, name: str) -> str:
    """Keys or values ``[B, G, N, D]`` before they were repeated to all query heads; the same name if not repeated."""
    flat = graph.maker(name, "Reshape")
    wide = graph.maker(flat.input[0], "Expand") if flat is not None else None
    thin = graph.maker(wide.input[0], "Unsqueeze", "Reshape") if wide is not None else None
    if wide is None or thin is None:
        return name
    source = thin.input[0]
    dims = [graph.dims(x) for x in (source, thin.output[0], wide.output[0], name)]
    if any(d is None for d in dims):
        return name
    before, thinned, widened, after = [d for d in dims if d is not None]
    if len(before) != 4 or len(thinned) != 5 or len(widened) != 5 or len(after) != 4:
        return name
    groups, repeats = widened[1], widened[2]
    if not isinstance(groups, int) or not isinstance(repeats, int):
        return name
    rows = [before[0], groups, 1, *before[2:]]
    same = thinned == rows and widened == [before[0], groups, repeats, *before[2:]]
    return source if same and after == [before[0], groups * repeats, *before[2:]] else name


def with_heads(graph: Graph, names: list[str], emit: Emitter) -> list[str]:
    """Four axes each: ``[B, S, D]`` of all three becomes ``[B, 1, S, D]``.

    Raises:
        Refuse: Other ranks, or unknown ones.
    """
    ranks = {graph.rank(name) for name in names}
    if None in ranks:
        raise Refuse("the shapes of q, k or v are not known", "export it with shapes, or run shape inference on it")
    if ranks == {3}:
        return [emit.unsqueeze(name, 1) for name in names]
    if ranks != {4}:
        axes = ", ".join(str(rank) for rank in sorted(r for r in ranks if r is not None))
        raise Refuse(f"it has {axes} axes, not [batch, heads, tokens, channels]", "reshape to four axes")
    return names


def sizes_of(graph: Graph, q: str, k: str, v: str) -> dict[str, Any]:
    """The size fields of a site.

    Raises:
        Refuse: Heads or channels are not numbers, or do not fit each other.
    """
    shapes: list[Dims] = [graph.dims(name) or [] for name in (q, k, v)]
    if any(len(shape) != 4 for shape in shapes):
        raise Refuse("the shapes of q, k or v are not known", "export it with shapes")
    found = {
        "heads": shapes[0][1], "kv_heads": shapes[1][1], "head_dim": shapes[0][3], "value_dim": shapes[2][3],
    }  # fmt: skip
    for name, size in found.items():
        if not isinstance(size, int):
            raise Refuse(f"{name} is dynamic", "export it with fixed heads and channels")
    heads, kv_heads = found["heads"], found["kv_heads"]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    if shapes[1][1] != shapes[2][1]:
        raise Refuse("keys and values have different numbers of heads")
    if shapes[1][3] != shapes[0][3]:
        raise Refuse(f"queries have {shapes[0][3]} channels, keys {shapes[1][3]}")
    if kv_heads < 1 or heads % kv_heads:
        raise Refuse(f"{heads} query heads do not divide into {kv_heads} kv heads")
    if shapes[1][0] == 1 != shapes[0][0] or shapes[2][0] == 1 != shapes[0][0]:
        raise Refuse("keys or values broadcast over the batch", "expand them before attention")
    if any(size == 0 for shape in shapes for size in shape):
        raise Refuse(f"it is empty: {shapes}", "run it on at least one token")
    element = graph.dtype(q)
    if element not in FLOATS or graph.dtype(k) != element or graph.dtype(v) != element:
        kinds = ", ".join(FLOATS.get(graph.dtype(x), f"data type {graph.dtype(x)}") for x in (q, k, v))
        raise Refuse(f"q, k and v are {kinds}", "use one of float16, bfloat16, float32 for all three")
    return {**found, "element": element}


def checked(graph: Graph, site: OnnxSite) -> OnnxSite:
    """The site, once its channels, mask and bias are known to fit.

    Raises:
        Refuse: They do not.
    """
    for what, size in (("head_dim", site.head_dim), ("value dim", site.value_dim)):
        if size % 2:
            raise Refuse(f"{what} {size} is odd: nested8 packs channels in pairs", "an even number of channels")
    for what, name in (("mask", site.mask), ("bias", site.bias)):
        if not name:
            continue
        rank = graph.rank(name)
        if rank is None or rank > 4:
            axes = "an unknown number of" if rank is None else str(rank)
            raise Refuse(f"the {what} has {axes} axes", "at most four, broadcasting to [B, H, S, N]")
        element = graph.dtype(name)
        if (element == BOOL) != (what == "mask") and element:
            raise Refuse(f"the {what} is of data type {element}")
    return site
