"""What a pattern of ONNX nodes is. As those of FX graphs: it anchors on a node, walks back, and returns a site, refuses
(``Refuse``) or does not match (``NoMatch``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamp_compile.frontends.onnx.graphs.emit import Emitter
from lamp_compile.frontends.onnx.graphs.graph import Graph
from lamp_compile.frontends.onnx.graphs.sites import OnnxSite
from lamp_compile.passes.patterns._base import NoMatch, Refuse

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["NoMatch", "OnnxPattern", "Refuse"]


@dataclass(frozen=True)
class OnnxPattern:
    """One spelling of attention.

    Attributes:
        name: Shown in reports.
        roots: ``(domain, operator)`` pairs that it anchors on.
        read: ``(graph, node, emitter) -> OnnxSite``. New nodes that it needs (a transpose, a mask) it makes
            through the emitter; they are forgotten unless it returns a site.
    """

    name: str
    roots: tuple[tuple[str, str], ...]
    read: Callable[[Graph, NodeProto, Emitter], OnnxSite]
