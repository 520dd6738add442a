"""Run one family on one route: what was claimed, and how far the outputs are from the original's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lamp_compile
from lamp_compile.ir import Floor
from lamp_compile.report import Report
from tests.models.zoo import Family, build, inputs

LOWEST = 1e9
"""A tau that refines nothing."""


@dataclass(frozen=True)
class Outcome:
    """Relative errors of the output at each setting, over the rows that are no padding."""

    report: Report
    both: float
    high: float
    exact: float | None = None
    """Only without a cache: the original keys and values."""


def relative(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted||."""
    assert got.shape == wanted.shape
    assert bool(got.isfinite().all())
    return float((got - wanted).norm() / wanted.norm())


def routed(got: Tensor, wanted: Tensor, family: Family) -> float:
    """``relative``; of a mixture of experts without one row in fifty. A last-bit difference sends a token whose experts
    are nearly even to another one, and nothing is wrong with its attention."""
    if "mixture of experts" not in family.feature:
        return relative(got, wanted)
    errors = (got - wanted).norm(dim=-1)
    kept = errors.argsort()[: len(errors) - max(1, len(errors) // 50)]
    return relative(got[kept], wanted[kept])


def on_graph(family: Family, implementation: str) -> Outcome:
    """``torch.compile`` with our backend, lowered to eager, as one graph."""
    model, arguments = build(family, implementation), _arguments(family)
    wanted = output(model, arguments, family)
    backend = lamp_compile.backend(lower="eager", tau=0.0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    errors = {}
    for level in Floor:
        backend.controls.set(floor=int(level))
        errors[level] = relative(output(compiled, arguments, family), wanted)
    backend.controls.set(floor=0, tau=LOWEST)
    high = relative(output(compiled, arguments, family), wanted)
    (report,) = backend.reports
    return Outcome(report, both=errors[Floor.BOTH], exact=errors[Floor.EXACT], high=high)


def on_decoder(family: Family) -> Outcome:
    """``lamp_compile.compile``: a prefill and then one token at a time, over a cache of planes."""
    model, arguments = build(family, "eager"), _arguments(family)
    wanted = output(model, arguments, family)
    fast = lamp_compile.compile(model, mode="eager", tau=0.0, balance="never")
    fast.lamp.controls.set(floor=int(Floor.BOTH))
    both = routed(decoded(fast, arguments), wanted, family)
    fast.lamp.controls.set(floor=0, tau=LOWEST)
    high = routed(decoded(fast, arguments), wanted, family)
    return Outcome(fast.lamp.report(), both=both, high=high)


def on_module(family: Family) -> Outcome:
    """``lamp_compile.compile`` of what is no decoder: its forward becomes a graph."""
    model, arguments = build(family, "sdpa"), _arguments(family)
    wanted = output(model, arguments, family)
    torch._dynamo.reset()
    fast = lamp_compile.compile(model, mode="eager", tau=0.0, floor=int(Floor.BOTH))
    both = relative(output(fast, arguments, family), wanted)
    fast.lamp.controls.set(floor=0, tau=LOWEST)
    high = relative(output(fast, arguments, family), wanted)
    assert len(fast.lamp.backend.reports) == 1
    return Outcome(fast.lamp.report(), both=both, high=high)


def decoded(fast: Any, arguments: dict[str, Any], steps: int = 3) -> Tensor:
    """Logits of the rows that are no padding: all tokens but ``steps`` at once, those one by one."""
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    cache = fast.lamp.cache()
    first = ids.shape[1] - steps
    parts = []
    with torch.no_grad():
        for begin, end in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
            got = fast(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                position_ids=torch.arange(begin, end)[None].expand(ids.shape[0], -1),
                use_cache=True,
            )
            parts.append(got.logits)
    assert int(cache.get_seq_length()) == ids.shape[1]
    logits: Tensor = torch.cat(parts, dim=1)[mask.bool()]
    return logits


def output(model: Callable[..., Any] | nn.Module, arguments: dict[str, Any], family: Family) -> Tensor:
    """Logits or hidden states; rows of padding left out."""
    with torch.no_grad():
        out = model(**arguments)
    values: Tensor = out.logits if "logits" in out else out.last_hidden_state
    mask = arguments.get("attention_mask")
    return values if mask is None or "decoder_input_ids" in arguments else values[mask.bool()]


def _arguments(family: Family) -> dict[str, Any]:
    arguments: dict[str, Any] = inputs(family)
    if family.decoder or family.refusal or "decoder_input_ids" in arguments:
        arguments["use_cache"] = False
    if (family.decoder or family.refusal) and family.name != "GPT-2":
        length = arguments["input_ids"].shape[1]
        arguments["position_ids"] = torch.arange(length)[None].expand(arguments["input_ids"].shape[0], -1)
    return arguments
