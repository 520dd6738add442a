"""Linear layers of a model under a plan: found, chosen without calibration text, and replaced in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import LampError, OptionError, PlanError
from lamp_compile.linear_plan import FORMATS, GROUP, LinearPlan, validate
from lamp_compile.quality.linear_speed import PLAUSIBLE, speedup
from lamp_compile.runtime.linear import Int8Linear

MODES = ("never", "auto", *FORMATS)
LEAST_SPEEDUP = 1.2
"""``auto`` leaves a layer that gains less."""
MOST_ERROR = 0.02
"""``auto`` leaves a layer whose outputs change by more than this share: three times what normal weights give."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNCALIBRATED = "output head, and no text was given to measure it on"


def parse(asked: object) -> str | tuple[LinearPlan, ...]:
    """A mode, or rows.

    Raises:
        OptionError: Neither.
        PlanError: A row is malformed.
    """
    if isinstance(asked, str):
        if asked not in MODES:
            raise OptionError(f"linears is {asked!r}", where="linears", fix=f"one of {', '.join(MODES)}, or rows")
        return asked
    if not isinstance(asked, list | tuple) or not all(isinstance(row, LinearPlan) for row in asked):
        fix = f"one of {', '.join(MODES)}, or a tuple of LinearPlan"
        raise OptionError(f"linears is a {type(asked).__name__}", where="linears", fix=fix)
    validate(asked)
    return tuple(asked)


