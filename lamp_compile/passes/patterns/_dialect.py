"""One table of equivalent operators: one reader serves Dynamo's torch-level graphs and torch.export's ATen graphs.

``read(node)`` gives a node's canonical operator and its arguments by name, whatever the spelling: a torch function, a
tensor method, a Python operator, an ``aten`` overload, or a leaf module.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from lamp_compile.runtime import ops  # noqa: F401  (registers torch.ops.lamp)
from lamp_compile.runtime.network import ops as _network_ops  # noqa: F401  (attention.predicted)

aten = torch.ops.aten
_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MHA = (
    "query", "key", "value", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights",
    "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip
_ENCODER_LAYER = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first",
    "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1", "ffn_weight_2",
    "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip
_NATIVE_MHA = (
    "query", "key", "value", "embed_dim", "num_head", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "mask",
    "need_weights", "average_attn_weights", "mask_type",
)  # fmt: skip
_TWO = ("input", "other")

# operator, parameter names (a leading * gathers the rest), targets
_ROWS: tuple[tuple[str, tuple[str, ...], tuple[Any, ...]], ...] = (
    ("sdpa", _SDPA, (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default)),
    ("softmax", ("input", "dim", "_stacklevel", "dtype"), (F.softmax,)),
    ("softmax", ("input", "dim", "dtype"), (torch.softmax, torch.special.softmax, "softmax", aten.softmax.int)),
    ("softmax", ("input", "dim", "half_to_float"), (aten._softmax.default,)),
    ("safe_softmax", ("input", "dim", "dtype"), (aten._safe_softmax.default,)),
    ("multihead", _MHA, (F.multi_head_attention_forward,)),
    ("native_multihead", _NATIVE_MHA, (torch._native_multi_head_attention, aten._native_multi_head_attention.default)),
    (
        "encoder_layer",
        _ENCODER_LAYER,
        (torch._transformer_encoder_layer_fwd, aten._transformer_encoder_layer_fwd.default),
    ),
    ("flex_attention", (), (torch.ops.higher_order.flex_attention,)),
    ("cached", (), (torch.ops.lamp.attention.cached, torch.ops.lamp.attention.predicted)),
    ("matmul", _TWO, (torch.matmul, operator.matmul, "matmul", aten.matmul.default)),
    ("matmul", ("input", "mat2"), (torch.bmm, "bmm", aten.bmm.default)),
    ("baddbmm", ("input", "batch1", "batch2", "beta", "alpha"), (torch.baddbmm, "baddbmm", aten.baddbmm.default)),
    (
        "add",
        (*_TWO, "alpha"),
        (torch.add, operator.add, operator.iadd, "add", "add_", aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar),
    ),
    (
        "sub",
        (*_TWO, "alpha"),
        (torch.sub, operator.sub, operator.isub, "sub", "sub_", aten.sub.Tensor, aten.sub_.Tensor),
    ),
    (
        "mul",
        _TWO,
        (
            torch.mul, operator.mul, operator.imul, "mul", "mul_", aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor,
            aten.mul_.Scalar,
        ),
    ),
    (
        "div",
        (*_TWO, "rounding_mode"),
        (
            torch.div, torch.true_divide, operator.truediv, operator.itruediv, "div", "div_", aten.div.Tensor,
            aten.div.Scalar, aten.div_.Tensor,
        ),
    ),
    ("tanh", ("input",), (torch.tanh, "tanh", aten.tanh.default, F.tanh)),
    ("max", ("input", "dim", "keepdim"), (torch.max, "max", aten.max.dim)),
    ("amax", ("input", "dim", "keepdim"), (torch.amax, "amax", aten.amax.default)),
    ("cat", ("tensors", "dim"), (torch.cat, torch.concat, aten.cat.default)),
    (
        "masked_fill",
        ("input", "mask", "value"),
        (torch.masked_fill, "masked_fill", "masked_fill_", aten.masked_fill.Scalar, aten.masked_fill.Tensor,
         aten.masked_fill_.Scalar, aten.masked_fill_.Tensor),
    ),
    ("where", ("condition", "input", "other"), (torch.where, aten.where.self, aten.where.ScalarOther)),
    ("full", ("size", "fill_value"), (torch.full, aten.full.default)),
    ("tensor", ("data",), (torch.tensor, aten.scalar_tensor.default)),
    ("dropout", ("input", "p", "training", "inplace"), (F.dropout,)),
    ("dropout", ("input", "p", "training"), (torch.dropout, aten.dropout.default)),
    (
        "cast",
        ("input", "dtype"),
        ("to", "type", "type_as", aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, aten._to_copy.default),
    ),
    ("cast", ("input",), ("float", "half", "bfloat16", "double")),
    (
        "same",
        ("input",),
        ("contiguous", "clone", "detach", torch.clone, torch.detach, aten.contiguous.default, aten.clone.default,
         aten.detach.default, aten.alias.default, aten.detach_.default),
    ),
    ("transpose", ("input", "dim0", "dim1"), (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes",
                                             "swapdims", aten.transpose.int)),
    ("permute", ("input", "*dims"), (torch.permute, "permute", aten.permute.default)),
    ("unsqueeze", ("input", "dim"), (torch.unsqueeze, "unsqueeze", aten.unsqueeze.default)),
    ("expand", ("input", "*size"), ("expand", aten.expand.default)),
    (
        "reshape",
        ("input", "*shape"),
        (torch.reshape, "reshape", "view", aten.reshape.default, aten.view.default, aten._unsafe_view.default),
    ),
    ("flatten", ("input", "start_dim", "end_dim"), (torch.flatten, "flatten", aten.flatten.using_ints)),
    (
        "repeat_interleave",
        ("input", "repeats", "dim"),
        (torch.repeat_interleave, "repeat_interleave", aten.repeat_interleave.self_int),
    ),
    ("getitem", ("input", "index"), (operator.getitem,)),
    ("slice", ("input", "dim", "start", "end", "step"), (aten.slice.Tensor,)),
    ("check", ("input",), (aten._assert_tensor_metadata.default,)),
)  # fmt: skip
_LOWERED = (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip

_TABLE = {target: (op, parameters) for op, parameters, targets in _ROWS for target in targets}
_TABLE.update({getattr(aten, name).default: ("lowered_sdpa", ()) for name in _LOWERED if hasattr(aten, name)})
_ALIASES = {"self": "input", "mat2": "other", "tensor": "input", "axis": "dim"}
_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Softmax, "softmax"),
    (nn.Dropout, "dropout"),
    (nn.MultiheadAttention, "leaf_module"),
    (nn.TransformerEncoderLayer, "leaf_module"),
    (nn.TransformerDecoderLayer, "leaf_module"),
)


@dataclass(frozen=True)
class Call:
    """A node in canonical form: its operator and its arguments by name."""

    op: str
    args: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or ``default`` where the call leaves it out."""
        return self.args.get(name, default)


