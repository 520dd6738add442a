"""Find every attention of a model, and report each softmax that nobody claims."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamp_compile.frontends.onnx.files.limits import shown
from lamp_compile.frontends.onnx.functions import DOMAIN
from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Graph, nodes_within
from lamp_compile.frontends.onnx.graphs.sites import OnnxSite
from lamp_compile.frontends.onnx.patterns import all_patterns
from lamp_compile.frontends.onnx.patterns._base import NoMatch, OnnxPattern, Refuse
from lamp_compile.ir import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

_UNREAD = {
    ("com.microsoft", name): "there is no reader for com.microsoft." + name
    for name in (
        "Attention", "QAttention", "QOrderedAttention", "PackedAttention", "PackedMultiHeadAttention",
        "DecoderAttention", "DecoderMaskedSelfAttention", "DecoderMaskedMultiHeadAttention", "PagedAttention",
        "SparseAttention", "LongformerAttention",
    )
}  # fmt: skip
_UNREAD[("ai.onnx.preview", "FlexAttention")] = "FlexAttention carries its mask and score change as graphs"
_UNREAD[("", "LinearAttention")] = "linear attention has no softmax"

MOST_HEADS, MOST_CHANNELS = 2**16, 2**12
"""A site's settings and rotation are initializers of these sizes: what a file declares must not allocate them."""


@dataclass(frozen=True)
class Claimed:
    """A site with the nodes that its reader made: before its own node, and behind it."""

    site: OnnxSite
    before: tuple[NodeProto, ...]
    behind: tuple[NodeProto, ...]


@dataclass(frozen=True)
class FoundOnnx:
    """What the readers saw, in graph order; as ``ir.Found``."""

    claimed: tuple[Claimed, ...]
    refusals: tuple[Refusal, ...]
    unclaimed: tuple[Refusal, ...]
    rewritten: int = 0
    """Nodes of domain ``ai.lamp`` that are there already."""

    @property
    def sites(self) -> tuple[OnnxSite, ...]:
        """The sites alone."""
        return tuple(claimed.site for claimed in self.claimed)


def find_sites(graph: Graph) -> FoundOnnx:
    """Read all sites of a model's main graph; what is in branches and functions is reported only."""
    readers: dict[tuple[str, str], list[OnnxPattern]] = {}
    for pattern in all_patterns().values():
        for root in pattern.roots:
            readers.setdefault(root, []).append(pattern)
    claimed: list[Claimed] = []
    refusals: list[Refusal] = []
    unclaimed: list[Refusal] = []
    names: Counter[str] = Counter()
    done = 0
    for node in list(graph.proto.node):
        anchor = _anchor(node)
        done += anchor[0] == DOMAIN
        if anchor in _UNREAD:
            unclaimed.append(Refusal(site_name(node), _UNREAD[anchor], node=node.name))
        if anchor in readers:
            name = site_name(node)
            names[name] += 1
            name = name if names[name] == 1 else f"{name}#{names[name]}"
            outcome = _first_outcome(graph, node, name, readers[anchor])
            if isinstance(outcome, Claimed):
                claimed.append(outcome)
            else:
                (refusals if outcome.pattern else unclaimed).append(outcome)
    unclaimed.extend(_elsewhere(graph, {*readers, *_UNREAD}))
    return FoundOnnx(tuple(claimed), tuple(refusals), tuple(unclaimed), done)


def site_name(node: NodeProto) -> str:
    """The module path that the exporter left: of torch's in the metadata, of older ones in the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = [scope for scope in re.findall(r"'([^']*)'", entry.value)[:-1] if scope]
            if scopes:
                return str(scopes[-1])[:200]
    parts = [part for part in node.name.strip("/").split("/") if part]
    return str(".".join(parts[:-1]) or node.name or "attention")[:200]


def _anchor(node: NodeProto) -> tuple[str, str]:
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def _first_outcome(graph: Graph, node: NodeProto, name: str, readers: list[OnnxPattern]) -> Claimed | Refusal:
    """The site of the first reader that knows the node; else its refusal (``pattern`` set); else why nobody does."""
    missing: list[str] = []
    for pattern in readers:
        emit = Emitter(graph, f"lamp/{name}")
        try:
            site = pattern.read(graph, node, emit)
        except NoMatch as no_match:
            emit.undo()
            missing.append(str(no_match))
        except Refuse as refuse:
            emit.undo()
            return Refusal(name, refuse.reason, refuse.fix, pattern.name, node.name)
        else:
            if max(site.heads, site.kv_heads) > MOST_HEADS or max(site.head_dim, site.value_dim) > MOST_CHANNELS:
                emit.undo()
                sizes = f"{site.heads} heads over {site.kv_heads} of {site.head_dim} and {site.value_dim} channels"
                return Refusal(name, f"{sizes}: no attention is as large", "", pattern.name, node.name)
            site.name = name
            return Claimed(site, tuple(emit.made), tuple(emit.following))
    return Refusal(name, "; ".join(missing), node=node.name)


def _elsewhere(graph: Graph, anchors: set[tuple[str, str]]) -> Iterator[Refusal]:
    fix = "inline it first: onnx.inliner.inline_local_functions"
    for node, nested in nodes_within(graph.proto.node):
        if nested and _anchor(node) in anchors:
            yield Refusal(site_name(node), "it is inside a branch or loop", "", node=node.name)
    for function in graph.model.functions:
        for node, _ in nodes_within(function.node) if function.domain != DOMAIN else ():
            if _anchor(node) in anchors:
                where = shown(f"{function.domain}.{function.name}")
                yield Refusal(site_name(node), f"it is inside the function {where}", fix, node=node.name)
