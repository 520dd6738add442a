"""``export_onnx``: a model with look-ahead mixed precision as one ONNX file, verified before it is put in place."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile import api
from lamp_compile.errors import ExportError, InputError, LampError, ModelError, OptionError
from lamp_compile.frontends.onnx import targets
from lamp_compile.frontends.onnx.targets import Target
from lamp_compile.frontends.onnx.verify import Verification
from lamp_compile.report import Report

PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
SINGLE_FILE = 1_500_000_000
"""Bytes up to which weights lie in the file itself; protobuf ends at 2 GiB."""
ON_CPU = ("portable", "cpu")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The artifact.
        report_path: The Markdown report beside it.
        target: Its target.
        guard: "if" or "select".
        report: Sites, refusals and plan.
        verification: The numbers.
    """

    path: Path
    report_path: Path
    target: str
    guard: str
    report: Report
    verification: Verification


@dataclass(frozen=True)
class Artifact:
    """A model ready to be written, and how to verify what is written."""

    proto: Any
    report: Report
    kind: str
    verify: Any
    """``(session, reduced) -> Verification``."""


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    target: str = "portable",
    guard: str | None = None,
    dynamic_shapes: Any = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    **options: Any,
) -> Export:
    """Write a model whose attention looks ahead, as nodes of domain ``ai.lamp`` (``functions``) that any runtime can
    run, and a report beside it. Nothing is written unless the artifact passes verification.

    A transformers decoder becomes one graph for prompts and for single tokens: ``input_ids``, ``positions`` and the
    cache's planes (``past.0.k_high`` ...) in, ``logits`` and the new planes (``present.0.k_high`` ...) out. Anything
    else packs K and V at every call. Settings (``lamp.0.tau``, ``floor``, ``budget``) are inputs with defaults.

    Args:
        model: A module in eval mode, or a decoder from ``lamp_compile.compile``.
        example_inputs: For a decoder token ids ``[W, L]`` (or a dict with ``input_ids``) to verify on, None takes
            seeded random ones; for anything else a tuple or dict of its inputs, on which it is verified too.
        path: The file, ``*.onnx``; its folder must be there.
        target: "portable", "cpu", "cuda" or "migraphx".
        guard: "if" or "select"; None takes the target's.
        dynamic_shapes: As of ``torch.export.export``, for what is no decoder; None frees the first dimension, and of
            token ids the second.
        max_kl: Fail above this mean KL to the float model (decoders).
        min_agreement: Fail below this next-token agreement with it (decoders).
        **options: As of ``lamp_compile.compile`` (decoders) or ``lamp_compile.rewrite``: ``plan``, ``preset``,
            ``tau``, ...

    Raises:
        OptionError, PlanError: An option or plan is impossible.
        InputError: The path cannot be written, inputs are missing, or a package is.
        ModelError: The model has no attention that ONNX functions can carry, with its reason.
        ExportError: The artifact failed verification, or its target's lint.
    """
    found, chosen = targets.parse(target, guard)
    file = _writable(path)
    _packages()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not a torch.nn.Module", where="model", fix="pass the model itself")
    _check_dtype(model, found)
    artifact = _artifact(model, example_inputs, found, chosen, dynamic_shapes, options)
    if findings := targets.lint(artifact.proto, found):
        raise ExportError(
            f"the graph holds what {found.name} does not run: {'; '.join(findings[:5])}",
            where=f"target {found.name}",
            fix="another target, or another spelling in the model",
        )
    limits = {"max_kl": max_kl, "min_agreement": min_agreement}
    return _write(artifact, file, found, chosen, limits)


def _artifact(
    model: Any, example_inputs: Any, target: Target, guard: str, dynamic_shapes: Any, options: dict[str, Any]
) -> Artifact:
    compiled = getattr(model, "lamp", None)
    if compiled is not None:
        if options:
            raise OptionError(
                f"{next(iter(options))!r} for a compiled model", where="export_onnx", fix="the options of compile(...)"
            )
        if not hasattr(compiled, "spec"):
            raise ModelError(
                "a module that lamp_compile compiled", where=type(model).__name__, fix="export the original module"
            )
        fast = model
    elif _is_decoder(model):
        fast = api.compile(model, mode="eager", **options)
    else:
        from lamp_compile.frontends.onnx import build_module

        return build_module.build(model, example_inputs, target, guard, dynamic_shapes, options)
    if dynamic_shapes is not None:
        raise OptionError("dynamic_shapes for a decoder", where="dynamic_shapes", fix="leave it out: all are dynamic")
    from lamp_compile.frontends.onnx import build_decoder

    return build_decoder.build(fast, example_inputs, target, guard)


