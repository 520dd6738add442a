"""``lamp::linear_int8``: a linear layer over INT8 weights, and the module that holds them.

Weights are rounded to ``q s`` with q in -127 .. 127 and s = max|w| / 127 over each group of inputs of a channel. Sums
are of floats, as in the layer it replaces. With ``dynamic`` each row of activations is rounded too, by a scale of its
own, so that no row depends on another and the products are of integers.

On a CPU the compiler writes the loops for few rows itself (``backends/_few_rows.py``); what runs here serves many rows,
other devices, and eager mode.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lamp_compile.errors import InputError
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.runtime import checks, ops

SCHEMAS = {
    "linear_int8": "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, *, bool dynamic, str site) -> Tensor",
    # A copy. What a compiler fuses into a loop over channels would be computed again for each of them.
    "in_memory": "(Tensor x) -> Tensor",
}
LEVELS = 127
AT_ONCE = 1 << 21
"""Weights turned into floats at a time: 8 MiB in float32."""
INTEGER_ROWS = 32
"""Rows from which on integer products are worth a copy of the weights in oneDNN's layout."""
SMALLEST = 1e-30
"""Scale of a group or row of zeros, so that none is divided by zero."""


def quantize_weight(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """``[N, K]`` -> int8 ``[N, K]`` and float32 scales ``[N, K / group]`` (``[N, 1]`` with group 0).

    A group with a NaN or infinity has that as its scale, since an integer cannot carry it.

    Raises:
        InputError: The weights are no matrix of floats, or ``group`` does not divide K.
    """
    if weight.dim() != 2 or weight.dtype not in checks.DTYPES or not weight.numel():
        raise InputError(
            f"weights {tuple(weight.shape)}, {weight.dtype}", where="quantize_weight", fix="a float matrix [N, K]"
        )
    outputs, inputs = weight.shape
    size = group or inputs
    if inputs % size:
        raise InputError(
            f"groups of {group} do not divide {inputs} inputs", where="quantize_weight", fix="a divisor, or 0 for all"
        )
    rounded = torch.empty(outputs, inputs, dtype=torch.int8, device=weight.device)
    scale = torch.empty(outputs, inputs // size, device=weight.device)
    for rows in _chunks(outputs, inputs):
        part = weight.detach()[rows].float().reshape(-1, inputs // size, size)
        scale[rows] = part.abs().amax(-1) / LEVELS
        steps = (part / scale[rows].clamp_min(SMALLEST)[..., None]).round_().nan_to_num_(0.0)
        rounded[rows] = steps.reshape(-1, inputs).to(torch.int8)
    return rounded, scale


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[M, K]`` -> whole numbers -127 .. 127 as float32 ``[M, K]``, and the scale of each row ``[M, 1]``."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LEVELS
    return (x / scale.clamp_min(SMALLEST)).round(), scale


@cache
def integer_products_exact() -> bool:
    """Whether oneDNN multiplies INT8 matrices here without saturating: some CPUs add pairs of products in 16 bits."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.full((16, 64), LEVELS, dtype=torch.int8)
    weight[1::2] = -LEVELS
    rows = torch.full((2, 64), float(LEVELS))
    try:
        got = _integer_products(rows, weight, torch.ones(16))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.equal(got, rows @ weight.float().T)


def _integer_products(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers ``[M, K]`` times INT8 ``[N, K]``, times the scale of each channel ``[N]``: float32 ``[M, N]``."""
    onednn = torch.ops.onednn
    packed = _packed(weight)
    steps = rows.nan_to_num(0.0).add(128).to(torch.uint8)  # unsigned with zero point 128: the fast path
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    out: Tensor = onednn.qlinear_pointwise(
        steps, 1.0, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


_layouts: Any = WeakTensorKeyDictionary()
"""INT8 weights -> (their version, the same in oneDNN's layout), for as long as the weights live."""


def _packed(weight: Tensor) -> Any:
    """The weights in oneDNN's layout, which takes longer to make than a product: kept beside them, made anew when they
    change. It is no plain tensor, so that no graph can carry it."""
    version = -1 if weight.is_inference() else weight._version
    kept = _layouts.get(weight)
    if kept is None or kept[0] != version:
        kept = _layouts[weight] = (version, torch.ops.onednn.qlinear_prepack(weight, None))
    return kept[1]


def _linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, dynamic: bool, site: str) -> Tensor:
    _check(x, weight, scale, bias, dynamic, site)
    outputs, inputs = weight.shape
    rows = x.reshape(math.prod(x.shape[:-1]), inputs)
    if not dynamic:
        out = _over_float_weights(rows, weight, scale, bias)
    else:
        steps, row_scale = round_rows(rows)
        if rows.device.type == "cpu" and rows.shape[0] >= INTEGER_ROWS and integer_products_exact():
            out = _integer_products(steps, weight, scale[:, 0])
        else:
            out = _over_float_weights(steps, weight, scale, None)
        out = out * row_scale
        out = (out if bias is None else out + bias).to(x.dtype)
    return out.reshape(*x.shape[:-1], outputs)


def _over_float_weights(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The layer over weights turned into floats of the rows' dtype, some channels at a time."""
    outputs, inputs = weight.shape
    out = rows.new_empty(rows.shape[0], outputs)
    for part in _chunks(outputs, inputs):
        groups = scale.shape[1]
        floats = weight[part].reshape(-1, groups, inputs // groups) * scale[part].float()[..., None]
        added = None if bias is None else bias[part].to(rows.dtype)
        out[:, part] = F.linear(rows, floats.reshape(-1, inputs).to(rows.dtype), added)
    return out


def _chunks(outputs: int, inputs: int) -> list[slice]:
    step = max(1, AT_ONCE // inputs)
    return [slice(first, min(first + step, outputs)) for first in range(0, outputs, step)]


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool, site: str) -> None:
    where = f"lamp::linear_int8{f', {site}' if site else ''}"
    if weight.dim() != 2 or weight.dtype != torch.int8:
        raise InputError(f"weight is {weight.dtype} {tuple(weight.shape)}", where=where, fix="int8 [N, K]")
    outputs, inputs = weight.shape
    if x.dtype not in checks.DTYPES or not x.dim() or x.shape[-1] != inputs:
        raise InputError(f"x is {x.dtype} {tuple(x.shape)}", where=where, fix=f"floats [..., {inputs}]")
    groups = scale.shape[-1] if scale.dim() == 2 else 0
    if scale.dim() != 2 or scale.shape[0] != outputs or not groups or inputs % groups or (dynamic and groups > 1):
        fix = f"[{outputs}, groups], groups a divisor of {inputs}; with dynamic [{outputs}, 1]"
        raise InputError(f"scale is {tuple(scale.shape)}", where=where, fix=fix)
    if bias is not None and bias.shape != (outputs,):
        raise InputError(f"bias is {tuple(bias.shape)}", where=where, fix=f"[{outputs}]")
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device}, x on {x.device}", where=where, fix="one device for all")


def _fake(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _in_memory(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


_IMPLEMENTATIONS: dict[str, tuple[Any, Any]] = {
    "linear_int8": (_linear_int8, _fake),
    "in_memory": (_in_memory, lambda x: x.new_empty(x.shape)),
}
for _name, _schema in SCHEMAS.items():
    _run, _shapes = _IMPLEMENTATIONS[_name]
    ops.LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamp::{_name}", _shapes, lib=ops.LIBRARY)
    torch.library.register_autograd(f"lamp::{_name}", ops.no_backward, lib=ops.LIBRARY)


class Int8Linear(nn.Linear):
    """A linear layer that reads INT8 weights. The original's parameters stay in place, shared and unread, so that what
    looks at them (tied weights, ``state_dict``, ``save_pretrained``) finds the model as it was. Weights that change are
    rounded anew: by ``load_state_dict`` of this module at once, otherwise at its next call outside a graph.

    Args:
        original: The layer; its parameters become this one's.
        row: The layer's row of the plan.

    Raises:
        InputError: The row's group does not divide the layer's inputs.
    """

    weight_int8: Tensor
    """int8 ``[N, K]``."""
    weight_scale: Tensor
    """float32 ``[N, groups]``."""

    def __init__(self, original: nn.Linear, row: LinearPlan) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = original.weight, original.bias
        self.train(original.training)
        self.row = row
        rounded, scale = quantize_weight(original.weight, row.group)
        self.register_buffer("weight_int8", rounded, persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        self._rounded = self._state()

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside the original's weights."""
        return self.weight_int8.nbytes + self.weight_scale.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]`` in the dtype of ``x``."""
        if not torch.compiler.is_compiling():
            self.refresh()
        out: Tensor = torch.ops.lamp.linear_int8(
            x, self.weight_int8, self.weight_scale, self.bias,
            dynamic=self.row.format == "int8_dynamic", site=self.row.name,
        )  # fmt: skip
        return out

    def refresh(self) -> None:
        """Round the weights anew, in place, if others were written or given since. What is written through ``.data`` is
        not seen."""
        if self._rounded == (now := self._state()):
            return
        rounded, scale = quantize_weight(self.weight, self.row.group)
        with torch.no_grad():
            self.weight_int8.copy_(rounded)
            self.weight_scale.copy_(scale)
        self._rounded = now

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), -1 if self.weight.is_inference() else self.weight._version

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh()

    def extra_repr(self) -> str:
        """As nn.Linear's, with the format."""
        return f"{super().extra_repr()}, format={self.row.format}, group={self.row.group}"
