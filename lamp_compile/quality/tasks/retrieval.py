"""retrieval: facts planted at all depths of the context, asked for at its end and answered by likelihood.

A fact is a key of random tokens followed by one token, its value. At the end every key is repeated and the model
chooses among the values of all facts: whoever finds the key again finds the value behind it. Nothing in it is language,
so any model that can look back can be asked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.quality.tasks._base import Choices, Material, Sample, Task

FACTS, KEY = 16, 8
SKIPPED, POOL = 50, 4000
"""Keys and values are drawn from the tokens that are frequent in the text, without the most frequent of all."""
DEPTHS = 4


def build(material: Material) -> Iterator[Sample]:
    """Samples of ``context`` tokens, 16 facts each."""
    length = FACTS * (KEY + 1)
    filler = material.context - 2 * length
    if filler < length:
        raise InputError(
            f"a context of {material.context} tokens is too short for {FACTS} facts",
            where="task retrieval",
            fix=f"--context {3 * length} or more",
        )
    frequent = torch.bincount(material.ids).argsort(descending=True)
    pool = frequent[SKIPPED : SKIPPED + POOL] if frequent.numel() > 2 * SKIPPED + FACTS else frequent
    for index in range(material.samples):
        generator = material.generator(index)
        keys = pool[torch.randint(pool.numel(), (FACTS, KEY), generator=generator)]
        values = pool[torch.randperm(pool.numel(), generator=generator)[:FACTS]]
        facts = torch.cat([keys, values[:, None]], dim=1)
        body = [
            piece
            for chunk, fact in zip(material.text(filler, generator).tensor_split(FACTS), facts, strict=True)
            for piece in (chunk, fact)
        ]
        order = torch.randperm(FACTS, generator=generator)
        ids = torch.cat([*body, facts[order].flatten()])
        asked = filler + length + torch.arange(FACTS) * (KEY + 1) + KEY - 1
        yield Sample(ids, {}, _by_depth(asked, values, order))


def _by_depth(asked: Tensor, values: Tensor, order: Tensor) -> dict[str, Choices]:
    """Fact f lies at depth f / FACTS: questions of each quarter of the depth."""
    found = {}
    for quarter in range(DEPTHS):
        which = order * DEPTHS // FACTS == quarter
        label = f"depth {100 * quarter // DEPTHS}-{100 * (quarter + 1) // DEPTHS} %"
        found[label] = Choices(asked[which], values, order[which])
    return found


TASK = Task("retrieval", "facts planted at all depths of the context, chosen among 16 at its end", build)
