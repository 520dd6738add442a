"""The Hugging Face route of ``lamp_compile.compile``: probe, plan, hook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel

from lamp_compile.errors import ModelError
from lamp_compile.frontends import linears
from lamp_compile.frontends.huggingface import attention, networks, planning
from lamp_compile.frontends.huggingface.compiled import Lamp, summary
from lamp_compile.frontends.huggingface.control import Control
from lamp_compile.frontends.huggingface.hooks import attach
from lamp_compile.frontends.huggingface.sites import probe, probe_ids
from lamp_compile.frontends.structure import structural_copy
from lamp_compile.linear_plan import LinearPlan
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.report import Report
from lamp_compile.runtime import cache_argument
from lamp_compile.runtime.controller_thread import StepClock
from lamp_compile.runtime.controls import Controls


class SharedBackend:
    """A torch.compile backend that stays itself when transformers copies the configuration it sits in."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.backend(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBackend:
        return self


def why_not(model: nn.Module) -> str:
    """Why this module does not go the Hugging Face route; empty if it does."""
    if not isinstance(model, PreTrainedModel):
        return "it is not a transformers model"
    if not model.can_generate():
        return "it does not generate"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if not model._can_set_attn_implementation():
        return "its class does not use the attention interface"
    if not model._supports_default_dynamic_cache():
        return "its class brings a cache of its own"
    return ""


def compile_model(
    model: nn.Module, *, plan: Plan | str | Path | None, wanted: Plan, mode: str, inplace: bool, fuel: int | None,
    balance: str,
) -> Any:  # fmt: skip
    """A model whose ``generate`` and forward keep their keys and values in planes.

    Args:
        model: A transformers decoder.
        plan: A plan to obey.
        wanted: Where there is none: a plan with one row, the template of all.
        mode: As of ``lamp_compile.compile``.
        inplace: Change the model itself.
        fuel: Rewrite only the first so many sites.
        balance: As of ``lamp_compile.compile``.

    Raises:
        OptionError: The mode cannot do what the plan asks for.
        ModelError: No attention of this model can.
        PlanError: The plan is for another model.
    """
    copied = structural_copy(model)
    fast, original = (model, copied) if inplace else (copied, model)
    before = fast.config._attn_implementation  # type: ignore[union-attr]
    fast.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    try:
        sites, refusals = probe(fast)
        if len(refusals) == len(sites):
            raise ModelError(
                f"none of its attentions can keep planes: {refusals[0].reason}"
                if sites
                else "the model has no attention",
                where=f"{type(model).__name__}{', ' + refusals[0].site if sites else ''}",
                fix="torch.compile(model, backend='lamp') for its prefill" if sites else "nothing to compile here",
            )
        if plan is None:
            made = planning.make_plan(fast, sites, wanted, balance)
        else:
            made = planning.check_plan(plan if isinstance(plan, Plan) else Plan.load(plan), fast, sites)
        mode = planning.mode_for(made, mode, device_type(fast))
        controls = Controls()
        chosen = planning.applied(made, sites, fuel)
        folder = Path(plan).parent if isinstance(plan, str | Path) else Path()
        gates = networks.gates(made, sites, folder)
        spec = planning.make_spec(fast, made, sites, chosen, controls, gates)
        if made.control is not None:
            Control(made.control, controls, spec, StepClock())  # before anything is changed: raises where it cannot be
    except BaseException:
        fast.set_attn_implementation(before)  # type: ignore[operator]
        raise
    attach(fast, Lamp(made, controls, spec, original, sites, refusals, mode))
    fast.generation_config.cache_implementation = None  # type: ignore[union-attr]
    return fast


def set_network(fast: Any, file: str | Path | None) -> None:
    """Let a look-ahead network predict at the sites that it serves; None leaves the model as its plan has it.

    Args:
        fast: A model of ``compile_model``, before anything of it is compiled.
        file: Of the network.

    Raises:
        PlanError: The file is damaged or for another model.
    """
    if file is None:
        return
    lamp: Lamp = fast.lamp
    plan = networks.with_network(lamp.plan, lamp.sites, file)
    gates = networks.gates(plan, lamp.sites, Path())
    layers = tuple(
        None if layer is None else replace(layer, plan=plan.site(layer.plan.name), network=gates.get(layer.plan.name))
        for layer in lamp.spec.layers
    )
    lamp.plan, lamp.spec = plan, replace(lamp.spec, layers=layers)


def set_linears(fast: Any, asked: str | tuple[LinearPlan, ...]) -> None:
    """Replace linear layers as the plan says, or as asked where no plan was given; the original keeps its own.

    Args:
        fast: A model of ``compile_model``.
        asked: A mode of ``linears.MODES``, or rows that were checked against this model.
    """
    lamp: Lamp = fast.lamp
    if asked == "never":
        rows = lamp.plan.linears
    elif isinstance(asked, str):
        rows = linears.choose(fast, asked, lambda: fast(input_ids=probe_ids(fast)))
    else:
        rows = asked
    linears.apply(fast, rows)
    lamp.plan = replace(lamp.plan, linears=rows)


def survey(model: nn.Module) -> Report:
    """What the probe finds, for a model of which nothing can be compiled.

    Raises:
        ModelError: The probe does not run.
    """
    copied = structural_copy(model)
    copied.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    sites, refusals = probe(copied)
    plan = planning.make_plan(copied, sites, Plan((SitePlan("*"),)), "never")
    return Report(tuple(summary(site) for site in sites), refusals, (), plan, ())


def decode_plan(fast: Any) -> Plan:
    """The plan as the decode graph must obey it: sites without planes stay as they are, and what goes on around a step
    is not in it."""
    rewritten = fast.lamp.report().rewritten
    rows = tuple(
        replace(row, apply=row.name in rewritten, exact_tier="none", guard=replace(row.guard, retry=False))
        for row in fast.lamp.plan.sites
    )
    plan: Plan = fast.lamp.plan
    return replace(plan, sites=rows, linears=(), control=None, shadow=0.0)


def trace_decoding(fast: Any, backend: Any) -> None:
    """One decode step through a backend, so that its report shows the graph."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=fast.device)
    step: Any = torch.compile(fast.forward, backend=backend, fullgraph=True)
    with torch.no_grad():
        cache = cache_argument.of(fast(ids, use_cache=True))
        step(ids[:, :1], **cache_argument.given(fast, cache), use_cache=True)


def compile_decoding(fast: Any, backend: Any) -> None:
    """Let ``generate`` compile the decode step with this backend (prefill stays eager, as transformers has it)."""
    lamp: Lamp = fast.lamp
    lamp.backend = backend
    config = CompileConfig(backend=SharedBackend(backend), mode=lamp.mode, fullgraph=True)
    config._compile_all_devices = True
    lamp.compile_config = config


def device_type(model: nn.Module) -> str:
    """Type of the device of the first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device.type
    return torch.get_default_device().type
