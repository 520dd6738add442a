"""The prefill of a CPU benchmark: a prompt's keys and values stored and attended by all of its tokens, against SDPA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _planes import STORE, Shape
from torch import Tensor

from lamp_compile.runtime import fused_ops, guard, kernels, layout, prompt

SDPA = torch.nn.functional.scaled_dot_product_attention
TAU, SHARPNESS = 0.01, 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD = f"{'prompt':10s} {'name':18s} {'ms':>8s} {'x SDPA':>7s} {'refined':>8s}  error"


def rows(length: int, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Both dtypes at one prompt length: ``sdpa`` by its faster call, ``lamp`` as append and attention together. Inputs
    are normal numbers, so most sub-tiles of short prompts matter: lamp refines more here than of text."""
    found: list[dict[str, Any]] = []
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        q = torch.randn(1, shape.kv_heads * shape.group, length, shape.dim) * SHARPNESS
        k, v = (torch.randn(1, shape.kv_heads, length, shape.dim) for _ in range(2))
        wanted = SDPA(*(x.double() for x in (q, k, v)), is_causal=True, enable_gqa=True)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        repeated = [x.repeat_interleave(shape.group, dim=1) for x in (k, v)]
        stats = guard.new_stats(1, shape.kv_heads)
        calls: dict[str, Callable[[], Tensor]] = {
            "enable_gqa": lambda qkv=(q, k, v): SDPA(*qkv, is_causal=True, enable_gqa=True),
            "repeated heads": lambda qkv=(q, *repeated): SDPA(*qkv, is_causal=True),
            "lamp": _lamp(q, k, v, stats),
        }
        times: dict[str, list[float]] = {call: [] for call in calls}
        errors = {call: float((run().double() - wanted).norm() / wanted.norm()) for call, run in calls.items()}
        for _ in range(rounds):
            for call, run in calls.items():
                began = time.perf_counter()
                run()
                times[call].append(time.perf_counter() - began)
        took = {call: 1e3 * statistics.median(seconds) for call, seconds in times.items()}
        sdpa = min(("enable_gqa", "repeated heads"), key=took.__getitem__)
        live = float(stats[..., guard.LIVE].sum())
        share = float(stats[..., guard.REFINED].sum()) / live if live else None  # None: no plane was read
        case = f"1x{length}"
        found.append({"case": case, "name": f"sdpa_{name}", "ms": took[sdpa], "how": sdpa, "error": errors[sdpa]})
        ratio = took[sdpa] / took["lamp"]
        found.append({"case": case, "name": f"lamp_{name}", "ms": took["lamp"], "ratio_to_sdpa": ratio,
                      "refined_share": share, "error": errors["lamp"]})  # fmt: skip
    return found


def _lamp(q: Tensor, k: Tensor, v: Tensor, stats: Tensor) -> Callable[[], Tensor]:
    kv_heads, length, dim = k.shape[1:]
    pages, tile = layout.tiles_for(length, layout.SUBTILE), layout.SUBTILE
    lead = (1, kv_heads, pages)
    lanes = kernels.cpu.by_lanes() and layout.lanes_fit(tile, dim // 2, dim // 2)
    keys = [torch.zeros(*lead, *layout.key_shape(tile, dim // 2, lanes), dtype=torch.uint8) for _ in range(2)]
    values = [torch.zeros(*lead, *layout.value_shape(tile, dim // 2, lanes), dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(1, kv_heads, pages * tile, dtype=torch.float16) for _ in range(2)]
    planes = (*keys, scales[0], *values, scales[1])
    start = torch.zeros(1, dtype=torch.int64)
    hot = (torch.full((kv_heads,), TAU), torch.zeros(kv_heads), torch.full((kv_heads,), torch.inf))
    options = dict(causal="bottom_right", window=0, scale=None, softcap=0.0, keys=length, rule="energy", query_bits=8,
                   subtile=32, guard_window=16, guard_hold=64, hysteresis=0.5, site="", **STORE)  # fmt: skip
    settings = fused_ops.settings(options)
    as_they_came = length >= prompt.least_rows(k.device)  # as a layer has it

    def run() -> Tensor:
        torch.ops.lamp.append.default(k, v, *planes, None, start, None, *STORE.values(), "")
        if as_they_came:
            found = prompt.attend(q, k, v, None, None, options)
            assert isinstance(found, Tensor), found
            return found
        state = guard.new_state(1, kv_heads)
        none = (None,) * 7
        out: Tensor = torch.ops.lamp.fused_attention.default(q, *planes, *hot, state, stats, *none, *settings)
        return out

    return run


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    ratio = f"{row['ratio_to_sdpa']:7.2f}" if "ratio_to_sdpa" in row else " " * 7
    share = f"{row['refined_share']:8.1%}" if row.get("refined_share") is not None else " " * 8
    return (
        f"{row['case']:10s} {row['name']:18s} {row['ms']:8.1f} {ratio} {share}  {row['error']:.2e} {row.get('how', '')}"
    )
