"""The same queue served in bf16 by what transformers has: padded batches over a static cache, and its paged cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import _models
import torch
import torch.nn.functional as F
from _requests import Batch, Clock, Request, Served, batches, spread
from _timing import release
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "benchmark_packed"
PREFILL_TOKENS = 32768
"""Tokens of a padded prefill that are run at once."""
WARM_STEPS = 6
PAGE = 256
PAGED_BATCH_TOKENS = 2048
NO_TOKEN = -1


def packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **rest: Any
) -> tuple[Tensor, None]:
    """SDPA that does not repeat the kv heads for one new token: the queries of a group become rows of one head."""
    batch, heads, rows, dim = query.shape
    if rows != 1:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **rest)
        return out, None
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(PACKED, packed)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def kv_bytes_per_token(config: Any) -> int:
    """Of keys and values in bf16."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * int(config.num_hidden_layers * config.num_key_value_heads * dim)


def most_tokens(model: Any) -> float:
    """Tokens of a static cache that leave room for weights, activations and a repeated layer."""
    if model.device.type != "cuda":
        return math.inf
    total = torch.cuda.get_device_properties(model.device).total_memory
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return float((0.85 * total - weights) / 1.3 / kv_bytes_per_token(model.config))


def serve_static(model: Any, requests: Sequence[Request], setup: Any, clock: Clock, attention: str) -> Served:
    """Batches of similar prompt length, shortest first; each shape is warmed outside the clock, and no batch waits for
    a token on the host before it is through."""
    plan = batches(requests, setup.streams, most_tokens(model), setup.graphs)
    made, sizes = Served(kv_bytes=0, kv_tokens=0), []
    with _models.attention(model, attention):
        for shape in sorted({(batch.capacity, batch.rows) for batch in plan}):
            if clock.seconds > setup.row_seconds:
                break
            torch._dynamo.reset()
            release(model.device)
            capacity, rows = shape
            cache = StaticCache(config=model.config, max_cache_len=capacity)
            forward = _models.compiled(model, setup.mode, CompileConfig(mode=setup.mode, dynamic=False))
            group = [batch for batch in plan if (batch.capacity, batch.rows) == shape]
            run_batch(model, forward, cache, warm(group[0]), Served(), Clock(model.device, setup.energy), WARM_STEPS)
            for batch in group:
                if clock.seconds <= setup.row_seconds:
                    run_batch(model, forward, cache, batch, made, clock)
            held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
            made.kv_bytes, made.kv_tokens = max(made.kv_bytes or 0, held), max(made.kv_tokens or 0, rows * capacity)
            sizes.append(f"{len(group)} of {rows}x{capacity}")
            del cache, forward
    made.extra = {"refills": 0, "batches": sizes, "attention": attention}
    return made


def warm(batch: Batch) -> Batch:
    """The same shape, with prompts that are read in one piece."""
    most = prefill_columns(batch.rows)
    return Batch([Request(r.index, r.prompt[:most], r.new) for r in batch.requests], batch.rows, batch.capacity)


