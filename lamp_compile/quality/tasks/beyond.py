"""beyond: a text twice as long as the context that the model, and whatever was calibrated, is made for."""

from __future__ import annotations

from collections.abc import Iterator

from lamp_compile.quality.tasks._base import Material, Sample, Task, quarters

TIMES = 2


def build(material: Material) -> Iterator[Sample]:
    """Samples of twice ``context`` tokens; what lies beyond is looked at by itself."""
    length = TIMES * material.context
    for index in range(material.samples):
        ids = material.text(length, material.generator(index))
        yield Sample(ids, quarters(0, length - 1), {})


TASK = Task("beyond", "texts twice as long as the context", build)
