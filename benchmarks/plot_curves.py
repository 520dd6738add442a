"""Draw the curves of `lamp_curves.py` as SVG, for the docs. Needs matplotlib.

python benchmarks/plot_curves.py benchmarks/results/<date>-lamp_curves-<device>.json --out docs/images
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

LABELS = {
    "energy": "energy (default)",
    "lamp_strict": "LAMP strict",
    "lamp_relaxed": "LAMP relaxed",
    "mass": "top-p (LAMP v1)",
    "random_tiles": "random",
    "static_tiles": "first and newest",
}
STYLE = {"svg.hashsalt": "lamp", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    args = parser.parse_args(argv)
    data = json.loads(args.results.read_text(encoding="utf-8"))
    args.out.mkdir(parents=True, exist_ok=True)
    rows, edges = data["rows"], {row["name"]: row["kl"] for row in data["edges"]}
    panels = [
        ("single keys, of every query head", chosen(rows, unit=1, own=True)),
        ("single keys, shared by a group", chosen(rows, unit=1, own=False)),
        ("tiles of 32 keys, shared by a group", chosen(rows, unit=32, own=False)),
    ]
    with mpl.rc_context(STYLE):
        draw(args.out / "curves_rules.svg", panels, "rule", edges)
        units = [
            (LABELS[rule], [row for row in chosen(rows, own=False) if row["rule"] == rule])
            for rule in ("energy", "lamp_strict", "mass")
        ]
        draw(args.out / "curves_units.svg", units, "unit", edges)
        twins = [
            ("single keys", chosen(rows, unit=1, own=False, twin=True)),
            ("tiles of 32 keys", chosen(rows, unit=32, own=False, twin=True)),
        ]
        draw(args.out / "curves_twin.svg", twins, "rule", edges)
    return 0


def chosen(
    rows: Iterable[dict[str, Any]], *, own: bool, unit: int | None = None, twin: bool = False
) -> list[dict[str, Any]]:
    """Points of one model, and of one unit where it is named."""
    return [r for r in rows if r["own"] == own and bool(r["twin"]) == twin and unit in (None, r["unit"])]


def draw(path: Path, panels: list[tuple[str, list[dict[str, Any]]]], by: str, edges: dict[str, float]) -> None:
    """One figure: KL above, flips below, a panel a column, a curve for each value of ``by``."""
    figure, axes = plt.subplots(2, len(panels), figsize=(3.4 * len(panels), 5.6), sharex=True, sharey="row")
    for column, (title, rows) in enumerate(panels):
        for axis, field in zip(axes[:, column], ("kl", "flips"), strict=True):
            for value in dict.fromkeys(row[by] for row in rows):
                curve = sorted((100 * r["refined_share"], r[field]) for r in rows if r[by] == value)
                x, y = zip(*curve, strict=True)
                label = LABELS[value] if by == "rule" else f"{value} key" + ("s" if value > 1 else "")
                axis.plot(x, [100 * v for v in y] if field == "flips" else y, "o-", ms=3, lw=1.2, label=label)
            axis.set_xscale("log")
            axis.set_yscale("log")
        for name, words in (("all_low", "high plane only"), ("all_high", "both planes")):
            axes[0, column].axhline(edges[name], color="gray", lw=0.8, ls=":")
            axes[0, column].annotate(words, (0.02, edges[name]), xycoords=("axes fraction", "data"), fontsize=7)
        for which in (axes[1, column].yaxis, axes[1, column].xaxis):
            which.set_major_formatter("{x:g}")
            which.set_minor_formatter("")
        axes[1, column].set_yticks([0.5, 1, 2, 5])
        axes[0, column].set_title(title, fontsize=9)
        axes[1, column].set_xlabel("refined share of live keys, %")
    axes[0, 0].set_ylabel("KL, nats")
    axes[1, 0].set_ylabel("flipped tokens, %")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
