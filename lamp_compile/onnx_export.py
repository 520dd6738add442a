"""``lamp_compile.export_onnx``: a model with look-ahead mixed precision as one ONNX file, verified before it is put in
place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from lamp_compile import api
from lamp_compile.driver import rewrite
from lamp_compile.errors import ExportError, ModelError, OptionError
from lamp_compile.frontends.onnx.exporting import export, targets
from lamp_compile.frontends.onnx.exporting.export import Artifact, Export
from lamp_compile.frontends.onnx.exporting.targets import Target


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
        LimitError: It is further from the float model than ``max_kl`` or ``min_agreement`` allow.
    """
    found, chosen = targets.parse(target, guard)
    file = export.writable_path(path)
    export.check_packages()
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is not a torch.nn.Module", where="model", fix="pass the model itself")
    export.check_dtype(model, found)
    limits = {"max_kl": max_kl, "min_agreement": min_agreement}
    artifact = _artifact(model, example_inputs, (found, chosen), dynamic_shapes, options, limits)
    if findings := targets.lint(artifact.proto, found):
        raise ExportError(
            f"the graph holds what {found.name} does not run: {'; '.join(findings[:5])}",
            where=f"target {found.name}",
            fix="another target, or another spelling in the model",
        )
    return export.write(artifact, file, found, chosen, limits)


def _artifact(
    model: Any, example_inputs: Any, how: tuple[Target, str], dynamic_shapes: Any, options: dict[str, Any],
    limits: dict[str, float | None],
) -> Artifact:  # fmt: skip
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
        for name, limit in limits.items():
            if limit is not None:
                raise OptionError(f"{name} for what is no decoder", where=name, fix="leave it out")
        return _module(model, example_inputs, how, dynamic_shapes, options)
    if dynamic_shapes is not None:
        raise OptionError("dynamic_shapes for a decoder", where="dynamic_shapes", fix="leave it out: all are dynamic")
    from lamp_compile.frontends.onnx.exporting import build_decoder

    return build_decoder.build(fast, example_inputs, *how)


def _is_decoder(model: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    from lamp_compile.frontends.huggingface import route

    return not route.why_not(model)


def _module(
    model: nn.Module, example_inputs: Any, how: tuple[Target, str], dynamic_shapes: Any, options: dict[str, Any]
) -> Artifact:
    from lamp_compile.frontends.onnx.exporting import build_module, modules

    if model.training:
        raise ModelError("the model is in training mode", where=type(model).__name__, fix="model.eval()")
    args, kwargs = modules.example(example_inputs)
    program = rewrite(modules.capture(model, args, kwargs, dynamic_shapes), **options)
    return build_module.build(model, (args, kwargs), program, *how)
