"""What transformers calls a model's cache: ``cache`` from 5.24 on, ``past_key_values`` before. There the old name still
works, with a warning, in calls and on outputs, until 5.40."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

NEW, OLD = "cache", "past_key_values"


def _of_generate() -> str:
    try:
        installed = importlib.metadata.version("transformers").split(".")
    except importlib.metadata.PackageNotFoundError:
        return NEW
    return NEW if tuple(map(int, installed[:2])) >= (5, 24) else OLD


NAME = _of_generate()
"""Where ``generate`` keeps it."""


def name_for(model: Any) -> str:
    """The argument that a model's forward takes it by. Code of a model's own may have kept the old name."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in (NAME, NEW, OLD) if name in parameters), NAME)


def given(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of that model."""
    return {name_for(model): cache}


def renamed(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments with the cache by that name, whichever of both it came by: a compiled model takes either."""
    other = OLD if name == NEW else NEW
    if other not in kwargs or name in kwargs:
        return kwargs
    return {name if key == other else key: value for key, value in kwargs.items()}


def of(outputs: Any) -> Any:
    """The cache that a model or ``generate`` gives back."""
    return outputs.cache if hasattr(outputs, NEW) else outputs.past_key_values
