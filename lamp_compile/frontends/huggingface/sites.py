"""Finding the attention sites of a transformers decoder by running it once on random tokens and looking on.

One forward shows what no configuration says reliably: which modules call the attention function, with which heads,
sizes and arguments, and whether what the cache stores is what attention receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lamp_compile.errors import ModelError
from lamp_compile.frontends.huggingface.attention import observing
from lamp_compile.ir import Refusal
from lamp_compile.runtime import cache_argument
from lamp_compile.runtime.cache_layers import LayerShape
from lamp_compile.runtime.rotation import HEAD_DIMS

PROBE_TOKENS = 128
PROBE_SEED = 0
CALIBRATION = f"probe: {PROBE_TOKENS} random tokens, seed {PROBE_SEED}"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ProbedSite:
    """One attention module as seen in the probe."""

    name: str
    module: nn.Module
    layer: int
    """Index of its cache layer."""
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    features: tuple[str, ...]
    reason: str
    """Why LAMP leaves it alone; empty if it does not."""
    query_rms: Tensor
    """Per channel ``[G, D]``, over tokens and the query heads of the group."""
    key_rms: Tensor
    """Per channel ``[G, D]``."""

    @property
    def key(self) -> tuple[str, int, int, int, int]:
        """What the plan's fingerprint is made of."""
        return (self.name, self.heads, self.kv_heads, self.head_dim, self.value_dim)

    @property
    def shape(self) -> LayerShape:
        """What its cache layer holds."""
        return LayerShape(self.kv_heads, self.head_dim, self.value_dim, self.dtype, self.device)


class _ProbeCache(DynamicCache):  # type: ignore[misc]
    """Remembers what each layer's update gave back."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        given = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.given[layer_idx] = given
        return given


def probe(model: nn.Module) -> tuple[tuple[ProbedSite, ...], tuple[Refusal, ...]]:
    """Run the model (whose attention name is ``"lamp"``) once; gives back its sites in the order they run, and
    refusals.

    Raises:
        ModelError: It has a cache that is more than keys and values, or its forward does not run on token ids alone.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    cache = _ProbeCache(text)
    for index, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ModelError(
                f"layer {index} keeps a {type(layer).__name__}, which is more than keys and values",
                where=type(model).__name__,
                fix="torch.compile(model, backend='lamp') for its prefill",
            )
    paths = {id(module): name for name, module in model.named_modules()}
    sites: list[ProbedSite] = []

    def observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        index = getattr(module, "layer_idx", None)
        given = cache.given.get(index) if isinstance(index, int) else None
        reason = _why_not(query, key, value, given, arguments)
        sites.append(
            ProbedSite(
                name=paths.get(id(module), f"{type(module).__name__}#{len(sites)}"),
                module=module,
                layer=-1 if index is None else index,
                heads=query.shape[1],
                kv_heads=key.shape[1],
                head_dim=query.shape[3],
                value_dim=value.shape[3],
                dtype=query.dtype,
                device=query.device,
                features=_features(arguments),
                reason=reason,
                query_rms=_rms(_by_kv_head(query, key.shape[1])),
                key_rms=_rms(key),
            )
        )

    _run(model, cache, observe)
    refusals = tuple(Refusal(site.name, site.reason, pattern="huggingface") for site in sites if site.reason)
    return tuple(sites), refusals


def probe_ids(model: nn.Module) -> Tensor:
    """The probe's random tokens ``[1, n]``, without touching the global random state."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = min(int(text.vocab_size), int(embedding.weight.shape[0]))
    tokens = min(PROBE_TOKENS, int(getattr(text, "max_position_embeddings", None) or PROBE_TOKENS))
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(vocabulary, (1, tokens), generator=generator).to(embedding.weight.device)


def _run(model: nn.Module, cache: _ProbeCache, observe: Any) -> None:
    """One forward of random tokens."""
    ids = probe_ids(model)
    try:
        with torch.no_grad(), observing(observe):
            model(input_ids=ids, **cache_argument.given(model, cache), use_cache=True)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise ModelError(
            f"its forward does not run on token ids alone: {type(error).__name__}: {error}",
            where=type(model).__name__,
            fix="torch.compile(model, backend='lamp')",
        ) from error


def _same(given: Tensor, seen: Tensor) -> bool:
    return given.data_ptr() == seen.data_ptr() and given.shape == seen.shape and given.stride() == seen.stride()


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, given: Sequence[Tensor] | None, arguments: dict[str, Any]
) -> str:
    if given is None:
        return "its keys and values do not come from a cache layer of its own"
    if not (_same(given[0], key) and _same(given[1], value)):
        return (
            f"what the cache stores ({list(given[0].shape)}, {list(given[1].shape)}) is not what attention receives "
            f"({list(key.shape)}, {list(value.shape)}): a latent cache, or keys changed after the cache"
        )
    if query.shape[2] != key.shape[2]:
        return "cross attention: as many keys as another sequence has"
    if arguments.get("position_bias") is not None:
        return "it adds a position bias, which the cached operator does not take"
    if arguments.get("output_attentions"):
        return "it is asked for the attention weights"
    for dim in (query.shape[3], value.shape[3]):
        if dim not in HEAD_DIMS:
            return f"head_dim {dim} is not among {', '.join(map(str, HEAD_DIMS))}"
    if query.dtype not in DTYPES:
        return f"{query.dtype} is not among float32, bfloat16, float16"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads do not share {key.shape[1]} kv heads evenly"
    return ""


def _features(arguments: dict[str, Any]) -> tuple[str, ...]:
    found = ["cache", "mask" if arguments.get("mask") is not None else "causal"]
    if arguments.get("sliding_window"):
        found.append(f"window {arguments['sliding_window']}")
    if arguments.get("softcap"):
        found.append(f"softcap {arguments['softcap']:g}")
    if arguments.get("s_aux") is not None:
        found.append("sinks")
    return tuple(found)


def _by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """``[1, H, n, D]`` -> ``[1, G, H/G * n, D]``; alone where the heads cannot be shared out (refused anyway)."""
    groups = kv_heads if query.shape[1] % kv_heads == 0 else 1
    return query.reshape(1, groups, -1, query.shape[-1])


def _rms(x: Tensor) -> Tensor:
    """``[1, G, n, D]`` -> ``[G, D]`` in float32 on the CPU."""
    return x.float().square().mean((0, 2)).sqrt().cpu()
