"""``lamp::attention.cached``: what the Hugging Face frontend emits, over the packed planes of a cache."""

from __future__ import annotations

from torch.fx import Node

from lamp_compile.ir import AttentionSite, CacheRef
from lamp_compile.passes.patterns._base import NoMatch, Pattern
from lamp_compile.passes.patterns._dialect import Call, bind, schema_of
from lamp_compile.passes.patterns._values import Emitter, tensor
from lamp_compile.passes.patterns._walk import checked
from lamp_compile.runtime import formats, layout


def read_cached(root: Node, call: Call, emit: Emitter) -> AttentionSite:
    """See ``Pattern.read``."""
    bound = bind(root)
    q, k_high, v_high = (tensor(bound[name]) for name in ("q", "k_high", "v_high"))
    if q is None or k_high is None or v_high is None:
        raise NoMatch("shapes are not known here")
    names = [argument.name for argument in schema_of(root).arguments]
    tensors = [argument.name for argument in schema_of(root).arguments if not argument.kwarg_only]
    nodes = {name: bound[name] for name in tensors if name not in ("q", "mask", "bias", "sinks")}
    settings = {name: bound[name] for name in names if name not in tensors}
    site = AttentionSite(
        name=bound["site"], pattern="cached", root=root, q=bound["q"], k=None, v=None,
        heads=int(q.shape[1]), kv_heads=int(k_high.shape[1]), head_dim=int(q.shape[3]),
        value_dim=formats.get(bound["v_format"]).channels(int(layout.value_width(v_high))),
        dtype=str(q.dtype).removeprefix("torch."), mask=bound["mask"], bias=bound["bias"], sinks=bound["sinks"],
        causal=bound["causal"], window=bound["window"], scale=bound["scale"], softcap=bound["softcap"],
        cache=CacheRef(nodes, settings),
    )  # fmt: skip
    return checked(site)


PATTERN = Pattern("cached", ("cached",), read_cached)
