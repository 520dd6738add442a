"""The public functions: ``compile``, ``explain``, ``rewrite``, ``disable``. Options are checked here, at once."""

from __future__ import annotations

import inspect
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamp_compile import control_plan
from lamp_compile import plan as plans
from lamp_compile.driver import rewrite
from lamp_compile.errors import ModelError, OptionError
from lamp_compile.frontends import linears as linear_layers
from lamp_compile.frontends import modules
from lamp_compile.frontends.switch import disable
from lamp_compile.options import check_join
from lamp_compile.plan import Plan
from lamp_compile.report import Report
from lamp_compile.torch_backend import LampBackend, backend

MODES = ("auto", "default", "eager", "reduce-overhead")
__all__ = ["compile", "disable", "explain", "rewrite"]


def compile(
    model: nn.Module,
    *,
    plan: Plan | str | Path | None = None,
    preset: str = "balanced",
    mode: str = "auto",
    inplace: bool = False,
    fuel: int | None = None,
    balance: str = "auto",
    linears: Any = "never",
    **options: Any,
) -> Any:
    """Give back the model with look-ahead mixed precision attention. The argument stays as it is; the weights are
    shared.

    A transformers decoder gets a cache of packed planes: ``fast.generate(...)`` uses it and compiles its decode step.
    Any other module is compiled as a graph on its first call. What was done is ``fast.lamp.report()``.

    Args:
        model: A module in eval mode.
        plan: A plan for this model (or the path of one); None makes one from ``preset`` and ``options``.
        preset: "conservative" (which also keeps a sixteenth of a decoder's layers as they are), "balanced" or
        "aggressive"; ``tau=`` is the one number that overrides it.
        mode: "eager" compiles nothing; "default" and "reduce-overhead" as in torch.compile; "auto" takes
        "reduce-overhead" on CUDA and "default" elsewhere.
        inplace: Change the argument itself instead of a copy of its structure.
        fuel: Rewrite only the first so many sites (to find the one that hurts).
        balance: "auto" balances key channels where the probe finds outliers; "always"; "never".
        linears: Linear layers of a transformers decoder: "never" leaves them; "auto" reads weights in INT8 where it is
        measured faster on this CPU, except the output head; "int8" or "int8_dynamic" takes all; or rows
        (``LinearPlan``), as ``quality.linears.calibrate`` chooses them on a text.
        **options: Fields of every site of the plan (``tau``, ``rule``, ``k_format``, ``guard_budget``, ...), and
        ``join_linears``: whether linear layers that read the same input become one product in compiled graphs, over
        weights that are moved to lie together: "auto" (on CUDA and ROCm devices), "never" or "always". For
        transformers decoders also ``control``, which starts the precision controller (``{"quality": 0.99}`` or other
        fields of ``ControlPlan``), ``shadow``, the share of steps that also run without approximation, to measure
        the true error, and ``lookahead``, the file of a look-ahead network (``lamp-compile train-lookahead``).

    Raises:
        OptionError: An option is unknown or impossible.
        ModelError: The model is in training mode, has no attention, or holds weights that LAMP cannot run with.
        PlanError: The plan was made for another model.
    """
    asked, lookahead = linear_layers.parse(linears), options.pop("lookahead", None)
    joining = check_join(options.pop("join_linears", "auto"))
    if not isinstance(lookahead, str | Path | None):
        raise OptionError(
            f"lookahead is a {type(lookahead).__name__}", where="lookahead", fix="the path of a look-ahead network"
        )
    target, shadow = control_plan.parse(options.pop("control", None)), options.pop("shadow", 0.0)
    choices = {"balance": balance, "linears": asked, "control": target, "shadow": shadow}
    _check_options(plan, preset, mode, inplace, choices, options)
    template = plans.template(preset, **options)
    wanted = Plan((template,), preset=preset, control=target, shadow=shadow).validate()
    _check_model(model)
    route = _huggingface(model)
    if route is not None:
        if mode == "eager" and joining == "always":
            raise OptionError(
                "join_linears 'always' with mode 'eager', which compiles nothing",
                where="join_linears",
                fix="another mode, or join_linears 'auto'",
            )
        if not isinstance(asked, str):
            linear_layers.check(model, asked)
        fast = route.compile_model(
            model, plan=plan, wanted=wanted, mode=mode, inplace=inplace, fuel=fuel, balance=balance
        )
        route.set_network(fast, lookahead)
        route.set_linears(fast, asked)
        if fast.lamp.mode != "eager":
            route.compile_decoding(fast, _decode_backend(route, fast, joining))
        elif joining == "always":
            warnings.warn("join_linears 'always': this plan compiles nothing, so no layers are joined", stacklevel=2)
        if fast.lamp.plan.control is not None:
            fast.lamp.control(fast.lamp.plan.control)
        return fast
    given_for = {"linears": asked != "never", "control": target is not None, "shadow": shadow > 0}
    for name, given in {**given_for, "lookahead": lookahead is not None}.items():
        if given:
            raise OptionError(
                f"{name} is for transformers decoders", where=type(model).__name__, fix=f"leave {name} out"
            )
    options["join_linears"] = joining
    return modules.compile_module(model, _graph_backend(model, plan, preset, mode, fuel, balance, options), inplace)


