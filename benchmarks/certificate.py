"""How the error certificate compares with the true error, on real text: coverage and over-estimate per layer.

    python benchmarks/certificate.py MODEL TEXT --windows 2 --context 4096 --device cuda --out results.json

Every attention of an uncompiled transformers decoder is computed twice, exactly in float64 and as lamp does it
(nested8, energy rule), on the same q, k and v; the model goes on with the exact result. A row is covered when the true
error of the output row is at most FACTOR times the certificate's estimate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lamp_compile.errors import LampError
from lamp_compile.quality import load
from lamp_compile.quality.environment import environment, write_json
from lamp_compile.runtime import certificate, layout, reference
from lamp_compile.runtime.arguments import Scores, Visibility

FACTOR = 4.0
"""Multiple of the estimate within which the true error is claimed to lie."""
SETTINGS = {"all_low": 1e30, "default": 0.01, "all_high": 0.0}
"""tau of the energy rule per row of the table."""


class Meter:
    """An attention function for transformers that keeps the ratio estimate / true error of every row."""

    def __init__(self) -> None:
        self.ratios: dict[tuple[str, int], list[Tensor]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        visible = Visibility(key.shape[2], causal="top_left")
        exact, _lse = reference.exact_attention(query, key, value, visible, scaling)
        planes = reference.quantize(key, value, None, "nested8", "nested8", "hadamard", layout.TILE)
        scores = Scores(scaling, rotation="hadamard", query_bits=8)
        importance = reference.look_ahead(
            query, planes.k_high, planes.k_scale, None, visible, scores, "nested8", "energy", layout.SUBTILE
        )
        floor = torch.zeros(key.shape[1], device=key.device)
        for name, tau in SETTINGS.items():
            levels = reference.select(importance, torch.full_like(floor, tau), floor, None, None, False)
            out, _lse, rows = reference.attend(
                query, planes, levels, None, None, visible, scores, "nested8", "nested8", layout.SUBTILE
            )
            error = (out.double() - exact).norm(dim=-1)
            ratio = certificate.estimate(out, rows).double() / error
            self.ratios.setdefault((name, module.layer_idx), []).append(ratio.flatten().cpu())
        return exact.to(query.dtype).transpose(1, 2).contiguous(), None

    def rows(self) -> list[dict[str, Any]]:
        """Per setting: all layers together, then each."""
        made = []
        for name in SETTINGS:
            layers = {layer: torch.cat(parts) for (n, layer), parts in self.ratios.items() if n == name}
            made.append(_row(name, "all", torch.cat(list(layers.values()))))
            made += [_row(name, layer, ratios) for layer, ratios in layers.items()]
        return made


def _row(name: str, layer: object, ratios: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "layer": layer,
        "rows": ratios.numel(),
        "coverage": float((ratios * FACTOR >= 1).double().mean()),
        "median_overestimate": float(ratios.median()),
        "smallest_ratio": float(ratios.min()),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    model = load.load_model(args.model, device=args.device)
    picked = load.load_windows(model, args.model, args.text, args.context, args.windows)
    meter = Meter()
    AttentionInterface.register("lamp_certificate", meter)
    model.config._attn_implementation = "lamp_certificate"
    with torch.no_grad():
        for window in picked:
            model(input_ids=window[None].to(args.device), use_cache=False)
    rows = meter.rows()
    print(f"{'setting':10s} {'layer':>5s} {'rows':>8s} {'within x' + f'{FACTOR:g}':>10s} {'median':>8s} {'least':>8s}")
    for row in rows:
        print(
            f"{row['name']:10s} {row['layer']!s:>5s} {row['rows']:8d} {row['coverage']:10.4%} "
            f"{row['median_overestimate']:8.2f} {row['smallest_ratio']:8.3f}"
        )
    if args.out:
        data = {
            **environment(args.device),
            "factor": FACTOR,
            "windows": args.windows,
            "context": args.context,
            "rows": rows,
        }
        write_json(args.out, data)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LampError as error:
        sys.exit(f"error: {error}")
