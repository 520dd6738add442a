"""Ways to run a rewritten graph, one file each. ``get(name)`` looks one up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from lamp_compile import _plugins
from lamp_compile.backends._base import Backend
from lamp_compile.errors import OptionError


@cache
def all_backends() -> Mapping[str, Backend]:
    """Every backend in this folder, by name."""
    return _plugins.load(sys.modules[__name__], "BACKEND", Backend)


def get(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        OptionError: There is none of that name, or it cannot be used here.
    """
    backend = all_backends().get(name)
    if backend is None:
        raise OptionError(f"unknown backend {name!r}", where="lower", fix=f"one of {', '.join(all_backends())}")
    if reason := backend.why_not():
        raise OptionError(f"backend {name!r} cannot be used here: {reason}", where="lower", fix="lower='eager'")
    return backend
