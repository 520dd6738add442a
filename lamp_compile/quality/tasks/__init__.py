"""Tasks that are hard for a KV cache of few bits, one per file: what is fed to the model, and where it is looked at."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from lamp_compile import _plugins
from lamp_compile.errors import OptionError
from lamp_compile.quality.tasks._base import Task


@cache
def all_tasks() -> Mapping[str, Task]:
    """Every task in this folder, by name."""
    return _plugins.load(sys.modules[__name__], "TASK", Task)


def get(name: str) -> Task:
    """The task called ``name``.

    Raises:
        OptionError: There is none of that name.
    """
    try:
        return all_tasks()[name]
    except KeyError:
        raise OptionError(f"unknown task {name!r}", where="task", fix=f"one of {', '.join(all_tasks())}") from None
