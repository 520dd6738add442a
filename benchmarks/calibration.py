"""Calibrated plans against the presets, at the bits that each preset reads, on held-out text.

    python benchmarks/calibration.py MODEL TEXT --context 1024 --max-tokens 32768 --device cuda --out results.json

Runs `lamp-compile calibrate` for every preset; they share what was measured of single sites. With ``--plans FOLDER``
the plans are kept there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import _script

from lamp_compile import cli
from lamp_compile.plan import PRESETS
from lamp_compile.quality.environment import environment, write_json


def result(device: dict[str, Any], reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The file's content, from what `lamp-compile calibrate --json` printed for each preset."""
    first = next(iter(reports.values()))
    about = {name: first[name] for name in ("model", "text", "windows", "context", "tokens", "held_out_tokens")}
    dropped = {*about, *device, "plan", "lamp_compile"}
    rows = [
        {"name": preset, **{name: value for name, value in report.items() if name not in dropped}}
        for preset, report in reports.items()
    ]
    return {**device, **about, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--context", default="1024")
    parser.add_argument("--max-tokens", default="16384")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plans", type=Path, help="keep the plans in this folder")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    reports: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.plans or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for preset in PRESETS:
            printed = io.StringIO()
            command = ["calibrate", args.model, "--text", args.text, "--device", args.device, "--preset", preset]
            command += ["--context", args.context, "--max-tokens", args.max_tokens, "--json"]
            command += ["-o", str(folder / f"{preset}.json"), "--measurements", f"{scratch}/measured.json"]
            with contextlib.redirect_stdout(printed):
                code = cli.main(command)
            if code:
                return code
            reports[preset] = json.loads(printed.getvalue())
            held = reports[preset]["held_out"]
            sides = ", ".join(f"{side} {held[side]['kl']:.2e}" for side in ("preset", "uniform", "calibrated"))
            print(f"{preset}: KL on held-out text: {sides}; {reports[preset]['calibration']}", flush=True)
    if args.out:
        write_json(args.out, result(environment(args.device), reports))
    return 0


if __name__ == "__main__":
    _script.run(main)
