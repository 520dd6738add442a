"""Every error a user can meet: what happened, where, and what to try."""

from __future__ import annotations


class LampError(Exception):
    """Base of all errors raised on purpose by lamp_compile.

    Args:
        what: One sentence: what went wrong, with the offending value.
        where: The site, file, option or argument it concerns.
        fix: What the reader can do about it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if fix:
            lines.append(f"  try:   {fix}")
        super().__init__("\n".join(lines))


class OptionError(LampError, ValueError):
    """An option has an unknown name or an impossible value."""


class InputError(LampError, ValueError):
    """A tensor or file handed in cannot be used: shape, dtype, device, empty, missing."""


class ModelError(LampError, ValueError):
    """The model cannot be compiled as it is: training mode, no attention, unsupported class."""


class PlanError(LampError, ValueError):
    """A plan is malformed, edited to nonsense, or was made for another graph."""


class CacheError(LampError, RuntimeError):
    """A KV cache is used with another model or batch, or beyond what it can hold."""


class CaptureError(LampError, RuntimeError):
    """A program could not be captured or lowered."""


class ExportError(LampError, RuntimeError):
    """An exported artifact does not do what the model does, or its target could not run it. Nothing was written."""


class LimitError(ExportError):
    """An exported artifact is right, and further from the float model than the user allows. Nothing was written."""


class PassError(LampError, RuntimeError):
    """A pass broke an invariant. This is a bug in lamp_compile, not in the user's program."""


class PluginError(LampError, RuntimeError):
    """A plug-in file (format, pattern, kernel, backend) does not declare what it should."""
