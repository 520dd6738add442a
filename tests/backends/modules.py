"""A small stack of self-attention layers to compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Causal self-attention, 4 query heads of 16 channels over ``kv_heads``."""

    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.q, self.kv, self.out = nn.Linear(64, 64), nn.Linear(64, 32 * kv_heads), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != 4)
        return self.out(y.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """``layers`` layers of it with residual connections, ``[B, S, 64]`` in and out."""

    def __init__(self, layers: int = 2, kv_heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(kv_heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stack(layers: int = 2, kv_heads: int = 4) -> Stack:
    """The stack with fixed random weights, in evaluation mode."""
    torch.manual_seed(0)
    return Stack(layers, kv_heads).eval()


def tokens(count: int, batch: int = 2) -> Tensor:
    """Random input ``[batch, count, 64]``."""
    return torch.randn(batch, count, 64, generator=torch.Generator().manual_seed(count))
