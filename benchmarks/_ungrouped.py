"""The same function without grouped queries: every query head gets a copy of its kv head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def ungrouped(model: Any) -> Any:
    """A Llama-like model with as many kv heads as query heads; its outputs are those of ``model``."""
    config = copy.deepcopy(model.config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    config.num_key_value_heads = heads
    weights = dict(model.state_dict())
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, tensor in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            per_head = tensor.reshape(kv_heads, dim, *tensor.shape[1:])
            weights[name] = per_head.repeat_interleave(heads // kv_heads, dim=0).flatten(0, 1)
    made: nn.Module = type(model)(config)
    made = made.to(next(model.parameters()).device, next(model.parameters()).dtype)
    made.load_state_dict(weights)
    made.eval()
    probe = torch.arange(1, 17, device=next(model.parameters()).device)[None]
    with torch.no_grad():
        difference = (made(probe).logits - model(probe).logits).abs().max()
    if difference > 1e-3:
        raise ValueError(f"the model without groups differs by {difference:.2g}")
    return made
