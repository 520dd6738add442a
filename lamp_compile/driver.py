"""The main path: capture, find sites, make a plan, rewrite and verify, join linear layers, lower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from lamp_compile import backends
from lamp_compile.options import Options
from lamp_compile.passes.capture import Program, capture
from lamp_compile.passes.find_sites import find_sites
from lamp_compile.passes.fuse import fuse
from lamp_compile.passes.hot_tensors import HotTensors, Wires
from lamp_compile.passes.insert_guard import insert_guard
from lamp_compile.passes.insert_lookahead import insert_lookahead
from lamp_compile.passes.insert_selector import insert_selector
from lamp_compile.passes.join_linears import Joined, join_linears
from lamp_compile.passes.make_plan import choose_sites, make_plan
from lamp_compile.passes.meet import meet
from lamp_compile.passes.state_host import Host, host_for
from lamp_compile.passes.summarize import summarize, text_before
from lamp_compile.passes.verify import Expected, verify
from lamp_compile.report import Report

Rewritable = TypeVar("Rewritable", ExportedProgram, GraphModule)


def run_passes(program: Program, options: Options, hot: HotTensors) -> tuple[Host, Report]:
    """Rewrite a captured program in place: every claimed site becomes the five ``lamp::`` nodes its plan describes."""
    found = find_sites(program)
    plan = make_plan(found, preset=options.preset, plan=options.plan, overrides=options.overrides)
    sites = choose_sites(found, plan, options.fuel)
    before, expected = text_before(program, sites), [Expected.of(site) for site in sites]
    host = host_for(program)
    wires = Wires(host, hot)
    meet(program, sites)
    verify(program, "meet", expected)
    for step in (insert_lookahead, insert_selector, insert_guard):
        step(program, sites, plan, wires)
        verify(program, step.__name__, expected)
    reasons = fuse(program, sites)
    verify(program, "fuse", [item for item in expected if reasons[item.site.name] is None])
    program.module.recompile()
    return host, summarize(program, found, plan, sites, before, options.lower, reasons)


def compile_graph(
    module: GraphModule, inputs: Sequence[Any], options: Options, hot: HotTensors
) -> tuple[Callable[..., Any], Report]:
    """Rewrite a graph and lower it to a callable that takes the graph's own inputs and runs without gradients."""
    program = capture(module, inputs)
    host, report = run_passes(program, options, hot)
    joined = join(program, inputs, options)
    examples, weights = [*inputs, *host.inputs(), *joined.inputs], joined.weights
    run = backends.get(options.lower).lower(program.module, examples, options.mode, options.inductor)

    def compiled(*args: Any) -> Any:
        with torch.no_grad():
            return run(*args, *host.appended, *weights.tensors(args))

    return compiled, replace(report, notes=(*report.notes, *joined.notes))


def join(program: Program, inputs: Sequence[Any], options: Options) -> Joined:
    """Join linear layers that read the same input, as the options say; "auto" does where GPUs gain by it."""
    asked, compiles = options.join_linears, options.lower != "eager" or options.dry
    if program.kind != "dynamo" or asked == "never" or (asked == "auto" and not compiles):
        return Joined()
    return join_linears(program, inputs, "cuda" if asked == "auto" else None, options.dry)


def rewrite(
    program: Rewritable,
    *,
    plan: Any = None,
    example_inputs: Sequence[Any] | None = None,
    fuel: int | None = None,
    **options: Any,
) -> Rewritable:
    """Give every attention of a program look-ahead mixed precision; the argument stays as it was.

    Args:
        program: From ``torch.export.export`` (before ``run_decompositions``), or an FX graph.
        plan: A Plan, or the path of one; made from ``preset`` and the other options when left out.
        example_inputs: For an FX graph that does not know its shapes.
        fuel: Rewrite only the first so many sites.
        **options: See ``Options.parse``.

    Returns:
        A program of the same type. The changeable tensors are buffers ``lamp_<site>_tau`` and so on in its state dict;
        what was done is ``graph_module.meta["lamp_report"]`` (``meta["lamp_report"]`` of a GraphModule).

    Raises:
        OptionError, PlanError, InputError: Bad options, plan or program.
        ModelError: It was captured in training mode.
    """
    given = {name: value for name, value in (("plan", plan), ("fuel", fuel)) if value is not None}
    captured = capture(program, example_inputs)
    host, report = run_passes(captured, Options.parse({**options, **given}), HotTensors())
    captured.module.meta["lamp_report"] = report
    return host.finish()  # type: ignore[no-any-return]