def _is_decoder(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from lamp_compile.frontends.huggingface import route

    return not route.why_not(model)


def _write(artifact: Artifact, file: Path, target: Target, guard: str, limits: dict[str, float | None]) -> Export:
    """Into a folder of its own beside the place, verified there, then put in place."""
    import onnx

    from lamp_compile.frontends.onnx import report as reports
    from lamp_compile.frontends.onnx.verify import session

    size = artifact.proto.ByteSize()
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".lamp-") as folder:
        draft = Path(folder) / file.name
        large = size > SINGLE_FILE
        data = f"{file.name}.data" if large else None
        onnx.save_model(
            artifact.proto, str(draft), save_as_external_data=large, location=data, all_tensors_to_one_file=True
        )
        plan = artifact.report.plan
        reduced = any(_reduces(plan.site(name)) for name in artifact.report.rewritten)
        verification: Verification = artifact.verify(session(str(draft)), reduced)
        text = reports.markdown(artifact, file.name, target, guard, verification, size)
        failures = [*verification.failures, *_over(verification, limits)]
        if failures:
            raise ExportError(
                f"the artifact failed verification: {'; '.join(failures)}\n{reports.table(verification)}",
                where=str(file),
                fix="a smaller tau, or floor=1 (both planes everywhere); nothing was written",
            )
        notes = Path(folder) / f"{file.stem}.md"
        notes.write_text(text, encoding="utf-8")
        for made in [*([Path(folder) / data] if data else []), notes, draft]:
            os.replace(made, file.parent / made.name)
    return Export(file, file.with_suffix(".md"), target.name, guard, artifact.report, verification)


def _reduces(row: Any) -> bool:
    floors = row.floor if isinstance(row.floor, tuple) else (row.floor,)
    return min(floors) < 2


def _over(verification: Verification, limits: dict[str, float | None]) -> list[str]:
    scores, found = verification.against_float, []
    for name, limit in limits.items():
        if limit is None:
            continue
        if scores is None:
            raise OptionError(f"{name} for outputs that are no logits", where=name, fix="leave it out")
        value = scores.kl if name == "max_kl" else scores.agreement
        if (value > limit) if name == "max_kl" else (value < limit):
            found.append(f"{name} is {limit:g} and {'KL' if name == 'max_kl' else 'agreement'} is {value:.6g}")
    return found


def _writable(path: str | Path) -> Path:
    file = Path(path)
    if file.suffix != ".onnx":
        raise InputError(f"{file.name!r} does not end in .onnx", where="path", fix="a name such as model.onnx")
    if file.is_dir():
        raise InputError("there is a folder of this name", where=str(file), fix="another name")
    try:
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(
            f"the folder cannot be written: {error.strerror}", where=str(file.parent), fix="a folder that is there"
        ) from None
    return file


def _packages() -> None:
    import importlib.util

    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"the package {name} is not installed", where="export_onnx", fix="pip install 'lamp_compile[onnx-cpu]'"
            )


def _check_dtype(model: nn.Module, target: Target) -> None:
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu":
            raise ModelError(f"{name} is on {tensor.device}", where=type(model).__name__, fix="model.cpu()")
        if tensor.dtype != torch.float32:
            raise ModelError(
                f"{name} is {tensor.dtype}, which ONNX Runtime's CPU provider (used to verify) does not multiply",
                where=f"{type(model).__name__}, target {target.name}",
                fix="model.float()",
            )


def token_ids(given: Any, vocabulary: int, longest: int) -> tuple[Tensor, str]:
    """Windows of token ids ``[W, L]`` to verify on, and what they are.

    Raises:
        InputError: They are no token ids of this vocabulary.
    """
    if given is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (2, min(96, longest)), generator=generator)
        return ids, f"2 windows of {ids.shape[1]} random tokens, seed 0"
    if isinstance(given, dict):
        given = given.get("input_ids")
    if isinstance(given, tuple) and len(given) == 1:
        given = given[0]
    fix = "token ids [windows, tokens] as an integer tensor, at least 8 tokens"
    if not isinstance(given, Tensor) or given.dtype.is_floating_point or given.dim() != 2 or given.shape[1] < 8:
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise InputError(f"example_inputs is {shape}", where="export_onnx", fix=fix)
    if int(given.min()) < 0 or int(given.max()) >= vocabulary:
        raise InputError(f"token {int(given.max())} of {vocabulary}", where="example_inputs", fix=fix)
    return given.long(), f"{given.shape[0]} windows of {given.shape[1]} given tokens"


__all__ = ["Artifact", "Export", "LampError", "export_onnx", "token_ids"]
