"""Storage formats, one per file. ``get(name)`` looks one up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache

from lamp_compile import _plugins
from lamp_compile.errors import OptionError
from lamp_compile.runtime.formats._base import Format


@cache
def all_formats() -> Mapping[str, Format]:
    """Every format in this folder, by name."""
    return _plugins.load(sys.modules[__name__], "FORMAT", Format)


def get(name: str) -> Format:
    """The format called ``name``.

    Raises:
        OptionError: There is none of that name.
    """
    try:
        return all_formats()[name]
    except KeyError:
        raise OptionError(
            f"unknown format {name!r}", where="k_format / v_format", fix=f"one of {', '.join(all_formats())}"
        ) from None
