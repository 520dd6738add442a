"""code: source files of the standard library of the Python that runs this."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from lamp_compile.errors import InputError
from lamp_compile.quality.tasks._base import Material, Sample, Task, quarters

FILES = ("argparse", "ast", "datetime", "doctest", "inspect", "pathlib", "subprocess", "tarfile", "turtle", "zipfile")
CHARACTERS_A_TOKEN = 12
"""More than any tokenizer puts into a token of code, on average."""


def build(material: Material) -> Iterator[Sample]:
    """Samples of ``context`` tokens, one file after the other.

    Raises:
        InputError: The sources are not installed.
    """
    assert material.encode is not None
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for name in FILES if (path := folder / f"{name}.py").is_file()]
    if not texts:
        raise InputError(
            "this Python comes without the sources of its library", where=str(folder), fix="leave out task code"
        )
    for index in range(material.samples):
        text, lap = texts[index % len(texts)], index // len(texts)
        ids: list[int] = []
        start = lap * CHARACTERS_A_TOKEN * material.context
        while len(ids) < material.context:
            ids += material.encode(text[start : start + CHARACTERS_A_TOKEN * material.context] or text)
            start = 0
        yield Sample(torch.tensor(ids[: material.context]), quarters(0, material.context - 1), {})


TASK = Task("code", "source files of Python's standard library", build, needs_tokenizer=True)
