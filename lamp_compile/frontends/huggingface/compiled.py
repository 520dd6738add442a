"""What a compiled transformers model carries, and the three hooks on it: forward, generate and the choice of cache.

The hooks are bound to the one instance; no class is patched.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import CacheError, InputError, ModelError
from lamp_compile.frontends import linears, switch
from lamp_compile.frontends.huggingface.many import ManyPrompts, sizes_for, stop_tokens, streams_of
from lamp_compile.frontends.huggingface.notes import notes_for
from lamp_compile.frontends.huggingface.sampling import Sampling
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.frontends.huggingface.slots import make_slots, positions_for, why_masked
from lamp_compile.ir import Refusal
from lamp_compile.plan import Plan
from lamp_compile.report import Report, SiteSummary
from lamp_compile.runtime import kernels, layout
from lamp_compile.runtime.controls import Controls
from lamp_compile.runtime.growable_layer import rounded_capacity
from lamp_compile.runtime.kv_cache import CacheSpec, NestedCache
from lamp_compile.runtime.slot_cache import SlotCache, SlotView


class Lamp:
    """The ``lamp`` attribute of a compiled model: its plan, its hot settings, its caches, its report.

    Attributes:
        plan: What was decided, one row per site.
        controls: tau, floor level and budget of every site; ``controls.set(tau=0.02)`` acts from the next step on.
        spec: What a cache of this model is made of.
        original: The model without LAMP, around the same weights.
        mode: How decoding runs: "eager", "default" or "reduce-overhead".
        backend: The torch.compile backend of the decode step; None in eager mode.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> Lamp:
        """Copies of a compiled model share plan and settings, as they could share a cache; not the weights."""
        made = copy.copy(self)
        owner = self._model()
        made._model = weakref.ref(memo.get(id(owner), owner)) if owner is not None else self._model
        made.original = copy.deepcopy(self.original, memo)
        made._idle = []
        return made

    def cache(self, capacity: int = layout.TILE) -> NestedCache:
        """A fresh cache for this model; it grows when it must.

        Args:
            capacity: Tokens to make room for at once.
        """
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
        _refuse_training(model)
        sampling, eos = Sampling(temperature, top_p), stop_tokens(model, eos_token_id)
        waiting = streams_of(prompts, max_new_tokens, int(torch.randint(2**31, ())) if seed is None else seed)
        if not waiting:
            return iter(())
        if cache is None:
            cache = self.slots(*sizes_for(waiting, streams))
        cache.check(self.spec)
        _drop_foreign_step(model)
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
            for layer in layers:
                layer.reset()
            cache = NestedCache(self.spec, capacity, layers)
        else:
            cache = self.cache(capacity)
        weakref.finalize(cache, _take_back, self._idle, cache.layers).atexit = False
        return cache

    def maskless(self, config: Any) -> bool:
        """Whether attention of this model needs no mask where nothing is padded."""
        planes = all(layer is not None for layer in self.spec.layers)
        return planes and all(why_masked(site, config) is None for site in self._sites if not site.reason)

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


def _take_back(idle: list[list[Any]], layers: list[Any]) -> None:
    idle[:] = [layers]


_unpadded: ContextVar[list[NestedCache]] = ContextVar("lamp_unpadded")
"""Caches of the running ``generate`` that need no mask."""


def attach(model: nn.Module, lamp: Lamp) -> None:
    """Bind the hooks to the model."""
    hooked: Any = model
    base = model.forward
    bound = "forward" in model.__dict__
    parameters = list(inspect.signature(base).parameters)
    position = parameters.index("past_key_values")
    call = base if bound else type(model).forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and switch.disabled():
            return self.lamp.original.forward(*args, **kwargs)
        given = args[position] if len(args) > position else kwargs.get("past_key_values")
        made = None
        if not compiling:
            made = _cache_for_forward(self, given, args, kwargs)
        elif given is None and _uses_cache(self, kwargs):
            made = _cache_outside_the_graph(self, given, args, kwargs)
        if isinstance(given, SlotView):
            positions_for(given, parameters, args, kwargs)
        if made is not None and len(args) > position:
            args = (*args[:position], made, *args[position + 1 :])
        elif made is not None:
            kwargs["past_key_values"] = made
        return call(*(args if bound else (self, *args)), **kwargs)

    @functools.wraps(hooked.generate.__func__)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if switch.disabled():
            return self.lamp.original.generate(*args, **kwargs)
        _refuse_training(self)
        _drop_foreign_step(self)
        token = _unpadded.set([])
        try:
            return type(self).generate(self, *args, **kwargs)
        finally:
            for cache in _unpadded.get():
                cache.unpadded = False  # whoever goes on with it may pad
            _unpadded.reset(token)

    lamp._model = weakref.ref(model)
    hooked.lamp = lamp
    hooked._lamp_identity = id(model)
    hooked.forward = MethodType(forward, model)
    hooked.generate = MethodType(generate, model)
    hooked._prepare_cache_for_generation = MethodType(_prepare_cache_for_generation, model)


