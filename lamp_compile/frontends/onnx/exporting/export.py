"""What ``export_onnx`` makes, and how it is put in place: checks ahead, verification, report."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import ExportError, InputError, LimitError, ModelError
from lamp_compile.frontends.onnx.exporting.targets import Target
from lamp_compile.frontends.onnx.exporting.verify import Verification
from lamp_compile.plan import SitePlan
from lamp_compile.report import Report

PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
SINGLE_FILE = 1_500_000_000
"""Bytes up to which weights lie in the file itself; protobuf ends at 2 GiB."""


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


def write(artifact: Artifact, file: Path, target: Target, guard: str, limits: dict[str, float | None]) -> Export:
    """Into a folder of its own beside the place, verified there, then put in place."""
    import onnx

    from lamp_compile.frontends.onnx.exporting import report as reports
    from lamp_compile.frontends.onnx.exporting.verify import session

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
        for error, failures in ((ExportError, verification.failures), (LimitError, _over(verification, limits))):
            if failures:
                raise error(
                    f"the artifact failed verification: {'; '.join(failures)}\n{reports.table(verification)}",
                    where=str(file),
                    fix="a smaller tau, or floor=1 (both planes everywhere); nothing was written",
                )
        notes = Path(folder) / f"{file.stem}.md"
        notes.write_text(text, encoding="utf-8")
        for made in [*([Path(folder) / data] if data else []), notes, draft]:
            os.replace(made, file.parent / made.name)
    return Export(file, file.with_suffix(".md"), target.name, guard, artifact.report, verification)


def _reduces(row: SitePlan) -> bool:
    floors = row.floor if isinstance(row.floor, tuple) else (row.floor,)
    return min(floors) < 2


def _over(verification: Verification, limits: dict[str, float | None]) -> list[str]:
    scores, found = verification.against_float, []
    for name, limit in limits.items():
        if limit is None or scores is None:
            continue
        value = scores.kl if name == "max_kl" else scores.agreement
        if (value > limit) if name == "max_kl" else (value < limit):
            found.append(f"{name} is {limit:g} and {'KL' if name == 'max_kl' else 'agreement'} is {value:.6g}")
    return found


def writable_path(path: str | Path) -> Path:
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


def check_packages() -> None:
    import importlib.util

    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"the package {name} is not installed", where="export_onnx", fix="pip install 'lamp_compile[onnx-cpu]'"
            )


def check_dtype(model: nn.Module, target: Target) -> None:
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
