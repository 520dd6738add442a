"""``scaled_dot_product_attention``, as torch function or ATen operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._base import Pattern, Refuse
from lamp_compile.passes.patterns._dialect import Call, aten
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.passes.patterns._walk import checked, checks, sizes, training, true_kv, with_heads


def read_sdpa(root: Node, call: Call, emit: Emitter) -> AttentionSite:
    """See ``Pattern.read``."""
    if call.get("dropout_p", 0.0) != 0.0:
        raise training()
    causal = call.get("is_causal", False)
    if not isinstance(causal, bool):
        raise Refuse("is_causal is not a constant")
    passed: list[Node] = []
    q = with_heads(call["query"], emit)
    k, v = (with_heads(true_kv(call[name], passed), emit) for name in ("key", "value"))
    values = [tensor(node) for node in (q, k, v)]
    if any(x is None for x in values):
        raise Refuse("shapes are not known here")
    for x in values:
        if x is not None and x.dim() != 4:
            raise Refuse(f"it has {x.dim()} axes, not [batch, heads, tokens, channels]", "reshape it to four axes")
    if values[1].shape[1] != values[2].shape[1]:  # type: ignore[union-attr]
        raise Refuse("keys and values have different numbers of heads")
    site = AttentionSite(
        name="", pattern="sdpa", root=root, q=q, k=k, v=v,
        causal="top_left" if causal else "", scale=call.get("scale"),
        absorbed=(*passed, *checks(passed)), **_mask(call.get("attn_mask"), q, emit),
        **sizes(*values),  # type: ignore[arg-type]
    )  # fmt: skip
    return checked(site)


def _mask(node: Any, q: Node, emit: Emitter) -> dict[str, Any]:
    if not isinstance(node, Node):
        return {}
    found, query = tensor(node), tensor(q)
    if found is None or query is None:
        raise Refuse("the attention mask's shape is not known here")
    if found.dim() == 3 and query.shape[1] == 1:
        # [B, S, N] beside three-axis queries
        node = emit.call(aten.unsqueeze.default, node, 1)
    return {"mask" if found.dtype == torch.bool else "bias": node}


PATTERN = Pattern("sdpa", ("sdpa",), read_sdpa)
