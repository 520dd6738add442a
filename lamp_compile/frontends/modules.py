"""The graph route of ``lamp_compile.compile``: any module, its forward compiled by the LAMP backend."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from lamp_compile.errors import ModelError
from lamp_compile.frontends import switch
from lamp_compile.frontends.structure import structural_copy
from lamp_compile.plan import Plan
from lamp_compile.report import Report
from lamp_compile.runtime.controls import Controls

NOTE = (
    "this module was compiled as a graph: there is no cache of planes, so keys and values are quantised at every call"
)
ENCODER_NOTE = "generate runs the encoder by itself, outside the compiled forward"
ATTENTION = (nn.MultiheadAttention, nn.Transformer, nn.TransformerDecoderLayer, nn.TransformerEncoderLayer)


class GraphLamp:
    """The ``lamp`` attribute of a module compiled as a graph.

    Attributes:
        backend: The torch.compile backend; its ``reports`` grow with every graph.
        original: The module without LAMP, around the same weights.
    """

    def __init__(self, backend: Any, original: nn.Module) -> None:
        self.backend, self.original = backend, original
        self.looked_at = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphLamp:
        """Copies of a compiled module share the backend and its settings; not the weights."""
        made = copy.copy(self)
        made.original = copy.deepcopy(self.original, memo)
        return made

    @property
    def controls(self) -> Controls:
        """tau, floor level and budget of every site; empty until the first call compiles."""
        controls: Controls = self.backend.controls
        return controls

    @property
    def plan(self) -> Plan:
        """What was decided for the sites compiled so far."""
        return self.report().plan

    def report(self) -> Report:
        """What was found and done in all graphs compiled so far.

        Raises:
            ModelError: Nothing was compiled yet.
        """
        separate = getattr(getattr(self.original, "config", None), "is_encoder_decoder", False)
        return merged(self.backend.reports, NOTE, *([ENCODER_NOTE] if separate else []))


def merged(reports: Sequence[Report], *notes: str) -> Report:
    """One report of several graphs; a site compiled twice (for two shapes) is listed once.

    Raises:
        ModelError: There is no report.
    """
    if not reports:
        raise ModelError("nothing was compiled yet", where="report", fix="call the model once")
    sites = {site.name: site for report in reports for site in report.sites}
    rows = {row.name: row for report in reports for row in report.plan.sites}
    marks = {report.plan.fingerprint for report in reports if report.sites}  # several: one module, several graphs
    first = next((report for report in reports if report.before), reports[0])
    return replace(
        first,
        sites=tuple(sites.values()),
        refusals=tuple(dict.fromkeys(refusal for report in reports for refusal in report.refusals)),
        unclaimed=tuple(dict.fromkeys(refusal for report in reports for refusal in report.unclaimed)),
        rewritten=tuple(dict.fromkeys(name for report in reports for name in report.rewritten)),
        plan=replace(first.plan, sites=tuple(rows.values()), fingerprint=marks.pop() if len(marks) == 1 else ""),
        notes=tuple(dict.fromkeys((*(note for report in reports for note in report.notes), *notes))),
    )


def surely_without_attention(model: nn.Module) -> bool:
    """Whether it is built of torch's own layers alone, none of them attention: then no input is needed to know."""
    modules = list(model.modules())
    own = all(type(module).__module__.startswith("torch.nn.modules.") for module in modules)
    return own and not any(isinstance(module, ATTENTION) for module in modules)


def compile_module(model: nn.Module, backend: Any, inplace: bool) -> Any:
    """A module whose forward runs through the backend, on the first call of each shape.

    Raises:
        ModelError: On the first call, when there is no attention in it.
    """
    copied = structural_copy(model)
    fast, original = (model, copied) if inplace else (copied, model)
    bound = "forward" in fast.__dict__
    compiled: Any = torch.compile(fast.forward if bound else type(fast).forward, backend=backend)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if switch.disabled():
            return self.lamp.original.forward(*args, **kwargs)
        if self.training:
            raise ModelError("the module is in training mode", where=type(self).__name__, fix="call .eval() first")
        result = compiled(*(args if bound else (self, *args)), **kwargs)  # self: a deep copy has its own weights
        _look(self)
        return result

    hooked: Any = fast
    hooked.lamp = GraphLamp(backend, original)
    hooked.forward = MethodType(forward, fast)
    return fast


def _look(model: Any) -> None:
    """After a compilation: say it when nothing was rewritten."""
    lamp: GraphLamp = model.lamp
    if len(lamp.backend.reports) == lamp.looked_at:
        return
    lamp.looked_at = len(lamp.backend.reports)
    report = lamp.report()
    name = type(model).__name__
    if not (report.sites or report.refusals or report.unclaimed):
        raise ModelError("the module has no attention", where=name, fix="torch.compile(model) without LAMP")
    if not report.rewritten:
        reasons = [refusal.reason for refusal in (*report.refusals, *report.unclaimed)]
        warnings.warn(f"no attention of {name} was rewritten: {reasons[0] if reasons else 'fuel'}", stacklevel=4)
