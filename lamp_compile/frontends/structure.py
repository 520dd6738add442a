"""A copy of a module's structure around the same weights."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def structural_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers *are* the model's; modules, configurations and hooks are its own."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo)
    copied.__dict__.pop("_compiled_call", None)  # transformers' compiled forward of the model copied from
    return copied
