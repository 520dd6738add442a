"""Attention in many spellings, each with the fields that its site must have. q is [2, 4, 9, 16]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, S, N, D = 2, 4, 9, 9, 16
BOOL = torch.rand(B, 1, S, N, generator=torch.Generator().manual_seed(5)) > 0.3
FLOAT = torch.zeros(B, 1, S, N).masked_fill(~BOOL, torch.finfo(torch.float32).min)
BIAS = torch.randn(1, H, S, N, generator=torch.Generator().manual_seed(6))
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def repeat_kv(x: Tensor) -> Tensor:
    """As the transformers library repeats kv heads."""
    b, g, n, d = x.shape
    return x[:, :, None, :, :].expand(b, g, H // g, n, d).reshape(b, H, n, d)


def softmax_v(scores: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + FLOAT
    joined = torch.cat([scores, SINKS.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1], v)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * 0.25 / 5.0) * 5.0
    return softmax_v(scores + FLOAT, v)


def two_biases(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(3, 2))
    scores += BIAS
    scores = scores + FLOAT
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q / math.sqrt(D)) @ k.mT
    return scores.masked_fill(~BOOL, float("-inf")).softmax(-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.permute(0, 1, 3, 2) / math.sqrt(D)
    scores = torch.where(BOOL, scores, torch.full([], -1e9))
    return torch.softmax(scores, -1) @ v


def batched_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (x.reshape(B * H, -1, D) for x in (q, k, v))
    return (torch.bmm(q3, k3.transpose(1, 2)) * 0.25).softmax(dim=-1).bmm(v3).view(B, H, S, D)


def masked_batched_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (x.reshape(B * H, -1, D) for x in (q, k, v))
    hidden = ~BOOL.expand(B, H, S, N).reshape(B * H, S, N)
    scores = (torch.bmm(q3, k3.transpose(1, 2)) * 0.25).masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1).bmm(v3).view(B, H, S, D)


def added_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (x.reshape(B * H, -1, D) for x in (q, k, v))
    alibi = BIAS.expand(B, H, S, N).reshape(B * H, S, N)
    return torch.baddbmm(alibi, q3, k3.transpose(1, 2), beta=1.0, alpha=0.25).softmax(-1).bmm(v3).view(B, H, S, D)


def no_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys that were never [N, D] in the graph's own nodes."""
    return softmax_v(torch.matmul(q, k.flatten(0, 1).transpose(-1, -2).reshape(B, H, D, N)) * 0.25, v)


@dataclass(frozen=True)
class Spelling:
    """A function of (q, k, v), and what its reader must find."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    pattern: str = "sdpa"
    kv_heads: int = 4
    wanted: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    """Of mask, bias and sinks, those that the site must have."""


def sdpa(**kwargs: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=BOOL)


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def repeated_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax_v(torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 0.25 + FLOAT, repeat_kv(v))


EAGER = "eager_softmax"
SPELLINGS = {
    "sdpa": Spelling(sdpa()),
    "sdpa causal": Spelling(sdpa(is_causal=True), wanted={"causal": "top_left"}),
    "sdpa scale": Spelling(sdpa(scale=0.5), wanted={"scale": 0.5}),
    "sdpa boolean mask": Spelling(sdpa(attn_mask=BOOL), nodes=("mask",)),
    "sdpa float mask": Spelling(sdpa(attn_mask=FLOAT), nodes=("bias",)),
    "sdpa gqa": Spelling(sdpa(enable_gqa=True), kv_heads=2),
    "sdpa repeated kv": Spelling(repeated, kv_heads=2, nodes=("mask",)),
    "sdpa interleaved kv": Spelling(interleaved, kv_heads=2),
    "sdpa one head": Spelling(lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0], BOOL[:, 0]),
                              nodes=("mask",), wanted={"heads": 1, "kv_heads": 1}),
    "eager": Spelling(lambda q, k, v: softmax_v(q.matmul(k.transpose(2, 3)) * 0.25, v), EAGER, wanted={"scale": 0.25}),
    "eager repeated kv": Spelling(repeated_eager, EAGER, 2, {"scale": 0.25}, ("bias",)),
    "soft-cap": Spelling(softcapped, EAGER, wanted={"softcap": 5.0, "scale": 0.25}, nodes=("bias",)),
    "sinks": Spelling(with_sinks, EAGER, wanted={"scale": 0.25}, nodes=("bias", "sinks")),
    "two biases": Spelling(two_biases, EAGER, wanted={"scale": 1.0}, nodes=("bias",)),
    "masked_fill": Spelling(filled, EAGER, wanted={"scale": 1.0}, nodes=("mask",)),
    "where": Spelling(chosen, EAGER, wanted={"scale": 0.25}, nodes=("mask",)),
    "bmm": Spelling(batched_matmul, EAGER, 1, {"heads": 1}),
    "bmm masked_fill": Spelling(masked_batched_matmul, EAGER, 1, {"heads": 1}, ("mask",)),
    "baddbmm": Spelling(added_matmul, EAGER, 1, {"heads": 1, "scale": 0.25}, ("bias",)),
    "no transpose": Spelling(no_transpose, EAGER),
}  # fmt: skip


class Attention(nn.Module):
    """One spelling as a module called ``attn`` of its parent."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.run(q, k, v)


class Model(nn.Module):
    """Something around the attention, so that it has a path."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attn = Attention(run)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attn(q, k, v) + 1.0


def inputs(kv_heads: int, dtype: torch.dtype = torch.float32, dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v."""
    generator = torch.Generator().manual_seed(1)
    heads = (H, kv_heads, kv_heads)
    q, k, v = (torch.randn(B, h, S, dim, generator=generator).to(dtype) for h in heads)
    return q, k, v


def kv_inputs(spelling: Spelling) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a spelling: fewer kv heads only where it repeats them."""
    return inputs(2 if spelling.kv_heads == 2 else 4)
