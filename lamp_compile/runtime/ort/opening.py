"""Opening a session: which provider, whether the native operators, and that what was asked for is what runs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamp_compile.errors import InputError, OptionError, PassError
from lamp_compile.runtime.ort import _library, providers
from lamp_compile.runtime.ort.artifact import Artifact
from lamp_compile.runtime.ort.providers import Provider

THREADS = "ai.lamp.threads"
"""Entry of the session's configuration that tells the native operators how many threads its pool has."""
NODE = "ai.lamp.FusedAttention"


@dataclass(frozen=True)
class Opened:
    """A session, and how it came about."""

    raw: Any
    provider: Provider
    native: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """The arguments of ``OrtSession``; see there."""

    path: str | os.PathLike[str]
    provider: str = "cpu"
    native: bool | None = None
    threads: int = 0
    strict: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An artifact's file as it was when its session was opened, and its weights beside it where ``export_onnx`` put
    them there: by size and time of modification, because reading gigabytes again would cost more than it tells.

    Attributes:
        path: Absolute.
        stamps: Size in bytes and modification time in nanoseconds of each file; None where there is none.
    """

    path: str
    stamps: tuple[tuple[int, int] | None, ...]

    @classmethod
    def of(cls, path: str) -> Source:
        """What lies there now."""
        return cls(path, tuple(_stamp(name) for name in (path, f"{path}.data")))

    def check(self) -> None:
        """Raise InputError where the file is another by now, or gone."""
        for name, before, now in zip(
            (self.path, f"{self.path}.data"), self.stamps, self.of(self.path).stamps, strict=True
        ):
            if now != before:
                raise InputError(
                    f"{name!r} {'changed' if now else 'is gone'} since this session was opened, and steps with "
                    "graph=True read it again when they are recorded",
                    where="OrtSession.step",
                    fix="open the artifact again",
                )


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # open_session says what is wrong with it
        return None
    return found.st_size, found.st_mtime_ns


def open_session(request: Request, fixed: Mapping[str, int] | None = None) -> Opened:
    """A session; where shapes are ``fixed``, by the names of dimensions, one for a CUDA graph of these.

    Raises:
        InputError: There is no such file, or ONNX Runtime does not load it.
        OptionError: The provider or the native operators cannot be had.
    """
    path, native = request.path, request.native
    file, settings = Path(path), dict(request.settings)
    if not file.is_file():
        raise InputError(f"no file {str(path)!r}", where="lamp_compile.OrtSession", fix="a path to an .onnx file")
    found, count = providers.resolve(request.provider), _threads(request.threads)
    if fixed is not None and found.name == providers.CUDA:
        settings["enable_cuda_graph"] = "1"
    ort = providers.onnxruntime()

    def make(with_operators: bool) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.intra_op_num_threads = count
        for key, value in request.config.items():
            options.add_session_config_entry(key, value)
        for name, size in (fixed or {}).items():
            options.add_free_dimension_override_by_name(name, size)
        if with_operators:
            options.add_session_config_entry(THREADS, str(count))
            options.register_custom_ops_library(str(_library.path()))
        return providers.make_session(str(file), found, options, strict=request.strict, settings=settings)

    notes = [found.note] if found.note else []
    raw, uses, reason = _try(native, found, make, str(path))
    if reason and native is None and found.name == providers.CPU:
        notes.append(f"no native operators: {reason}; {_library.PORTABLE}")
        warnings.warn(notes[-1], UserWarning, stacklevel=4)
    return Opened(raw, found, uses, tuple(notes))


def _try(native: bool | None, found: Provider, make: Callable[[bool], Any], where: str) -> tuple[Any, bool, str]:
    """Session, whether it has the native operators, and why not."""
    reason = _library.why_not() if found.name == providers.CPU else f"they run on CPUs, this is {found.name}"
    try:
        if native is not False and not reason:
            try:
                return make(True), True, ""
            except Exception as error:
                if "ai.lamp" not in str(error):
                    raise
                reason = first_line(error)
        if native:
            fix = f"native=False: {_library.PORTABLE}"
            raise OptionError(f"no native operators: {reason}", where="native=True", fix=fix)
        return make(False), False, reason or ""
    except (OptionError, InputError):
        raise
    except Exception as error:
        raise InputError(f"ONNX Runtime does not load it: {first_line(error)}", where=where) from error


def check_native(opened: Opened, artifact: Artifact, where: str) -> None:
    """Raise PassError unless every attention of a decoder runs natively, or none, as it should be."""
    there = providers.placement(opened.raw).get(providers.CPU, {}).get(NODE, 0)
    wanted = len(artifact.planes) if opened.native else 0
    if artifact.kind == "decoder" and there != wanted:
        raise PassError(f"{there} attentions run natively, {wanted} should", where=where)


def check_graph(opened: Opened, artifact: Artifact, where: str) -> None:
    """Raise OptionError unless steps of this artifact can be captured as CUDA graphs there."""
    if opened.provider.name != providers.CUDA:
        raise OptionError(
            f"graph=True, and {opened.provider.name} captures no graphs", where="graph", fix='provider="cuda"'
        )
    if len({site.tile for site in artifact.planes}) > 1:
        raise OptionError("storage tiles of several sizes", where=where, fix="one tile for all sites, or graph=False")
    if artifact.kind != "decoder" or any("If" in found for found in providers.placement(opened.raw).values()):
        raise OptionError(
            "a CUDA graph has no control flow, and this artifact has", where=where,
            fix='a decoder exported with target="cuda" (guard="select")',
        )  # fmt: skip


def first_line(error: Exception) -> str:
    """What a message says first."""
    return (str(error).splitlines() or [type(error).__name__])[0][:400]


def _threads(wanted: int) -> int:
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted <= 1024:
        raise OptionError(f"threads is {wanted!r}", where="threads", fix="a number from 1 on, or 0 for all cores")
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