def prefill_columns(rows: int) -> int:
    """Tokens of each row that a padded prefill reads at once."""
    return max(16, PREFILL_TOKENS // rows)


@torch.no_grad()
def run_batch(
    model: Any, forward: Callable[..., Any], cache: Any, batch: Batch, made: Served, clock: Clock,
    most: int | None = None,
) -> None:  # fmt: skip
    """Prefill and decode one batch; rows without a request hold one token and idle."""
    device, requests, width = model.device, batch.requests, batch.width
    new = batch.new if most is None else min(batch.new, most)
    for layer in cache.layers:
        if layer.is_initialized:
            layer.cumulative_length.zero_()
    clock.start()
    began = clock.seconds
    start = time.perf_counter()
    ids = torch.zeros(batch.rows, width, dtype=torch.long)
    mask = torch.zeros(batch.rows, batch.capacity, dtype=torch.long)
    mask[:, width - 1] = 1
    for row, request in enumerate(requests):
        ids[row, width - request.length :] = request.prompt
        mask[row, width - request.length : width] = 1
    ids, mask = ids.to(device), mask.to(device)
    tokens = torch.empty(batch.rows, new, dtype=torch.long, device=device)
    tokens[:, 0] = token = prefill(model, cache, ids, mask, batch.rows)
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = began + time.perf_counter() - start
    position = mask.sum(-1)
    for step in range(1, new):
        mask[:, width + step - 1] = 1
        out = forward(
            input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache,
            use_cache=True, logits_to_keep=1, return_dict=True,
        )  # fmt: skip
        tokens[:, step] = token = out.logits[:, -1].argmax(-1)
        position = position + 1
    rows = tokens.tolist()
    clock.stop()
    for row, request in zip(rows, requests, strict=False):
        made.tokens[request.index] = row[: request.new]
        made.first[request.index], made.admitted[request.index] = first, began
        made.busy += min(new, request.new) - 1
    made.steps += new - 1
    made.slot_steps += (new - 1) * batch.rows


def prefill(model: Any, cache: Any, ids: Tensor, mask: Tensor, rows: int) -> Tensor:
    """First new token ``[B]``; the padded prompts ``[B, n]`` go in by columns, as many as memory likes."""
    width, columns = ids.shape[1], prefill_columns(rows)
    positions = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)
    out = None
    for begin in range(0, width, columns):
        part = slice(begin, min(width, begin + columns))
        out = model(
            input_ids=ids[:, part], attention_mask=mask, position_ids=positions[:, part], past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
    assert out is not None
    token: Tensor = out.logits[:, -1].argmax(-1)
    return token


def serve_paged(model: Any, requests: Sequence[Request], setup: Any, clock: Clock) -> Served:
    """transformers' continuous batching, with the pool of tokens and the number of requests at a time that lamp has.

    Raises:
        RuntimeError: A request failed, or its thread ended early.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    config = ContinuousBatchingConfig(
        max_requests_per_batch=setup.streams, num_blocks=math.ceil(setup.pool / PAGE) + setup.streams,
        max_batch_tokens=PAGED_BATCH_TOKENS, allow_block_sharing=False,
    )  # fmt: skip
    longest_prompt, longest_answer = max(r.length for r in requests), max(r.new for r in requests)
    generation = GenerationConfig(max_new_tokens=longest_answer, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0)
    hints = WorkloadHints(longest_prompt, longest_answer, len(requests))
    before, made = model.config._attn_implementation, Served()
    try:
        with model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config, timeout=60, workload_hints=hints
        ) as manager:
            collect(manager, spread(requests, 2), 4, time.perf_counter() + setup.row_seconds)
            made.kv_bytes, made.kv_tokens = paged_bytes(manager), config.num_blocks * PAGE
            made.extra = {"attention": model.config._attn_implementation, "refills": None}
            clock.start()
            began = time.perf_counter()
            results = collect(manager, requests, None, began + setup.row_seconds)
            clock.stop()
            if len(results) < len(requests):
                with suppress(Exception):
                    manager.stop(block=True, timeout=60, hard_stop=True)
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    for index, result in results.items():
        made.tokens[index] = list(result.generated_tokens)
        if result.timestamps:
            made.first[index] = result.timestamps[0] - began
    return made


def collect(manager: Any, requests: Sequence[Request], most: int | None, until: float) -> dict[int, Any]:
    """Queue the requests and wait for them; those that are through by a moment of ``time.perf_counter``."""
    found: dict[int, Any] = {}
    names = {f"{'warm' if most else 'r'}{request.index}": request for request in requests}
    for name, request in names.items():
        manager.add_request(
            request.prompt.tolist(), request_id=name, max_new_tokens=min(most or request.new, request.new),
            record_timestamps=True, eos_token_id=NO_TOKEN,
        )  # fmt: skip
    while len(found) < len(requests) and time.perf_counter() < until:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the thread of continuous batching ended early")
        elif result.error is not None:
            raise RuntimeError(f"continuous batching failed a request: {str(result.error)[:300]}")
        elif result.is_finished():
            found[names[result.request_id].index] = result
    return found


def paged_bytes(manager: Any) -> int | None:
    """Of its keys and values, where they lie as in the releases looked at."""
    cache = getattr(manager.batch_processor, "cache", None)
    held = {}
    for name in ("key_cache", "value_cache"):
        for tensor in getattr(cache, name, None) or ():
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(held.values()) or None


def graphs() -> dict[str, int]:
    """What has been compiled, and what was not captured."""
    return {
        "graphs": int(counters["stats"]["unique_graphs"]),
        "cudagraph_skips": int(counters["inductor"]["cudagraph_skips"]),
        "graph_breaks": sum(counters["graph_break"].values()),
    }