def _drop_foreign_step(model: Any) -> None:
    """The compiled decode step that a deep copy brings runs the other's weights."""
    if model._lamp_identity != id(model):
        model.__dict__.pop("_compiled_call", None)
        model._lamp_identity = id(model)


def _refuse_training(model: nn.Module) -> None:
    if model.training:
        raise ModelError(
            "the model is in training mode", where=type(model).__name__, fix="model.eval(): LAMP is for inference"
        )


def _refuse_weights(model: Any, kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if model.config.output_attentions if asked is None else asked:
        raise InputError(
            "attention weights were asked for (output_attentions=True), and none are formed",
            where=type(model).__name__,
            fix="lamp_compile.disable() around the call, with a model of eager attention",
        )


def _uses_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    return bool(model.config.get_text_config(decoder=True).use_cache if asked is None else asked)


def _cache_for_forward(model: Any, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NestedCache | None:
    """Check the cache of an eager call, or make the one it lacks."""
    _refuse_training(model)
    _refuse_weights(model, kwargs)
    lamp: Lamp = model.lamp
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if isinstance(given, NestedCache):
        given.check(lamp.spec, None if ids is None else int(ids.shape[0]))
        return None
    if given is not None:
        lamp.warn_once(f"past_key_values is a {type(given).__name__}")
        return None
    if not _uses_cache(model, kwargs):
        lamp.warn_once("use_cache is False")
        return None
    return lamp.cache(int(ids.shape[1])) if ids is not None else None


# In a user's own torch.compile a graph break makes the cache; with fullgraph=True Dynamo raises and gives the reason.
_cache_outside_the_graph: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _cache_for_forward, reason="a compiled call without a cache: pass past_key_values=fast.lamp.cache(tokens)"
)


def _prepare_cache_for_generation(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """transformers' hook: supply or check the cache, and name the backend that compiles decoding."""
    lamp: Lamp = self.lamp
    given = model_kwargs.get("past_key_values")
    rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    ours = isinstance(given, NestedCache)
    if isinstance(given, NestedCache):
        given.check(lamp.spec, rows)
        given.ensure_capacity(max_cache_length)
    elif given is not None:
        lamp.warn_once(f"past_key_values is a {type(given).__name__}")
    elif generation_config.cache_implementation is not None:
        lamp.warn_once(f"cache_implementation is {generation_config.cache_implementation!r}")
    elif generation_config.use_cache is not False:
        model_kwargs["past_key_values"] = lamp.borrow(max_cache_length, rows)
        ours = True
    if ours:
        _leave_out_masks(self, model_kwargs)
    if ours and generation_config.compile_config is None:
        generation_config.compile_config = lamp.compile_config
        generation_config.disable_compile = lamp.compile_config is None or bool(generation_config.disable_compile)
    if ours and given is None:
        return None
    return type(self)._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )


PATTERNS = ("token_type_ids", "mm_token_type_ids", "block_sequence_ids")
"""Inputs from which models make masks of their own."""


def _leave_out_masks(model: Any, model_kwargs: dict[str, Any]) -> None:
    """Without padding, and without patterns of the model's own, length, causality and window say what may be seen: then
    neither ``[B, 1, S, keys]`` masks are made for a prompt nor ``[B, 1, 1, keys]`` at every step."""
    lamp: Lamp = model.lamp
    cache, padding = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    if not isinstance(cache, NestedCache) or isinstance(cache, SlotView) or not lamp.maskless(model.config):
        return
    if any(model_kwargs.get(name) is not None for name in PATTERNS):
        return
    cache.unpadded = padding is None or (padding.dim() == 2 and bool((padding != 0).all()))
    if cache.unpadded:
        _unpadded.get([]).append(cache)


def summary(site: ProbedSite) -> SiteSummary:
    """The site as a report lists it."""
    return SiteSummary(
        site.name, "huggingface", site.heads, site.kv_heads, site.head_dim, site.value_dim,
        str(site.dtype).removeprefix("torch."), site.features,
    )  # fmt: skip
