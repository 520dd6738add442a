"""What a trained model's own queries, keys and values give: shares of refined sub-tiles per layer, and errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _planes import STORE, TILE, Attention, Inputs
from _rivals import exact, rounded_fp8
from torch import Tensor, nn

from lamp_compile.frontends.huggingface import attention
from lamp_compile.plan import SitePlan
from lamp_compile.quality import load
from lamp_compile.runtime import guard

Rounding = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values ``[G, N, D]`` as a format keeps them, in float32."""
_tau = SitePlan("*").tau
TAU = _tau if isinstance(_tau, float) else _tau[0]
"""Of the default plan."""


@dataclass
class Heads:
    """Query ``[H, N, D]``, keys and values ``[G, N, D]`` of one layer, in bf16."""

    q: Tensor
    k: Tensor
    v: Tensor


def capture(model: Any, ids: Tensor) -> list[Heads]:
    """What the attention of every layer receives when the model reads ``ids`` ``[N]``."""
    found: list[Heads] = []

    def keep(module: nn.Module, q: Tensor, k: Any, v: Any, arguments: dict[str, Any]) -> None:
        found.append(Heads(q[0].bfloat16(), k[0].bfloat16(), v[0].bfloat16()))

    before = model.config._attn_implementation
    model.config._attn_implementation = attention.NAME
    try:
        with torch.no_grad(), attention.observing(keep):
            model(input_ids=ids[None], use_cache=False)
    finally:
        model.config._attn_implementation = before
    return found


def decoding(heads: Heads, count: int) -> Inputs:
    """``count`` decode steps over one text as a batch: each sequence is the text up to its own position."""
    keys = heads.k.shape[1] // TILE * TILE
    lengths = torch.linspace(keys / count, keys, count, device=heads.k.device).round().long()
    lengths = (lengths - torch.arange(count, device=lengths.device) % TILE).clamp_min(1)  # the newest tile is part full
    made = torch.ops.lamp.quantize(
        heads.k[None, :, :keys], heads.v[None, :, :keys], None, **STORE, tile=TILE, site="benchmark"
    )
    planes = tuple(p.expand(count, *p.shape[1:]).contiguous() for p in made)
    q = heads.q[:, lengths - 1].transpose(0, 1)[:, :, None].contiguous()
    return Inputs(q, heads.k[None, :, :keys], heads.v[None, :, :keys], planes, lengths)


def layer(heads: Heads, count: int, rounded: Mapping[str, Rounding], tau: float = TAU) -> dict[str, Any]:
    """Share refined at tau, and the relative errors of every output row."""
    inputs = decoding(heads, count)
    lamp = Attention(inputs, tau=tau)
    outs: dict[str, Tensor] = {"lamp": lamp(inputs)[:, :, 0]}
    counts = lamp.stats.sum((0, 1)).tolist()
    k, v = inputs.k[0], inputs.v[0]
    kept = {name: rounding(k, v) for name, rounding in rounded.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in (*kept, "bf16", "exact")}
    for q, length in zip(inputs.q, inputs.lengths.tolist(), strict=True):
        wide = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None, :, :length], v[None, :, :length], enable_gqa=True
        )
        rows["bf16"].append(wide[0, :, 0])
        for name, (keys, values) in kept.items():
            rows[name].append(exact(q[:, 0], keys[:, :length], values[:, :length]))
        rows["exact"].append(exact(q[:, 0], k[:, :length], v[:, :length]))
    outs |= {name: torch.stack(parts) for name, parts in rows.items()}
    wanted = outs.pop("exact")
    errors = {n: ((o.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).flatten().tolist() for n, o in outs.items()}
    return {"refined": counts[guard.REFINED], "live": counts[guard.LIVE], "errors": errors}


def measure(
    model: Any, windows: Tensor, count: int, rounded: Mapping[str, Rounding] | None = None, tau: float = TAU
) -> dict[str, Any]:  # fmt: skip
    """Shares of every layer, and median and mean error over all layers and windows: of lamp, of bf16, and of keys and
    values ``rounded`` in other ways."""
    rounded = rounded or {"fp8": rounded_fp8}
    names = ("lamp", *rounded, "bf16")
    found: list[list[dict[str, Any]]] = []
    for ids in windows:
        found.append([layer(heads, count, rounded, tau) for heads in capture(model, ids)])
    shares, layers = [], []
    for index, of_layer in enumerate(zip(*found, strict=True)):
        share = sum(one["refined"] for one in of_layer) / max(1, sum(one["live"] for one in of_layer))
        errors = {name: [e for one in of_layer for e in one["errors"][name]] for name in names}
        shares.append(share)
        medians = {f"{name}_median": statistics.median(values) for name, values in errors.items()}
        layers.append({"layer": index, "refined_share": share, **medians})
    rows = []
    for name in names:
        values = [e for window in found for one in window for e in one["errors"][name]]
        row = {"case": f"real {windows.shape[1]}", "name": name, "error": statistics.median(values)}
        rows.append({**row, "error_mean": statistics.fmean(values), "outputs": len(values)})
    rows[0]["refined_share"] = statistics.fmean(shares)
    return {"rows": rows, "layers": layers, "shares": shares}


def measure_folder(
    folder: str | Path, text: str | Path, context: int, windows: int, count: int, device: torch.device,
    rounded: Mapping[str, Rounding] | None = None, tau: float = TAU,
) -> dict[str, Any]:  # fmt: skip
    """The same for a model folder and a text."""
    model = load.load_model(folder, device=device)
    picked = load.load_windows(model, folder, text, context, windows).to(device)
    return measure(model, picked, count, rounded, tau)


def parse_shares(text: str) -> list[float]:
    """Of ``"0.03,0.1"``; ValueError where a number is no share."""
    shares = [float(part) for part in text.split(",")]
    if not all(0.0 <= share <= 1.0 for share in shares):
        raise ValueError(text)
    return shares
