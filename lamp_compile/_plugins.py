"""Folder-listing plug-ins: one file adds one format, pattern, kernel or backend.

A plug-in folder is a package. Every module in it whose name does not start with an underscore declares
one constant (``FORMAT``, ``PATTERN``, ...). There is no registry to fill and no decorator to apply.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TypeVar

from lamp_compile.errors import PluginError

T = TypeVar("T")


def names(folder: str) -> tuple[str, ...]:
    """Names of the plug-ins in a folder of this package (``"runtime/formats"``), read off its listing: nothing is
    imported."""
    path = Path(__file__).parent / folder
    return tuple(sorted(info.name for info in pkgutil.iter_modules([str(path)]) if not info.name.startswith("_")))


def load(package: ModuleType, constant: str, kind: type[T]) -> Mapping[str, T]:
    """Import the modules of ``package`` in sorted order and gather their ``constant`` by its ``name``.

    Raises:
        PluginError: A module lacks the constant, it has the wrong type, or it is not named as its file.
    """
    found: dict[str, T] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda item: item.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        plugin = getattr(module, constant, None)
        if not isinstance(plugin, kind):
            raise PluginError(
                f"{module.__name__} must declare {constant} of type {kind.__name__}, got {type(plugin).__name__}",
                where=str(module.__file__),
                fix=f"add `{constant} = {kind.__name__}(...)` or start the file name with an underscore",
            )
        name = str(plugin.name)  # type: ignore[attr-defined]
        if name != info.name:
            raise PluginError(
                f"plug-in {name!r} lives in {info.name}.py",
                where=str(module.__file__),
                fix=f"name both {name!r} or both {info.name!r}",
            )
        found[name] = plugin
    return MappingProxyType(found)