def find(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by module path, in the order of the model; a layer used twice once."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


def why_not(module: nn.Linear) -> str:
    """Why a layer cannot be replaced; empty if it can."""
    if module.weight.dtype not in DTYPES:
        return f"its weights are {module.weight.dtype}"
    if any(getattr(module, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks")) or "forward" in vars(module):
        return "it has hooks of its own"
    if hasattr(module, "parametrizations"):
        return "its weights are computed (parametrized)"
    return ""


def default_group(module: nn.Linear, format: str) -> int:
    """Inputs that share a scale: ``GROUP`` where it divides the layer's inputs, otherwise all."""
    return 0 if format == "int8_dynamic" or module.in_features % GROUP else GROUP


def choose(model: nn.Module, mode: str, run: Callable[[], Any]) -> tuple[LinearPlan, ...]:
    """Rows for a mode, without text to measure predictions on.

    Args:
        model: The model whose layers are looked at.
        mode: ``never`` gives no rows; a format takes it for all layers; ``auto`` takes ``int8`` where it is measured
            faster at one row, leaves the output head, and layers whose outputs it changes most.
        run: Runs the model once; what its layers receive there is what their errors are measured on.
    """
    if mode == "never":
        return ()
    layers = find(model)
    if mode != "auto":
        return tuple(_asked(name, module, mode) for name, module in layers.items())
    head = _head(model)
    usable = {name: module for name, module in layers.items() if not why_not(module) and module is not head}
    errors = output_errors(usable, run)
    return tuple(
        LinearPlan(name, apply=False, reason=UNCALIBRATED if module is head else why_not(module))
        if name not in usable
        else _measured(name, module, errors.get(name))
        for name, module in layers.items()
    )


def speed_row(name: str, module: nn.Linear) -> LinearPlan:
    """A row that says how fast the layer is in ``int8`` here, and keeps it where that gains too little."""
    group = default_group(module, "int8")
    if module.weight.device.type != "cpu":
        return LinearPlan(name, False, f"on {module.weight.device.type}, where INT8 has no kernel", group=group)
    try:
        gain = round(speedup(module.out_features, module.in_features, group, module.weight.dtype, False), 2)
    except (LampError, RuntimeError) as error:  # Inductor without a C++ compiler, for one
        return LinearPlan(name, False, f"its speed cannot be measured: {str(error).splitlines()[0]}", group=group)
    enough = gain >= LEAST_SPEEDUP
    reason = f"{gain:.1f}x as fast at one row" if enough else f"int8 is {gain:.1f}x as fast at one row"
    if gain < PLAUSIBLE:
        reason += " (do other processes use the cores?)"
    return LinearPlan(name, enough, reason, group=group, speedup=gain)


def output_errors(layers: dict[str, nn.Linear], run: Callable[[], Any]) -> dict[str, float]:
    """Relative error of each layer's outputs under ``int8``, on what it receives when ``run`` runs the model. One
    layer's rounded weights exist at a time."""
    errors: dict[str, float] = {}

    def look(name: str, module: nn.Linear) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            row = LinearPlan(name, group=default_group(module, "int8"))
            wanted = out.float()
            change = Int8Linear(module, row)(args[0]).float() - wanted
            errors[name] = float(change.norm() / wanted.norm().clamp_min(1e-30))

        return module.register_forward_hook(hook)

    handles = [look(name, module) for name, module in layers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return errors


def check(model: nn.Module, rows: Sequence[LinearPlan]) -> None:
    """Raise PlanError unless every row fits a linear layer of the model."""
    layers = find(model)
    for row in rows:
        where = f"plan, linear {row.name!r}"
        if row.name not in layers:
            raise PlanError(f"the model has no linear layer {row.name!r}", where=where, fix="a name `explain` prints")
        module = layers[row.name]
        if row.apply and (reason := why_not(module)):
            raise PlanError(f"this layer cannot be applied: {reason}", where=where, fix="apply: false")
        if row.group and module.in_features % row.group:
            fix = "a divisor, or 0 for one scale a channel"
            raise PlanError(f"group {row.group} does not divide {module.in_features} inputs", where=where, fix=fix)


def apply(model: nn.Module, rows: Sequence[LinearPlan]) -> None:
    """Replace the layers that the rows apply to, in this model; all or, on an error, none.

    Raises:
        PlanError: A row does not fit the model.
    """
    check(model, rows)
    layers = find(model)
    made = {id(layers[row.name]): Int8Linear(layers[row.name], row) for row in rows if row.apply}
    _replace(model, made)


@contextmanager
def applied(model: nn.Module, rows: Sequence[LinearPlan]) -> Iterator[None]:
    """Within the block the model runs with these rows; afterwards it is as it was.

    Raises:
        PlanError: A row does not fit the model.
    """
    before = find(model)
    apply(model, rows)
    originals = [before[row.name] for row in rows if row.apply]
    try:
        yield
    finally:
        now = dict(model.named_modules())
        _replace(model, {id(now[row.name]): old for row, old in zip(_done(rows), originals, strict=True)})


def notes(model: nn.Module | None, mode: str) -> tuple[str, ...]:
    """What a report says of a model's INT8 layers besides its rows."""
    made = [] if model is None else [module for module in model.modules() if isinstance(module, Int8Linear)]
    if not made:
        return ()
    held = sum(module.extra_bytes for module in made) / 1e6
    found = [f"INT8 weights take {held:.1f} MB beside the original ones, which stay and are shared"]
    if mode == "eager":
        found.append("INT8 weights make compiled decode steps faster; in eager mode they are slower than the originals")
    return tuple(found)


def is_head(model: nn.Module, module: nn.Module) -> bool:
    """Whether this is the layer that makes the logits."""
    return module is _head(model)


def _done(rows: Sequence[LinearPlan]) -> list[LinearPlan]:
    return [row for row in rows if row.apply]


def _replace(model: nn.Module, made: dict[int, Any]) -> None:
    """By identity, wherever a module sits: one used twice is replaced in both places."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in made:
                parent._modules[name] = made[id(child)]


def _head(model: nn.Module) -> nn.Module | None:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def _asked(name: str, module: nn.Linear, format: str) -> LinearPlan:
    group = default_group(module, format)
    reason = why_not(module)
    return LinearPlan(name, apply=not reason, reason=reason or "asked for", format=format, group=group)


def _measured(name: str, module: nn.Linear, error: float | None) -> LinearPlan:
    if error is None:
        return LinearPlan(name, False, "the probe did not run it", group=default_group(module, "int8"))
    row = replace(speed_row(name, module), error=float(f"{error:.3g}"))
    if not row.apply:
        return row
    if not error <= MOST_ERROR:
        return replace(row, apply=False, reason=f"its outputs would change by {error:.1%}")
    return replace(row, reason=f"{row.reason}, outputs change by {error:.2%}")
