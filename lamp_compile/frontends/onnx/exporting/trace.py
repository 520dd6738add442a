"""torch's exporters, called the way this package needs them."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata as installed
from typing import Any

import torch

from lamp_compile import __version__
from lamp_compile.errors import LampError, ModelError
from lamp_compile.frontends.onnx.exporting.targets import Target
from lamp_compile.frontends.onnx.exporting.translate import Translation
from lamp_compile.report import Report

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


def program(module: Any, args: tuple[Any, ...], dynamic_shapes: Any) -> Any:
    """The module as an exported program.

    Raises:
        ModelError: torch cannot export it, with its first line.
    """
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
    except LampError:
        raise
    except Exception as error:
        raise ModelError(
            f"torch.export does not take it: {type(error).__name__}: {_first_line(error)}",
            where=type(getattr(module, "model", module)).__name__,
            fix="a release of transformers that this package was tested with; lamp_compile.compile(model) in torch",
        ) from error


def to_onnx(exported: Any, translation: Translation, opset: int, name: str) -> Any:
    """The program as torch's ``ONNXProgram``, not optimised yet.

    Raises:
        ModelError: An operator of the model has no translation.
    """
    try:
        with torch.no_grad(), _quiet():
            return torch.onnx.export(
                exported, opset_version=opset, custom_translation_table=translation.table(), optimize=False,
                verbose=False,
            )  # fmt: skip
    except LampError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise ModelError(
            f"torch.onnx does not take it: {type(cause).__name__}: {_first_line(cause)}",
            where=name,
            fix="another target's opset, or the model without the operator that is named",
        ) from error


def optimize(traced: Any) -> None:
    """Fold constants and merge what is the same."""
    with _quiet():
        traced.optimize()


def metadata(kind: str, report: Report, target: Target, guard: str) -> dict[str, str]:
    """Properties of the model: what it is, its plan and the plan's hash, versions. The same wherever it is made."""
    plan = report.plan.to_json()
    versions = {"lamp_compile": __version__}
    for name in PACKAGES:
        try:
            versions[name] = installed.version(name)
        except installed.PackageNotFoundError:
            continue
    return {
        "lamp.kind": kind,
        "lamp.target": target.name,
        "lamp.guard": guard,
        "lamp.plan": plan,
        "lamp.plan_sha256": hashlib.sha256(plan.encode()).hexdigest(),
        "lamp.versions": json.dumps(versions, sort_keys=True, separators=(",", ":")),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that nobody asked for; errors come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
