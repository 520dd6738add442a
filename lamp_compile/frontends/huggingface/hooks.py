"""The hooks on a compiled transformers model: forward, generate, the choice of cache, the compiled step.

They are bound to the one instance; no class is patched.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import nn

from lamp_compile.errors import InputError, ModelError
from lamp_compile.frontends import switch
from lamp_compile.frontends.huggingface.compiled import Lamp, drop_foreign_step, refuse_training
from lamp_compile.frontends.huggingface.slots import positions_for
from lamp_compile.runtime import cache_argument
from lamp_compile.runtime.kv_cache import NestedCache
from lamp_compile.runtime.slot_cache import SlotView

_unpadded: ContextVar[list[NestedCache]] = ContextVar("lamp_unpadded")
"""Caches of the running ``generate`` that need no mask."""


def attach(model: nn.Module, lamp: Lamp) -> None:
    """Bind the hooks to the model.

    Raises:
        ModelError: Its forward takes no cache.
    """
    hooked: Any = model
    name = cache_argument.name_for(model)
    parameters = list(inspect.signature(model.forward).parameters)
    if name not in parameters:
        raise ModelError(
            "its forward takes no cache by name",
            where=type(model).__name__,
            fix="torch.compile(model, backend='lamp') for its prefill",
        )
    made = (_forward(model, name, parameters), _generate(hooked), _get_compiled_call(hooked, name))
    lamp._model = weakref.ref(model)
    hooked.lamp = lamp
    hooked._lamp_identity = id(model)
    hooked.forward, hooked.generate, hooked.get_compiled_call = (MethodType(hook, model) for hook in made)
    hooked._prepare_cache_for_generation = MethodType(_prepare_cache_for_generation, model)


def _forward(model: nn.Module, name: str, parameters: list[str]) -> Callable[..., Any]:
    """Forward with the cache it was given, or one of ours. ``parameters`` are the original's, the cache's ``name`` one
    of them."""
    position = parameters.index(name)
    bound = "forward" in model.__dict__
    call = model.forward if bound else type(model).forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling and switch.disabled():
            return self.lamp.original.forward(*args, **kwargs)
        kwargs = cache_argument.renamed(kwargs, name)
        given = args[position] if len(args) > position else kwargs.get(name)
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
            kwargs[name] = made
        whole = args if bound else (self, *args)
        cache = given if made is None else made
        if compiling or not isinstance(cache, NestedCache):
            if compiling and self.lamp.supervisor.active and not self.lamp.supervisor.running:
                _say_unsupervised(self.lamp)
            return call(*whole, **kwargs)
        run = functools.partial(call, *whole, **kwargs)
        return self.lamp.step(run, run, cache, _new_tokens(args, kwargs))

    return forward


def _generate(model: Any) -> Callable[..., Any]:
    @functools.wraps(model.generate.__func__)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if switch.disabled():
            return self.lamp.original.generate(*args, **kwargs)
        refuse_training(self)
        drop_foreign_step(self)
        kwargs = cache_argument.renamed(kwargs, cache_argument.NAME)
        self.lamp.clock.pause()
        token = _unpadded.set([])
        try:
            return type(self).generate(self, *args, **kwargs)
        finally:
            for cache in _unpadded.get():
                cache.unpadded = False  # whoever goes on with it may pad
            _unpadded.reset(token)

    return generate


def _get_compiled_call(model: Any, name: str) -> Callable[..., Any]:
    @functools.wraps(model.get_compiled_call.__func__)
    def get_compiled_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = type(self).get_compiled_call(self, *args, **kwargs)

        def step(*inputs: Any, **named: Any) -> Any:
            run = functools.partial(compiled, *inputs, **named)
            cache = named.get(name)
            if not isinstance(cache, NestedCache):
                return run()
            return self.lamp.step(run, functools.partial(self, *inputs, **named), cache, _new_tokens(inputs, named))

        return step

    return get_compiled_call


def _refuse_weights(model: Any, kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if model.config.output_attentions if asked is None else asked:
        raise InputError(
            "attention weights were asked for (output_attentions=True), and none are formed",
            where=type(model).__name__,
            fix="lamp_compile.disable() around the call, with a model of eager attention",
        )


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    return 0 if ids is None else int(ids.shape[1])


def _uses_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("use_cache")
    return bool(model.config.get_text_config(decoder=True).use_cache if asked is None else asked)


def _cache_for_forward(model: Any, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NestedCache | None:
    """Check the cache of an eager call, or make the one it lacks."""
    refuse_training(model)
    _refuse_weights(model, kwargs)
    lamp: Lamp = model.lamp
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    if isinstance(given, NestedCache):
        given.check(lamp.spec, None if ids is None else int(ids.shape[0]))
        return None
    if given is not None:
        lamp.warn_once(f"{cache_argument.NAME} is a {type(given).__name__}")
        return None
    if not _uses_cache(model, kwargs):
        lamp.warn_once("use_cache is False")
        return None
    return lamp.cache(max(1, int(ids.shape[1]))) if ids is not None else None


# In a user's own torch.compile a graph break makes the cache; with fullgraph=True Dynamo raises and gives the reason.
_cache_outside_the_graph: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _cache_for_forward, reason=f"a compiled call without a cache: pass {cache_argument.NAME}=fast.lamp.cache(tokens)"
)


_say_unsupervised: Any = torch.compiler.disable(  # type: ignore[no-untyped-call]
    lambda lamp: lamp.say(
        "a step in a graph of your own: no shadow step, no retry; generate and generate_many do both"
    ),
    reason="the plan asks for shadow steps or retries, which a graph of your own does not do",
)
"""As above: a graph break that warns, or an error with fullgraph=True."""


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
    given = model_kwargs.get(cache_argument.NAME)
    rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    ours = isinstance(given, NestedCache)
    if isinstance(given, NestedCache):
        given.check(lamp.spec, rows)
        given.ensure_capacity(max_cache_length)
    elif given is not None:
        lamp.warn_once(f"{cache_argument.NAME} is a {type(given).__name__}")
    elif generation_config.cache_implementation is not None:
        lamp.warn_once(f"cache_implementation is {generation_config.cache_implementation!r}")
    elif generation_config.use_cache is not False:
        model_kwargs[cache_argument.NAME] = lamp.borrow(max_cache_length, rows)
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
    cache, padding = model_kwargs[cache_argument.NAME], model_kwargs.get("attention_mask")
    if not isinstance(cache, NestedCache) or isinstance(cache, SlotView) or not lamp.maskless(model.config):
        return
    if any(model_kwargs.get(name) is not None for name in PATTERNS):
        return
    cache.unpadded = padding is None or (padding.dim() == 2 and bool((padding != 0).all()))
    if cache.unpadded:
        _unpadded.get([]).append(cache)
