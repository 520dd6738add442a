"""Let a model continue a prompt, and time it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.runtime import cache_argument

WARM_UP_TOKENS = 3


@dataclass(frozen=True)
class _Stop:
    """A stopping criterion of transformers: all sequences have ``length`` tokens."""

    length: int

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= self.length, dtype=torch.bool, device=ids.device)


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation.

    Attributes:
        ids: The new tokens.
        tokens_per_s: New tokens per second of a whole ``generate`` call, prefill included, compilation not.
        warm_up_s: Seconds of the first few tokens, written before that, compilation included.
        kv_bytes: Bytes of the keys and values at the end.
    """

    ids: list[int]
    tokens_per_s: float
    warm_up_s: float
    kv_bytes: int


def write(model: Any, prompt: Tensor, tokens: int) -> Continuation:
    """Continue ``prompt`` ``[1, S]`` greedily with exactly ``tokens`` tokens, timed; a few are written before that.

    Raises:
        InputError: The prompt is empty, or no token is asked for.
    """
    if prompt.dim() != 2 or prompt.numel() == 0 or tokens < 1:
        raise InputError(
            f"prompt {tuple(prompt.shape)}, {tokens} new tokens", where="write", fix="ids [1, S] and at least one token"
        )
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    began = time.perf_counter()
    # The same call, stopped early: its cache has the same size, so what it compiles is what the timed one runs.
    model.generate(prompt, stopping_criteria=[_Stop(prompt.shape[1] + WARM_UP_TOKENS)], **options)
    warm = time.perf_counter()
    done = model.generate(prompt, **options)
    if prompt.device.type == "cuda":
        torch.cuda.synchronize(prompt.device)
    ended = time.perf_counter()
    ids = done.sequences[0, prompt.shape[1] :].tolist()
    return Continuation(ids, len(ids) / (ended - warm), warm - began, kv_bytes(cache_argument.of(done)))


def compare(first: Continuation, second: Continuation) -> int | None:
    """Index of the first token that differs; None where all are the same."""
    pairs = zip(first.ids, second.ids, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), None)


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values that a transformers cache, or ours, holds."""
    own = getattr(cache, "nbytes", None)
    if isinstance(own, int):
        return own
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
