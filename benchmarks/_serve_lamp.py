"""A queue served by ``fast.lamp.generate_many``, observed from outside: times, idle slots, refined shares, equality."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from _requests import Clock, Request, Served, mean, spread
from torch import Tensor

import lamp_compile
from lamp_compile.frontends.huggingface import compiled
from lamp_compile.frontends.huggingface.many import ManyPrompts
from lamp_compile.runtime import guard

WARM_NEW = 8
WARM_PROMPTS = 96
"""How kernels are cut depends on the length of a prompt, and each cut is compiled once: outside the clock."""
CHECKED_NEW = 48
KEPT_LOGITS = 4
TOLERANCE = 0.06
"""Of logits, root mean square over their spread: keys and values are rounded, sums are taken in another order."""
ROUNDS = 14
SAMPLE = 8
CHECK = (
    f"up to {CHECKED_NEW} tokens of each checked request against the request alone in the same slots at temperature 0; "
    f"the logits of its first {KEPT_LOGITS} tokens against that, and against a cache of its own, fed the same tokens; "
    "noise is what four times the room changes in a cache of its own, where the same sums are taken in another order"
)
OVER_NOISE = 3.0
"""Of medians: served steps differ from a cache of its own by compiled and joined products, too, which noise leaves out.
Some prompts of a deep model of random weights are many times as sensitive as others (0.4 from sums in another order has
been seen), so that the largest of few differences says little."""
WRONG_ROW = 1.0
"""Logits of an unrelated row are 1.4 apart; none may be this far."""


class Log:
    """What the loop did."""

    def __init__(self, watched: Sequence[int] = ()) -> None:
        self.watched = set(watched)
        self.first: dict[int, float] = {}
        self.admitted: dict[int, float] = {}
        self.logits: dict[int, list[Tensor]] = {index: [] for index in watched}
        self.steps, self.busy, self.refills = 0, 0, 0
        self.used: set[int] = set()
        self.behind = 0
        self.waited = 0.0
        """Seconds that the host waited for tokens of launches."""
        self.starting: list[float] = []
        self.stepping: list[float] = []
        """Seconds of the host for each prompt and each step."""
        self.read: Tensor | int = 0
        self.decoded: Tensor | int = 0


class Observed(ManyPrompts):
    """The loop of ``generate_many``, which tells a log what it does."""

    def __init__(self, log: Log, *args: Any) -> None:
        super().__init__(*args)
        self.log = log
        log.behind = self.behind

    def _start(self, sequence: Any) -> None:
        began = self.log.admitted[sequence.index] = time.perf_counter()
        super()._start(sequence)
        self.log.starting.append(time.perf_counter() - began)

    def _advance(self) -> None:
        began = time.perf_counter()
        super()._advance()
        self.log.stepping.append(time.perf_counter() - began)

    def _choose(self, slots: list[int], logits: Tensor) -> None:
        log, streams = self.log, [self._running[slot] for slot in slots]
        for slot, stream in zip(slots, streams, strict=True):
            if stream.index in log.watched and stream.chosen < KEPT_LOGITS:
                log.logits[stream.index].append(logits[slot if logits.shape[0] > 1 else 0].float().cpu())
        if streams[0].chosen:
            log.steps += 1
            log.busy += len(slots)
        else:
            counts = self._counts(slots[0])
            log.read, log.decoded = log.read + counts, log.decoded - counts
            log.refills += slots[0] in log.used
            log.used.add(slots[0])
        super()._choose(slots, logits)

    def _read(self, left: int) -> list[tuple[int, Tensor]]:
        unread = list(self._unread)[: max(0, len(self._unread) - left)]
        begun = [stream.index for chosen in unread for _, _, stream in chosen.owners if not stream.made]
        began = time.perf_counter()
        done = super()._read(left)
        now = time.perf_counter()
        self.log.waited += now - began
        self.log.first.update(dict.fromkeys(begun, now))
        return done

    def _finish(self, slot: int) -> None:
        self.log.decoded = self.log.decoded + self._counts(slot)
        super()._finish(slot)

    def _counts(self, slot: int) -> Tensor:
        """Statistics of a slot since it was admitted, a row for each layer."""
        return torch.stack([layer.stats[slot] for layer in self.cache.layers]).sum(1)


@contextmanager
def observing(log: Log) -> Iterator[None]:
    """``generate_many`` runs the observed loop for a while."""
    before: Any = compiled.ManyPrompts
    compiled.ManyPrompts = functools.partial(Observed, log)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        compiled.ManyPrompts = before  # type: ignore[misc]


def run(fast: Any, cache: Any, requests: Sequence[Request], log: Log, most: int | None = None) -> Iterator[Any]:
    """(index in ``requests``, new tokens) in the order they finish."""
    new = [request.new if most is None else min(most, request.new) for request in requests]
    with observing(log):
        loop: Any = fast.lamp.generate_many(
            [request.prompt for request in requests], max_new_tokens=new, cache=cache, eos_token_id=None
        )
    with closing(loop):  # at once where a row is cut short: what its slots counted is read as they are freed
        for index, row in loop:
            yield index, row[requests[index].length :].tolist()


def serve(model: Any, requests: Sequence[Request], setup: Any, clock: Clock) -> Served:
    """Compile, impose the shares, warm, serve, check. ``setup``: see ``serving.Setup``."""
    options = {} if setup.shares is None else {"guard_budget": math.inf}
    fast = lamp_compile.compile(model, mode=setup.mode, **options)
    cache = fast.lamp.slots(setup.streams, setup.pool, max(request.tokens for request in requests))
    if setup.shares is not None:
        impose(fast, cache, requests, setup.shares)
    for _ in run(fast, cache, spread(requests, WARM_PROMPTS), Log(), WARM_NEW):
        pass
    soonest = min(requests[: setup.streams], key=lambda request: request.new)  # finishes also where time is short
    watched = [request.index for request in (*spread(requests, 3), requests[-1], soonest)]
    log, made = Log(watched), Served()
    clock.start()
    began, loop = time.perf_counter(), run(fast, cache, requests, log)
    for index, tokens in loop:
        made.tokens[index] = tokens
        if time.perf_counter() - began > setup.row_seconds:
            break
    loop.close()  # type: ignore[attr-defined]
    cache.reset()
    clock.stop()
    made.first = {index: moment - began for index, moment in log.first.items()}
    made.admitted = {index: moment - began for index, moment in log.admitted.items()}
    made.steps, made.busy, made.slot_steps = log.steps, log.busy, log.steps * cache.streams
    made.kv_bytes, made.kv_tokens = cache.nbytes, cache.capacity
    shares = refined(log.decoded)
    made.extra = {
        "refills": log.refills,
        "host_waits_share": log.waited / clock.seconds,
        "host_ms_per_prompt": 1e3 * statistics.median(log.starting or [0.0]),
        "host_ms_per_step": 1e3 * statistics.median(log.stepping or [0.0]),
        "behind": log.behind,
        "refined_share": mean(shares),
        "refined_share_of_prefill": mean(refined(log.read)),
        "layer_shares": [round(share, 4) for share in shares],
        "fused": "fused_attention" in fast.lamp.report().after if setup.mode != "eager" else None,
        "check": lambda: check(fast, cache, requests, made, log),
    }
    return made


def refined(counts: Tensor | int) -> list[float]:
    """Share of live sub-tiles that were refined, per layer."""
    return [] if isinstance(counts, int) else [c[guard.REFINED] / max(1, c[guard.LIVE]) for c in counts.tolist()]


def impose(fast: Any, cache: Any, requests: Sequence[Request], shares: Sequence[float]) -> None:
    """Bisect tau of every layer at once on a sample of the queue, until layer i refines share ``i`` modulo their
    number."""
    layers, room = cache.layers, 2 * ROUNDS
    ids = torch.zeros(cache.streams, 1, dtype=torch.long, device=cache.lengths.device)
    ranked = sorted(requests, key=lambda request: request.length)
    count = min(SAMPLE, cache.streams, len(ranked))
    for request in (ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)):
        prompt = request.prompt[: max(1, cache.max_length - room)]
        if cache.fits(len(prompt) + room):
            slot = cache.admit(len(prompt) + room)
            ids[slot] = forward(fast, prompt[None].to(ids.device), cache.view(slot)).argmax(-1)
    low, high = [math.log(1e-7)] * len(layers), [0.0] * len(layers)
    for _ in range(ROUNDS):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        for layer, value in zip(layers, middle, strict=True):
            fast.lamp.controls.set(tau=math.exp(value), sites=layer.name)
            layer.stats.zero_()
        for _ in range(2):
            ids = forward(fast, ids, cache).argmax(-1)[:, None]
        for index, layer in enumerate(layers):
            if refined(layer.stats.sum((0, 1))[None])[0] > shares[index % len(shares)]:
                low[index] = middle[index]
            else:
                high[index] = middle[index]
    cache.reset()


@torch.no_grad()
def forward(fast: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits ``[B, V]`` of the last position, without a graph."""
    logits: Tensor = fast(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


def check(fast: Any, cache: Any, requests: Sequence[Request], made: Served, log: Log) -> dict[str, Any]:
    """See ``CHECK``. Not ok when tokens differ and logits do too, or when a cache of its own says otherwise; None where
    no checked request finished."""
    by_index = {request.index: request for request in requests}
    indices = [index for index in log.logits if index in made.tokens]
    equal, compared = 0, 0
    alone: list[float] = []
    own: list[float] = []
    noise: list[float] = []
    for index in indices:
        again = Log([0])
        ((_, tokens),) = run(fast, cache, [by_index[index]], again, CHECKED_NEW)
        served = made.tokens[index][: len(tokens)]
        same = next((i for i, (a, b) in enumerate(zip(tokens, served, strict=True)) if a != b), len(tokens))
        equal, compared = equal + same, compared + len(tokens)
        alone += [difference(a, b) for a, b in list(zip(again.logits[0], log.logits[index], strict=True))[: same + 1]]
        whole, roomy = (own_cache(fast, by_index[index], served, len(log.logits[index]), n) for n in (1, 4))
        own += map(difference, whole, log.logits[index])
        noise += map(difference, roomy, whole)
    limit = max(TOLERANCE, OVER_NOISE * statistics.median(noise or [0.0]))
    near = [found != [] and statistics.median(found) <= limit and max(found) < WRONG_ROW for found in (alone, own)]
    return {
        "what": CHECK,
        "requests": len(indices),
        "tokens_compared": compared,
        "tokens_equal": equal,
        **summary("to_alone", alone),
        **summary("to_own_cache", own),
        **summary("noise", noise),
        "tolerance": limit,
        "ok": near[1] and (equal == compared or near[0]) if indices else None,
    }


def summary(name: str, found: list[float]) -> dict[str, float | None]:
    """Median and largest."""
    return {
        f"median_{name}": statistics.median(found) if found else None, f"largest_{name}": max(found, default=None),
    }  # fmt: skip


def own_cache(fast: Any, request: Request, fed: list[int], steps: int, room: int) -> list[Tensor]:
    """Logits of an ordinary cache of planes that reads the prompt and is fed the same tokens; it has so many times the
    room, and kernels cut their work by that."""
    cache, ids, found = fast.lamp.cache(room * request.tokens), request.prompt[None], []
    cache.unpadded = True
    for step in range(steps):
        found.append(forward(fast, ids.to(fast.device), cache)[0].float().cpu())
        ids = torch.tensor([fed[step : step + 1]])
    return found


def difference(got: Tensor, wanted: Tensor) -> float:
    """Root mean square over the spread of what was wanted."""
    return float((got - wanted).square().mean().sqrt() / wanted.std().clamp_min(1e-9))
