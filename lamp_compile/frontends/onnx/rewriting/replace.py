"""Put one ``ai.lamp.UncachedAttention`` node in the place of each chosen site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lamp_compile.errors import OptionError, PlanError
from lamp_compile.frontends.onnx import functions
from lamp_compile.frontends.onnx.form import RULES, Form
from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Graph
from lamp_compile.frontends.onnx.graphs.sites import FLOAT, OnnxSite
from lamp_compile.frontends.onnx.rewriting.find import Claimed
from lamp_compile.plan import Plan, SitePlan
from lamp_compile.runtime import guard as guards
from lamp_compile.runtime import rotation

if TYPE_CHECKING:
    from onnx import NodeProto

OPERATOR = "UncachedAttention"


def check_row(site: OnnxSite, row: SitePlan) -> None:
    """Whether a row of a plan can be written as a function of standard operators.

    Raises:
        PlanError: A format or rule without a body.
    """
    where = f"plan, site {row.name!r}"
    for what, value, allowed in (
        ("k_format", row.k_format, ("nested8",)), ("v_format", row.v_format, ("nested8",)), ("rule", row.rule, RULES),
    ):  # fmt: skip
        if value not in allowed:
            raise PlanError(f"{what} {value!r} has no ONNX body", where=where, fix=f"one of {', '.join(allowed)}")


def replace_sites(graph: Graph, chosen: Sequence[Claimed], plan: Plan, guard: str) -> list[str]:
    """Rewrite the graph and its model in place; gives back what the reader of a report should know.

    Raises:
        PlanError: See ``check_row``.
        OptionError: The bodies do not mean the same at this model's opset.
    """
    if chosen and graph.opset not in functions.OPSETS:
        first, last = functions.OPSETS.start, functions.OPSETS.stop - 1
        fix = f"onnx.version_converter.convert_version(model, {functions.OPSET}), or export it again"
        raise OptionError(f"opset {graph.opset}, not {first} to {last}", where="the model", fix=fix)
    for claimed in chosen:
        check_row(claimed.site, plan.site(claimed.site.name))
    parts, notes = _Parts(graph, guard), []
    places: dict[int, list[NodeProto]] = {}
    for claimed in chosen:
        emit = Emitter(graph, f"lamp/{claimed.site.name}")
        parts.node(claimed.site, plan.site(claimed.site.name), emit)
        places[id(claimed.site.root)] = [*claimed.before, *emit.made, *claimed.behind]
        notes += parts.notes
        parts.notes = []
    _splice(graph, chosen, places)
    _complete(graph, parts.forms)
    return notes


class _Parts:
    """What several sites share, and the node of each."""

    def __init__(self, graph: Graph, guard: str) -> None:
        self.graph, self.guard = graph, guard
        self.forms: set[Form] = set()
        self.notes: list[str] = []
        self._rotations: dict[int, str] = {}

    def node(self, site: OnnxSite, row: SitePlan, emit: Emitter) -> None:
        """Nodes that prepare mask and bias, and the attention itself."""
        mask, bias = self.visibility(site, emit)
        form = Form(
            guard=self.guard, rule=row.rule, query_bits=row.query_bits, subtile=row.subtile, tile=row.tile,
            rotation=row.rotation != "none", balance=row.balance is not None, causal="", softcap=bool(site.softcap),
            mask="keys" if mask else "", bias=bool(bias), cache=False,
        )  # fmt: skip
        self.forms.add(form)
        inputs = {"q": site.q, "k": site.k, "v": site.v, "mask": mask, "bias": bias, **self.settings(site, row)}
        if form.rotation:
            inputs["rotate_k"] = self.rotation(site.head_dim, site)
            inputs["rotate_v"] = self.rotation(site.value_dim, site)
        if row.balance is not None:
            inputs["balance"] = self.initializer(f"lamp/{site.name}/balance", np.asarray(row.balance, np.float32))
        unused = [self.graph.fresh(f"lamp/{site.name}/{name}_new") for name in ("state", "stats")]
        node = functions.make_node(
            OPERATOR, form, inputs, [site.out, *unused], site=site.name, scale=float(site.scale),
            guard_window=row.guard.window, guard_hold=row.guard.hold, hysteresis=float(row.guard.hysteresis),
            **({"softcap": float(site.softcap)} if site.softcap else {}),
        )  # fmt: skip
        node.name = self.graph.fresh(f"lamp/{site.name}/attention")
        emit.made.append(node)

    def visibility(self, site: OnnxSite, emit: Emitter) -> tuple[str, str]:
        """Mask and bias with four axes and a column for each key; minus infinity in a bias goes into the mask."""
        mask, bias = site.mask, site.bias
        if bias:
            bias = emit.cast(bias, FLOAT)
            if not self._finite(site.bias):
                hidden = emit.call("IsInf", bias, detect_positive=0)
                mask = emit.both(mask, emit.call("Not", hidden))
                bias = emit.call("Where", hidden, emit.constant(0.0, FLOAT), bias)
        return self.columns(site, mask, emit), self.columns(site, bias, emit)

    def columns(self, site: OnnxSite, name: str, emit: Emitter) -> str:
        """The value with four axes, the last of them as long as there are keys."""
        if not name:
            return ""
        dims, keys = self.graph.dims(name), (self.graph.dims(site.k) or ["?"] * 4)[2]
        missing = 4 - (4 if dims is None else len(dims))
        if missing:
            name = emit.unsqueeze(name, *range(missing))
        same = dims is not None and dims and dims[-1] == keys and not (isinstance(keys, str) and keys.startswith("?"))
        if same:
            return name
        wide = emit.call("Concat", emit.constant([1, 1, 1]), emit.size(site.k, 2), axis=0)
        return emit.call("Expand", name, wide)

    def _finite(self, bias: str) -> bool:
        """Whether a bias is known to hold numbers only."""
        node = self.graph.maker(bias, "Where")
        if node is None:
            value = self.graph.constant(bias)
            return value is not None and bool(np.isfinite(value.astype(np.float64)).all())
        numbers = [self.graph.number(name) for name in node.input[1:]]
        return all(number is not None and np.isfinite(number) for number in numbers)

    def settings(self, site: OnnxSite, row: SitePlan) -> dict[str, str]:
        """tau, floor, budget, and the guard's state and statistics, which nobody carries on here."""
        heads = site.kv_heads
        values = {
            "tau": np.broadcast_to(np.asarray(row.tau, np.float32), (heads,)),
            "floor": np.broadcast_to(np.asarray(row.floor, np.float32), (heads,)),
            "budget": np.full((heads,), row.guard.budget, np.float32),
            "state": np.zeros((1, heads, guards.STATE_FIELDS), np.float32),
            "stats": np.zeros((1, heads, guards.STATS_FIELDS), np.int64),
        }
        return {name: self.initializer(f"lamp/{site.name}/{name}", value) for name, value in values.items()}

    def rotation(self, size: int, site: OnnxSite) -> str:
        """The rotation of so many channels; one for all sites."""
        if size not in self._rotations:
            try:
                matrix = rotation.sign_matrix(size).astype(np.float64) / np.sqrt(size)
            except OptionError:
                matrix = np.eye(size)
                self.notes.append(f"{site.name}: {size} channels are not rotated, they have no Hadamard matrix")
            self._rotations[size] = self.initializer(f"lamp/rotation_{size}", matrix.astype(np.float32))
        return self._rotations[size]

    def initializer(self, name: str, value: Any) -> str:
        """A new initializer."""
        from onnx import numpy_helper

        name = self.graph.fresh(name)
        self.graph.proto.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def _splice(graph: Graph, chosen: Sequence[Claimed], places: dict[int, list[NodeProto]]) -> None:
    """The nodes of the graph anew: new ones in the place of the roots, without what they made superfluous."""
    made = [node for nodes in places.values() for node in nodes]
    graph.add(made)
    # Sizes that no mask asked for go again; an attention that nobody reads stays one.
    keep = {id(node) for node in made if node.domain == functions.DOMAIN}
    dead = graph.bury([node for claimed in chosen for node in claimed.site.replaced], keep)
    dead |= graph.bury([node for node in made if graph.is_unused(node)], keep)
    kept: list[NodeProto] = []
    for node in graph.proto.node:
        kept.extend([*places.get(id(node), ()), node])
    copies = [type(node).FromString(node.SerializeToString()) for node in kept if id(node) not in dead]
    del graph.proto.node[:]
    graph.proto.node.extend(copies)
    alive = {name for node in copies for name in node.output}
    infos = [info for info in graph.proto.value_info if info.name in alive]
    if len(infos) < len(graph.proto.value_info):
        copied = [type(info).FromString(info.SerializeToString()) for info in infos]
        del graph.proto.value_info[:]
        graph.proto.value_info.extend(copied)


def _complete(graph: Graph, forms: set[Form]) -> None:
    """Functions, imports, IR version."""
    from onnx import helper

    model = graph.model
    if forms:
        model.functions.extend(functions.functions_for(forms, graph.opset))
        model.opset_import.append(helper.make_opsetid(functions.DOMAIN, functions.VERSION))
        model.ir_version = max(model.ir_version, functions.IR_VERSION)
