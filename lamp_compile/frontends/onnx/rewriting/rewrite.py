"""ONNX in, ONNX out: ``rewrite_onnx``."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lamp_compile import __version__
from lamp_compile.errors import InputError, ModelError, OptionError, PassError
from lamp_compile.frontends.onnx import functions
from lamp_compile.frontends.onnx.files import reading
from lamp_compile.frontends.onnx.files.writing import write
from lamp_compile.frontends.onnx.form import GUARDS
from lamp_compile.frontends.onnx.graphs.graph import Graph
from lamp_compile.frontends.onnx.graphs.values import SMALL
from lamp_compile.frontends.onnx.rewriting.find import Claimed, FoundOnnx, find_sites
from lamp_compile.frontends.onnx.rewriting.replace import replace_sites
from lamp_compile.ir import Found
from lamp_compile.passes.make_plan import choose_sites, make_plan
from lamp_compile.plan import PRESETS, Plan, template
from lamp_compile.report import Report, SiteSummary

if TYPE_CHECKING:
    from onnx import ModelProto

PLAN_KEY, VERSION_KEY = "lamp_compile.plan", "lamp_compile.version"
"""Metadata of the model: the plan as JSON, and who wrote it."""
NO_CACHE = "keys and values are packed anew at every call: prefill and encoders are served, decoding gains nothing"
NO_STATE = "the guard's state is not carried from call to call, so it never raises a floor"


class RewrittenOnnx(NamedTuple):
    """A rewritten model and what was done to it."""

    model: ModelProto
    report: Report


def rewrite_onnx(
    model: ModelProto | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    plan: Plan | str | Path | None = None,
    preset: str = "balanced",
    fuel: int | None = None,
    guard: str = "if",
    domains: Collection[str] = (),
    **options: Any,
) -> RewrittenOnnx:
    """Give every attention of an ONNX model look-ahead mixed precision; the argument stays as it was.

    Operator Attention (opset 23 and later), com.microsoft MultiHeadAttention and GroupQueryAttention, and MatMul -
    Softmax - MatMul become one node ``ai.lamp.UncachedAttention`` each, a model-local function of standard operators,
    so that the result runs on stock ONNX Runtime. Inputs and outputs keep their names; external data stays external.

    Args:
        model: A ``ModelProto``, or the path of a file (read as ``frontends.onnx.reading.load`` does, with its checks).
        path: Where to write the result, and its external data beside it; nothing is written where it is left out.
        plan: A plan for this model (or the path of one); None makes one from ``preset`` and ``options``.
        preset: "conservative", "balanced" or "aggressive".
        fuel: Rewrite only the first so many sites (to find the one that hurts).
        guard: "if" reads residual planes inside an ``If``; "select" has no control flow.
        domains: Operator domains to accept besides the known ones; "*" is any.
        **options: Fields of every site of the plan (``tau``, ``rule``, ``query_bits``, ...).

    Raises:
        InputError: The file is damaged, hostile or cannot be written; see ``reading.load``.
        OptionError, PlanError: An unknown or impossible option, or a plan for another model.
        ModelError: Nothing to rewrite, or it was rewritten already.
    """
    chosen_plan = _plan(plan, preset, options)
    if guard not in GUARDS:
        raise OptionError(f"guard is {guard!r}", where="guard", fix=f"one of {', '.join(GUARDS)}")
    if fuel is not None and (isinstance(fuel, bool) or not isinstance(fuel, int) or fuel < 0):
        raise OptionError(f"fuel is {fuel!r}", where="fuel", fix="how many sites to rewrite: 0, 1, 2, ...")
    copy, folder, where = _read(model, domains)
    graph = Graph(copy, typed(copy, folder))
    found = find_sites(graph)
    _refuse_pointless(found, where)
    made = make_plan(cast(Found, found), preset=preset, plan=chosen_plan, overrides=options)
    names = {site.name for site in choose_sites(cast(Found, found), made, fuel)}
    chosen = [claimed for claimed in found.claimed if claimed.site.name in names]
    before = "\n".join(_line(node) for claimed in chosen[:1] for node in claimed.site.absorbed or claimed.site.replaced)
    notes = replace_sites(graph, chosen, made, guard)
    _stamp(copy, made)
    _verify(copy, chosen)
    report = _report(found, made, chosen, notes, before, copy)
    if path is not None:
        write(copy, Path(path), folder)
    return RewrittenOnnx(copy, report)


def typed(model: ModelProto, folder: reading.Folder | None = None) -> ModelProto:
    """The model with all types and shapes that onnx can infer. Small external tensors are read into it: exporters keep
    shapes and scales outside, too.

    Raises:
        InputError: Its shapes contradict each other.
    """
    from onnx import shape_inference

    small = [t for t in model.graph.initializer if t.data_location == 1 and math.prod(t.dims) <= SMALL]
    if small:
        copy = type(model)()
        copy.CopyFrom(model)
        model, names = copy, {tensor.name for tensor in small}
        for tensor in model.graph.initializer:
            if tensor.name in names and folder is not None:
                reading.internalise(tensor, folder, tensor.name)
    try:
        return shape_inference.infer_shapes(model, data_prop=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise InputError(
            f"shape inference refuses the model: {str(error)[:400]}", where="the model", fix="export it again"
        ) from None


def _plan(plan: Plan | str | Path | None, preset: str, options: dict[str, Any]) -> Plan | None:
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}", where="preset", fix=f"one of {', '.join(PRESETS)}")
    template(preset, **options)
    if plan is None:
        return None
    if options:
        raise OptionError(f"{next(iter(options))!r} beside a plan", where="options", fix="edit the plan's rows instead")
    return plan.validate() if isinstance(plan, Plan) else Plan.load(plan)


def _read(
    model: ModelProto | str | os.PathLike[str], domains: Collection[str]
) -> tuple[ModelProto, reading.Folder | None, str]:
    if isinstance(model, str | os.PathLike):
        return reading.load(model, domains=domains), reading.Folder(Path(model)), str(model)
    reading.check(model, domains=domains)
    copy = type(model)()
    copy.CopyFrom(model)
    return copy, None, "the model"


def _refuse_pointless(found: FoundOnnx, where: str) -> None:
    if found.rewritten:
        what = f"already rewritten: {found.rewritten} nodes are of domain {functions.DOMAIN}"
        raise ModelError(what, where=where, fix="rewrite the original with the plan that you want")
    if not found.sites:
        reasons = [f"{refusal.site}: {refusal.reason}" for refusal in (*found.refusals, *found.unclaimed)]
        what = "nothing to rewrite: " + ("; ".join(reasons[:4]) if reasons else "there is no attention in it")
        fix = next((r.fix for r in (*found.refusals, *found.unclaimed) if r.fix), "export a model with attention")
        raise ModelError(what, where=where, fix=fix)


def _stamp(model: ModelProto, plan: Plan) -> None:
    kept = [entry for entry in model.metadata_props if entry.key not in (PLAN_KEY, VERSION_KEY)]
    values = {entry.key: entry.value for entry in kept}
    values |= {PLAN_KEY: plan.to_json(), VERSION_KEY: __version__}
    del model.metadata_props[:]
    for key, value in values.items():
        model.metadata_props.add(key=key, value=value)


def _verify(model: ModelProto, chosen: list[Claimed]) -> None:
    """What must hold whatever was rewritten: one node a site, and a model that passes every check we have."""
    sites = [
        next((a.s.decode() for a in node.attribute if a.name == "site"), "")
        for node in model.graph.node
        if node.domain == functions.DOMAIN
    ]
    if sorted(sites) != sorted(claimed.site.name for claimed in chosen):
        raise PassError(f"sites {sites} came out", where="rewrite_onnx", fix="please report it with this model")
    try:
        reading.check(model, domains=("*",), folder=None if not _external(model) else _Anywhere())
    except InputError as error:
        raise PassError(f"the result is malformed: {error.what}", where=error.where, fix="please report it") from error


class _Anywhere(reading.Folder):
    """Stands for a folder whose files were checked when the model was read."""

    def __init__(self) -> None:
        pass

    def file(self, location: str, where: str) -> tuple[Path, int]:
        """Any file, large enough."""
        return Path(location), 2**62


def _external(model: ModelProto) -> bool:
    return any(tensor.data_location == 1 for tensor in reading.all_tensors(model))


def _report(
    found: FoundOnnx, plan: Plan, chosen: list[Claimed], notes: list[str], before: str, model: ModelProto
) -> Report:
    shown = [node for node in model.graph.node if node.domain == functions.DOMAIN][:1]
    return Report(
        sites=tuple(_summary(claimed) for claimed in found.claimed),
        refusals=found.refusals,
        unclaimed=found.unclaimed,
        plan=plan,
        rewritten=tuple(claimed.site.name for claimed in chosen),
        backend="ONNX",
        notes=(*((NO_CACHE, NO_STATE) if chosen else ()), *notes),
        before=before,
        after="\n".join(map(_line, shown)),
    )


def _summary(claimed: Claimed) -> SiteSummary:
    site = claimed.site
    features = [name for name in ("mask", "bias") if getattr(site, name)]
    features += [f"softcap {site.softcap:g}"] if site.softcap else []
    sizes = site.heads, site.kv_heads, site.head_dim, site.value_dim
    return SiteSummary(site.name, site.pattern, *sizes, site.dtype, (*features, *site.features))


def _line(node: Any) -> str:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{', '.join(node.output)} = {operator}({', '.join(node.input)})"
