"""dialogue: turns of a text and of the uncompiled model's own words, each on top of all that came before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamp_compile.quality.tasks._base import Material, Sample, Task
from lamp_compile.runtime import cache_argument

TURNS = 8
TEMPERATURE, TOP_P = 0.8, 0.95


def build(material: Material) -> Iterator[Sample]:
    """Samples of eight turns: as many tokens of text as of answer in each; the answers are looked at."""
    model = material.model
    device = next(model.parameters()).device
    half = material.context // (2 * TURNS)
    for index in range(material.samples):
        generator = material.generator(index)
        ids = torch.empty(0, dtype=torch.int64)
        parts = {}
        for turn in range(TURNS):
            ids = torch.cat([ids, material.text(half, generator)])
            began = ids.numel()
            ids = _answer(model, ids.to(device), half, generator)
            parts[f"turn {turn + 1}"] = torch.arange(began - 1, ids.numel() - 1)
        yield Sample(ids, parts, {})


@torch.no_grad()
def _answer(model: torch.nn.Module, ids: torch.Tensor, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """``ids`` with ``tokens`` drawn ones behind them, on the CPU. The draws are the same on every device."""
    step, cache = ids[None], None
    for _ in range(tokens):
        done = model(input_ids=step, **cache_argument.given(model, cache), use_cache=True)
        cache = cache_argument.of(done)
        p, order = (done.logits[0, -1].float().cpu() / TEMPERATURE).softmax(-1).sort(descending=True)
        p = p.masked_fill(p.cumsum(-1) - p > TOP_P, 0.0)
        token = order[torch.multinomial(p, 1, generator=generator)].to(ids.device)
        ids, step = torch.cat([ids, token]), token[None]
    return ids.cpu()


TASK = Task("dialogue", "eight turns of text and answer; the answers are looked at", build)
