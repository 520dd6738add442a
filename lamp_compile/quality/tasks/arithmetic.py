"""arithmetic: lines of sums, differences and products, where one wrong digit is a wrong answer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lamp_compile.quality.tasks._base import Material, Sample, Task, quarters

LARGEST = 99
TOKENS_A_LINE = 4
"""Fewer than any tokenizer needs for a line."""


def build(material: Material) -> Iterator[Sample]:
    """Samples of ``context`` tokens of calculations."""
    assert material.encode is not None
    for index in range(material.samples):
        generator = material.generator(index)
        lines: list[str] = []
        ids: list[int] = []
        while len(ids) < material.context:
            lines += [_line(generator) for _ in range(1 + material.context // TOKENS_A_LINE)]
            ids = material.encode("\n".join(lines))
        yield Sample(torch.tensor(ids[: material.context]), quarters(0, material.context - 1), {})


def _line(generator: torch.Generator) -> str:
    a, b, kind = (int(n) for n in torch.randint(1, LARGEST + 1, (3,), generator=generator))
    sign, result = (("+", a + b), ("-", a - b), ("*", a * b))[kind % 3]
    return f"{a} {sign} {b} = {result}"


TASK = Task("arithmetic", "lines of sums, differences and products", build, needs_tokenizer=True)