def read(node: Any) -> Call | None:
    """The canonical form of a node; None when the table does not know its target (or it is no node)."""
    if not isinstance(node, Node):
        return None
    if node.op == "call_module":
        return _read_module(node)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is getattr and len(node.args) > 1 and isinstance(node.args[1], str):
        return Call(f"attribute_{node.args[1]}", {"input": node.args[0]})
    row = _TABLE.get(node.target)
    if row is None:
        return None
    op, parameters = row
    args: dict[str, Any] = {}
    values = list(node.args)
    for name in parameters:
        if name.startswith("*"):
            rest = values[0] if len(values) == 1 and isinstance(values[0], list | tuple) else values
            if values:
                args[name[1:]] = tuple(rest)
            break
        if not values:
            break
        args[_ALIASES.get(name, name)] = values.pop(0)
    args.update({_ALIASES.get(name, name): value for name, value in node.kwargs.items()})
    return Call(op, args)


def _read_module(node: Node) -> Call | None:
    owner = node.graph.owning_module
    if owner is None:
        return None
    module = owner.get_submodule(str(node.target))
    for kind, op in _MODULES:
        if isinstance(module, kind):
            args: dict[str, Any] = {"input": node.args[0] if node.args else None, "class": kind.__name__}
            if isinstance(module, nn.Softmax):
                args["dim"] = module.dim
            if isinstance(module, nn.Dropout):
                args.update(p=module.p, training=module.training)
            return Call(op, args)
    return None


def schema_of(node: Node) -> torch.FunctionSchema:
    """The schema of an operator's node."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema


def settings_of(schema: torch.FunctionSchema) -> list[str]:
    """The arguments of an operator that are no tensors."""
    return [argument.name for argument in schema.arguments if "Tensor" not in str(argument.type)]


def bind(node: Node) -> dict[str, Any]:
    """All arguments of a ``lamp::`` node by name, defaults filled in."""
    arguments = schema_of(node).arguments
    bound = {argument.name: argument.default_value for argument in arguments}
    bound.update(zip((a.name for a in arguments if not a.kwarg_only), node.args, strict=False))
    bound.update(node.kwargs)
    return bound
