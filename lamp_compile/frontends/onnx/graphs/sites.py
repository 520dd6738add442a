"""One attention found in an ONNX graph: the fields of ``ir.AttentionSite``, with names of values for nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto

FLOAT, FLOAT16, DOUBLE, BFLOAT16, BOOL, INT64, INT32 = 1, 10, 11, 16, 9, 7, 6
FLOATS = {FLOAT: "float32", FLOAT16: "float16", DOUBLE: "float64", BFLOAT16: "bfloat16"}


@dataclass
class OnnxSite:
    """Shapes: q ``[B, H, S, D]``, k ``[B, G, N, D]``, v ``[B, G, N, Dv]``; ``mask`` (boolean, True = attend) and
    ``bias`` (added to the scores, after soft-capping) broadcast to ``[B, H, S, N]``. All of them are names of values.
    """

    pattern: str
    root: NodeProto
    """The node whose place the rewrite takes."""
    out: str
    """The value ``[B, H, S, Dv]`` that the rewrite makes."""
    q: str
    k: str
    v: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    element: int
    """``TensorProto.DataType`` of q, k and v."""
    mask: str = ""
    bias: str = ""
    scale: float = 1.0
    softcap: float = 0.0
    features: tuple[str, ...] = ()
    """What is worth a word in the report besides mask, bias and soft-cap."""
    name: str = ""
    replaced: list[NodeProto] = field(default_factory=list)
    """Nodes that the new ones make superfluous; what only they used goes with them."""
    absorbed: list[NodeProto] = field(default_factory=list)
    """The site's nodes for a reader of the report, in order."""
    cache: None = None

    @property
    def dtype(self) -> str:
        """The name of ``element``."""
        return FLOATS[self.element]
