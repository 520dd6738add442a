"""``scaled_dot_product_attention``, as torch function or ATen operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lamp_compile.ir import AttentionSite
from lamp_compile.passes.patterns._base import Pattern, Refuse
from lamp_compile.passes.patterns._dialect import Call, aten
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.passes.patterns._walk import checked, heads_of, leftovers, training


def read_sdpa(root: Node, call: Call, emit: Emitter) -> AttentionSite:
    """See ``Pattern.read``."""
    if call.get("dropout_p", 0.0) != 0.0:
        raise training()
    causal = call.get("is_causal", False)
    if not isinstance(causal, bool):
        raise Refuse("is_causal is not a constant")
    passed: list[Node] = []
    q, k, v, found = heads_of(call["query"], call["key"], call["value"], passed, emit)
    site = AttentionSite(
        name="", pattern="sdpa", root=root, q=q, k=k, v=v,
        causal="top_left" if causal else "", scale=call.get("scale"), absorbed=(*passed, *leftovers(passed)),
        **_mask(call.get("attn_mask"), emit, with_heads=q is not call["query"]), **found,
    )  # fmt: skip
    return checked(site)


def _mask(node: Any, emit: Emitter, with_heads: bool) -> dict[str, Any]:
    if not isinstance(node, Node):
        return {}
    found = tensor(node)
    if found is None:
        raise Refuse("the attention mask's shape is not known here")
    if found.dim() == 3 and with_heads:
        node = emit.call(aten.unsqueeze.default, node, 1)
    return {"mask" if found.dtype == torch.bool else "bias": node}


PATTERN = Pattern("sdpa", ("sdpa",), read_sdpa)