def explain(model: nn.Module, example_inputs: Any = None, **options: Any) -> Report:
    """What ``compile`` would do to a model: sites found and refused and why, the plan, one site's graph before and
    after.

    Args:
        model: A module in eval mode; it stays as it is.
        example_inputs: A tuple or dict of inputs; needed for what is no transformers decoder.
        **options: As for ``compile``.

    Raises:
        OptionError: No inputs where they are needed, or an unknown option.
        ModelError, PlanError: As for ``compile``.
    """
    known = [name for name in inspect.signature(compile).parameters if name not in ("model", "mode", "inplace")]
    for name in ("mode", "inplace"):
        if name in options:
            raise OptionError(f"{name!r} has no meaning here", where="explain", fix=f"one of {', '.join(known)}")
    joining = check_join(options.pop("join_linears", "auto"))
    _check_model(model)
    route = _huggingface(model)
    if route is not None:
        try:
            fast = compile(model, mode="eager", **options)
        except ModelError:
            report: Report = route.survey(model)
            if report.sites and len(report.refusals) == len(report.sites):
                return report
            raise
        if fast.lamp.controller is not None:
            fast.lamp.controller.stop(restore=True)
        if all(layer is None or layer.plan.exact_tier == "none" for layer in fast.lamp.spec.layers):
            fast.lamp.backend = _decode_backend(route, fast, joining, lower="eager")
            _only_count(fast.lamp.backend)
            route.trace_decoding(fast, fast.lamp.backend)
        return fast.lamp.report()  # type: ignore[no-any-return]
    if not isinstance(example_inputs, tuple | dict) or not example_inputs:
        raise OptionError(
            f"example_inputs is {type(example_inputs).__name__}",
            where="explain",
            fix="a tuple or dict of the model's inputs",
        )
    fast = compile(model, mode="eager", join_linears=joining, **options)
    _only_count(fast.lamp.backend)
    with torch.no_grad():
        fast(**example_inputs) if isinstance(example_inputs, dict) else fast(*example_inputs)
    return fast.lamp.report()  # type: ignore[no-any-return]


def _huggingface(model: nn.Module) -> Any:
    """The Hugging Face route where the model takes it. Whoever holds such a model has imported transformers."""
    if "transformers" not in sys.modules:
        return None
    from lamp_compile.frontends.huggingface import route

    return None if route.why_not(model) else route


def _decode_backend(route: Any, fast: Any, joining: str, **options: Any) -> LampBackend:
    return backend(plan=route.decode_plan(fast), controls=fast.lamp.controls, join_linears=joining, **options)


def _only_count(made: LampBackend) -> None:
    """Let a backend say which linear layers it would join, as a compiled graph would, and move no weights."""
    made.options = replace(made.options, dry=True)


def _graph_backend(
    model: nn.Module, plan: Plan | str | Path | None, preset: str, mode: str, fuel: int | None, balance: str,
    options: dict[str, Any],
) -> LampBackend:  # fmt: skip
    if balance == "always":
        raise OptionError(
            "balance 'always' needs a probe", where=type(model).__name__, fix="balance 'auto', or in a plan"
        )
    if modules.surely_without_attention(model):
        raise ModelError(
            "the model has no attention", where=type(model).__name__, fix="torch.compile(model) without LAMP"
        )
    joining = options.pop("join_linears")
    asked: dict[str, Any] = {"plan": plan} if plan is not None else {"preset": preset, **options}
    asked["join_linears"] = joining
    if fuel is not None:
        asked["fuel"] = fuel
    if mode == "eager":
        return backend(lower="eager", **asked)
    device = next((t.device.type for t in (*model.parameters(), *model.buffers())), "cpu")
    return backend(mode=_mode(mode, device), **asked)


def _mode(mode: str, device: str) -> str:
    return ("reduce-overhead" if device == "cuda" else "default") if mode == "auto" else mode


def _check_options(
    plan: object, preset: str, mode: str, inplace: object, choices: dict[str, Any], options: dict[str, Any]
) -> None:
    if mode not in MODES:
        raise OptionError(f"mode is {mode!r}", where="mode", fix=f"one of {', '.join(MODES)}")
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace is {inplace!r}", where="inplace", fix="True or False")
    if plan is None:
        return
    if not isinstance(plan, Plan | str | Path):
        raise OptionError(
            f"plan is a {type(plan).__name__}", where="plan", fix="a lamp_compile.Plan or the path of one"
        )
    defaults = {"balance": "auto", "linears": "never", "control": None, "shadow": 0.0}
    chosen = [name for name, default in defaults.items() if choices[name] != default]
    extra = [*options, *(["preset"] if preset != "balanced" else []), *chosen]
    if extra:
        raise OptionError(
            f"{extra[0]!r} next to a plan", where="options", fix="change it in the plan, or leave the plan out"
        )


def _check_model(model: object) -> None:
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} is not a torch.nn.Module", where="model", fix="pass the model itself")
    if hasattr(model, "lamp"):
        raise ModelError("the model is compiled already", where=name, fix="compile the original: model.lamp.original")
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "the model went through torch.compile already", where=name, fix="pass the model that was compiled"
        )
    if model.training:
        raise ModelError("the model is in training mode", where=name, fix="model.eval(): LAMP is for inference")
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(f"{key} is on the meta device", where=name, fix="load the weights first")
    weights = [(key, p) for key, p in model.named_parameters() if p.dim() >= 2]
    for key, tensor in weights:
        if not tensor.dtype.is_floating_point or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"{key} is {tensor.dtype}", where=name, fix="float32, bfloat16 or float16 weights")
