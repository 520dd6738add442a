"""What a compiled transformers model carries: its plan, its settings, its caches, its controller, its report."""

from __future__ import annotations

import copy
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import CacheError, ModelError, OptionError
from lamp_compile.frontends import linears
from lamp_compile.frontends.huggingface import supervise
from lamp_compile.frontends.huggingface.control import Control
from lamp_compile.frontends.huggingface.many import ManyPrompts, sizes_for, stop_tokens, streams_of
from lamp_compile.frontends.huggingface.notes import notes_for
from lamp_compile.frontends.huggingface.sampling import Sampling
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.frontends.huggingface.slots import make_slots, why_masked
from lamp_compile.frontends.huggingface.statistics import RunStatistics, collect
from lamp_compile.ir import Refusal
from lamp_compile.plan import Plan
from lamp_compile.report import Report, SiteSummary
from lamp_compile.runtime import formats, kernels, layout
from lamp_compile.runtime.controller_thread import StepClock
from lamp_compile.runtime.controls import Controls
from lamp_compile.runtime.growable_layer import rounded_capacity
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache, reset_layers
from lamp_compile.runtime.slot_cache import SlotCache


class Lamp:
    """The ``lamp`` attribute of a compiled model: its plan, its hot settings, its caches, its report.

    Attributes:
        plan: What was decided, one row per site.
        controls: tau, floor level and budget of every site; ``controls.set(tau=0.02)`` acts from the next step on.
        spec: What a cache of this model is made of.
        original: The model without LAMP, around the same weights.
        mode: How decoding runs: "eager", "default" or "reduce-overhead".
        backend: The torch.compile backend of the decode step; None in eager mode.
        controller: The precision controller that was started last; None before the first.
        clock: Times of decode steps, for the controller.
        supervisor: Runs shadow steps, and steps again whose floor rose.
    """

    def __init__(
        self, plan: Plan, controls: Controls, spec: CacheSpec, original: nn.Module,
        sites: tuple[ProbedSite, ...], refusals: tuple[Refusal, ...], mode: str,
    ) -> None:  # fmt: skip
        self.plan, self.controls, self.spec, self.original, self.mode = plan, controls, spec, original, mode
        self.backend: Any = None
        self.compile_config: Any = None
        self._sites, self._refusals = sites, refusals
        self._warned: set[str] = set()
        self._idle: list[list[Any]] = []
        self._model: Callable[[], Any] = lambda: None
        self.controller: Control | None = None
        self.clock = StepClock()
        self.supervisor = supervise.Supervisor(plan, spec.ledger)

    def __deepcopy__(self, memo: dict[int, Any]) -> Lamp:
        """Copies of a compiled model share plan and settings, as they could share a cache; not the weights."""
        made = copy.copy(self)
        owner = self._model()
        made._model = weakref.ref(memo.get(id(owner), owner)) if owner is not None else self._model
        made.original = copy.deepcopy(self.original, memo)
        made._idle = []
        made.controller, made.clock = None, StepClock()
        return made

    def control(self, target: ControlPlan | None = None, **options: Any) -> Control:
        """Start the precision controller: a thread that adjusts tau of each layer to hold a target.

        Args:
            target: What to hold; or name its fields:
            **options: ``quality=0.99``, ``error_budget=0.05``, ``speed=30``, ``refined=0.1`` ... (``ControlPlan``).

        Returns:
            The controller, at work. ``with fast.lamp.control(...):`` stops it at the end and puts tau back.

        Raises:
            OptionError: An unknown option, ``memory``, a contradiction with the guard, or a controller is at work.
            PlanError: An impossible value, or targets that contradict each other.
        """
        if self.controller is not None and self.controller.running:
            raise OptionError("a controller is at work", where="control", fix="fast.lamp.controller.stop() first")
        if target is not None and options:
            raise OptionError(f"{next(iter(options))!r} next to a target", where="control", fix="one of the two")
        asked = ControlPlan.of(options) if target is None else target
        made = Control(asked, self.controls, self.spec, self.clock)
        made.start()
        weakref.finalize(self, made.thread.signal).atexit = False
        self.controller = made
        return made

    def statistics(self) -> RunStatistics:
        """Counters of everything that happened, by site and reason; shadow steps; the controller. Waits for the
        device."""
        shadow = self.supervisor.tally if self.supervisor.schedule.share else None
        return collect(self.spec.ledger, self.controls, shadow, self.controller)

    def tokens_for(self, memory: float, batch: int = 1) -> int:
        """Tokens of each of ``batch`` sequences whose keys and values fit into so many bytes, as caches are allocated.

        Raises:
            OptionError: Not even one step of a cache's capacity fits, or the numbers are impossible.
        """
        size = sum(self._bytes_per_token(site) for site in self._sites) * batch
        room = int(memory / size) if size > 0 and 0 < memory < float("inf") else 0
        held = bisect_right(range(0, room + 1, layout.TILE), room, key=rounded_capacity) - 1
        if held < 1:
            raise OptionError(
                f"{memory:g} bytes for {batch} sequences", where="tokens_for", fix=f"{size * layout.TILE:.0f} or more"
            )
        return held * layout.TILE

    def _bytes_per_token(self, site: ProbedSite) -> float:
        layer = self.spec.layers[site.layer]
        if layer is None:
            return site.kv_heads * (site.head_dim + site.value_dim) * site.dtype.itemsize
        sizes = ((layer.plan.k_format, site.head_dim), (layer.plan.v_format, site.value_dim))
        return site.kv_heads * sum(dim * formats.get(name).bits_per_value(dim) for name, dim in sizes) / 8

    def cache(self, capacity: int = layout.TILE) -> NestedCache:
        """A fresh cache for this model; it grows when it must.

        Args:
            capacity: Tokens to make room for at once.

        Raises:
            OptionError: ``capacity`` is no whole number above 0.
        """
        if type(capacity) is not int or capacity < 1:
            raise OptionError(f"capacity={capacity!r}", where="cache", fix="a number of tokens above 0")
        return NestedCache(self.spec, capacity)

    def slots(self, streams: int = 16, tokens: int = 65536, max_length: int | None = None) -> SlotCache:
        """A cache for many sequences of different lengths, which come and go while one decode step serves them all.

        Args:
            streams: Sequences at a time, the batch of the decode step.
            tokens: Tokens there is room for in all of them together.
            max_length: Longest sequence; None takes what the model is made for.

        Raises:
            CacheError: A layer keeps float keys and values or needs a mask of its own, memory is short, or rows would
                be stored by operations that a CUDA graph cannot hold.
            OptionError: A size is no whole number above 0.
        """
        formats = {(row.k_format, row.v_format) for row in self.plan.sites if row.apply}
        if self.mode == "reduce-overhead" and formats - {(kernels.FORMAT, kernels.FORMAT)}:
            raise CacheError(
                f"slots under mode 'reduce-overhead' store {kernels.FORMAT} only",
                where="fast.lamp.slots",
                fix="mode='default' or 'eager', or nested8 for keys and values",
            )
        return make_slots(self.original.config, self.spec, self._sites, streams, tokens, max_length)

    def generate_many(
        self, prompts: Iterable[Any], *, max_new_tokens: int | Sequence[int], streams: int = 16,
        cache: SlotCache | None = None, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None,
        eos_token_id: int | Sequence[int] | str | None = "model",
    ) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
        """Generate for many prompts of different lengths; a slot that finishes takes the next prompt at once.

        A prompt is let in when pages for its longest possible end are free. Its result does not depend on what else is
        in the batch.

        Args:
            prompts: Lists of token ids, or 1-D tensors.
            max_new_tokens: For all, or one number for each prompt.
            streams: Sequences at a time, where no cache is given.
            cache: Slots to use, all free (``fast.lamp.slots(...)``); None makes them large enough for the longest
                prompts.
            temperature: 0 takes the likeliest token, otherwise tokens are drawn.
            top_p: Draw among the likeliest tokens that have this probability together.
            seed: Of the draws; a prompt's tokens depend on it and on the prompt's index only. None takes one from
                torch's global generator.
            eos_token_id: Ends a sequence; "model" takes the generation config's, None goes on to ``max_new_tokens``.

        Returns:
            An iterator over (index of the prompt, prompt and new tokens ``[n + new]`` on the CPU), in the order they
            finish.

        Raises:
            InputError, OptionError: A prompt or a setting is impossible; at once.
            CacheError: A prompt does not fit the cache, another model's cache, or a slot of it is taken; at once.
        """
        model = self._model()
        refuse_training(model)
        sampling, eos = Sampling(temperature, top_p), stop_tokens(model, eos_token_id)
        waiting = streams_of(prompts, max_new_tokens, int(torch.randint(2**31, ())) if seed is None else seed)
        if not waiting:
            return iter(())
        if cache is None:
            cache = self.slots(*sizes_for(waiting, streams))
        cache.check(self.spec)
        drop_foreign_step(model)
        step = model if self.compile_config is None else model.get_compiled_call(self.compile_config)
        return ManyPrompts(model, step, cache, sampling, eos).run(waiting)

    def borrow(self, capacity: int, batch: int) -> NestedCache:
        """A cache for one ``generate``. Under CUDA graphs its planes are those of the last one that nobody holds any
        more: a captured graph is bound to addresses, and at new ones it is recorded anew.

        Args:
            capacity: Tokens to make room for.
            batch: Sequences.
        """
        if self.mode != "reduce-overhead":
            return self.cache(capacity)
        try:
            layers = self._idle.pop()
        except IndexError:  # none, or another thread took it
            layers = []
        room = rounded_capacity(capacity)
        if layers and all((layer.batch_size, layer.max_cache_len) == (batch, room) for layer in layers):
            reset_layers(layers, self.spec.ledger)
            cache = NestedCache(self.spec, capacity, layers)
        else:
            cache = self.cache(capacity)
        weakref.finalize(cache, _take_back, self._idle, cache.layers).atexit = False
        return cache

    def maskless(self, config: Any) -> bool:
        """Whether attention of this model needs no mask where nothing is padded."""
        planes = all(layer is not None for layer in self.spec.layers)
        text = config.get_text_config(decoder=True)  # takes its time, and this is asked at every generate
        return planes and all(why_masked(site, text) is None for site in self._sites if not site.reason)

    @property
    def sites(self) -> tuple[ProbedSite, ...]:
        """What the probe saw of each site."""
        return self._sites

    def release(self) -> None:
        """Free the planes kept for the next ``generate``."""
        self._idle.clear()

    def report(self) -> Report:
        """What was found in the model and what was done with it."""
        rewritten = {layer.plan.name for layer in self.spec.layers if layer is not None}
        graphs = [report for report in getattr(self.backend, "reports", ()) if report.before]
        return Report(
            sites=tuple(summary(site) for site in self._sites),
            refusals=self._refusals,
            unclaimed=(),
            plan=self.plan,
            rewritten=tuple(site.name for site in self._sites if site.name in rewritten),
            backend=f"transformers generate, {self.mode}",
            notes=(
                *self.statistics().notes(),
                *notes_for(self.spec, self._sites, getattr(self.backend, "reports", ())),
                *linears.notes(self._model(), self.mode),
            ),
            before=graphs[0].before if graphs else "",
            after=graphs[0].after if graphs else "",
        )

    def warn_once(self, what: str) -> None:
        """Say, once per model and reason, that LAMP is off for a call."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{what}: LAMP is off for this call (said once)", UserWarning, stacklevel=4)

    def say(self, what: str) -> None:
        """Say something once per model."""
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f"{what} (said once)", UserWarning, stacklevel=5)

    def step(self, step: Callable[[], Any], eager: Callable[[], Any], cache: NestedCache, tokens: int) -> Any:
        """Run one forward over a cache with everything around it that the plan asks for.

        Args:
            step: The forward.
            eager: The same outside any graph.
            cache: What it adds to.
            tokens: New tokens of each sequence.
        """
        if self.controller is not None and not supervise.inside():
            if (said := self.controller.check()) is not None:
                warnings.warn(said, UserWarning, stacklevel=5)
            self.clock.tick() if tokens == 1 else self.clock.pause()
        return self.supervisor.run(step, eager, cache, self.say)


def _take_back(idle: list[list[Any]], layers: list[Any]) -> None:
    idle[:] = [layers]


def drop_foreign_step(model: Any) -> None:
    """The compiled decode step that a deep copy brings runs the other's weights."""
    if model._lamp_identity != id(model):
        model.__dict__.pop("_compiled_call", None)
        model._lamp_identity = id(model)


def refuse_training(model: nn.Module) -> None:
    if model.training:
        raise ModelError(
            "the model is in training mode", where=type(model).__name__, fix="model.eval(): LAMP is for inference"
        )


def summary(site: ProbedSite) -> SiteSummary:
    """The site as a report lists it."""
    return SiteSummary(
        site.name, "huggingface", site.heads, site.kv_heads, site.head_dim, site.value_dim,
        str(site.dtype).removeprefix("torch."), site.features,
    )  # fmt: skip
