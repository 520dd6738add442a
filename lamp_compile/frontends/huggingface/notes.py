"""What the report of a compiled transformers model says besides its sites."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.passes import join_linears
from lamp_compile.report import Report
from lamp_compile.runtime import kernel_notes, prompt
from lamp_compile.runtime.kv_cache import CacheSpec
from lamp_compile.runtime.network import audit

ALWAYS = (
    "torch.compile(model, backend='lamp').generate(...) compiles nothing: generate belongs to the model inside; "
    "lamp_compile.compile(model).generate(...) does",
    "without the cache made here decoding gains nothing: keys and values would be quantised anew at every step",
)
PLANES = "prefill reads the planes too, so it follows the same numbers as decoding"
AS_THEY_CAME = (
    "a prompt of {} tokens or more into an empty cache attends to its keys and values as they came; all that follows "
    "reads the planes"
)
WINDOWS = "sliding-window layers store all keys; the mask keeps to the window"

INSURED = (
    "exact_tier 'host': steps run in eager mode, each layer asks once a step whether a floor is 2, and a step at "
    "floor 2 runs the reference"
)


def notes_for(spec: CacheSpec, sites: tuple[ProbedSite, ...], graphs: Iterable[Report]) -> tuple[str, ...]:
    """Notes of a model: what is always so, sliding windows, and the sites on a GPU that no kernel serves.

    Args:
        spec: What a cache of the model is made of.
        sites: What the probe saw.
        graphs: Reports of the graphs compiled so far, which know more of the calls.
    """
    served = [site for site in sites if site.dtype in prompt.DTYPES.get(site.device.type, ())]
    least = min((prompt.least_rows(site.device) for site in served), default=math.inf)
    notes = [*ALWAYS, AS_THEY_CAME.format(least) if least < math.inf else PLANES]
    if any(feature.startswith("window") for site in sites for feature in site.features):
        notes.append(WINDOWS)
    notes += _predicted(spec)
    if any(layer is not None and layer.plan.exact_tier == "host" for layer in spec.layers):
        notes.append(INSURED)
    notes += kernel_notes.notes({site.name: _why_no_kernel(spec, site) for site in sites})
    kept = (kernel_notes.START, join_linears.START)
    notes += [note for report in graphs for note in report.notes if note.startswith(kept)]
    return tuple(dict.fromkeys(notes))


def _predicted(spec: CacheSpec) -> list[str]:
    """Which sites a network predicts, and which of them may skip."""
    layers = [layer for layer in spec.layers if layer is not None and layer.network is not None]
    if not layers:
        return []
    names = ", ".join(layer.plan.name for layer in layers)
    notes = [f"a look-ahead network predicts {names} when one token is decoded; prompts, and slots "
             "(generate_many), are looked at exactly"]  # fmt: skip
    skips = [
        f"{layer.plan.name} {layer.network.skip:g}" for layer in layers if layer.network and layer.network.skip > 0
    ]
    if skips:
        notes.append(f"sub-tiles are skipped, within these masses of the softmax: {', '.join(skips)}; one step in "
                     f"{audit.WINDOW} reads all")  # fmt: skip
    return notes


def _why_no_kernel(spec: CacheSpec, site: ProbedSite) -> str | None:
    layer = spec.layers[site.layer]
    if layer is None or not kernel_notes.expected_on(site.device):
        return None
    q = torch.empty(0, site.heads, 1, site.head_dim, dtype=site.dtype, device=site.device)
    reason = kernel_notes.why_not_plan(layer.plan, q, site.kv_heads, site.value_dim)
    if reason is None and layer.network is not None:
        return kernel_notes.why_not_network(layer.plan, q, layer.network.group, layer.network.gate.rank)
    return reason
