"""The parts of docs/quality.md that come after the targets: presets, calibration, fragile keys, certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PRESETS = """
## Presets

From `benchmarks/results/{file}`, on {device}, torch {torch}: {windows} windows of {context} tokens, {positions}
positions. To repeat it: `python benchmarks/presets.py MODEL TEXT --windows {windows} --context {context} --device
{kind}`. Intervals are 95 %. `conservative` keeps the last layer in 16 bits; the row below the presets is the same tau
without that.

| setting | bits | KL | next-token agreement |
|---|---|---|---|
"""
CALIBRATION = """
## Calibration

From `benchmarks/results/{file}`, on {device}, torch {torch}: `lamp-compile calibrate` of the model `{model}` on
{tokens} tokens in windows of {context}, half of them held out, which the numbers are of. *Uniform* is one tau for all
layers, with the text's balance. *difference* is calibrated minus uniform on the same positions: only where its
interval leaves out 0 is the calibrated tau taken.

| preset | bits | KL preset | KL uniform | bits | KL calibrated | difference (95 %) | taken |
|---|---|---|---|---|---|---|---|
"""
FRAGILE = """
## Fragile keys

From `benchmarks/results/{file}`, on {device}, torch {torch} (`python benchmarks/fragile_keys.py MODEL TEXT --layers
1,4`): key biases of {bias:g} times the median channel in the slowest RoPE pair of every kv head of {sites} layers,
keys there times {scale:g} and queries divided by it. Scaling is exact; the bias is approximate, and changed the
function by a KL of {change:.1e}. Calibration names {found} of the {planted} planted channels. Each row is held
against its own uncompiled model.

| model and plan | bits | KL | next-token agreement | layers balanced |
|---|---|---|---|---|
"""
CERTIFICATE = """
## Certificate

From `benchmarks/results/{file}`, on {device}, torch {torch}: output rows of windows of {context} tokens ({windows}
for each model), spread over all lengths. *Within {factor:g}x* is the share of rows whose true error is at most
{factor:g} times the estimate (lower end of its 95 % interval in brackets); *estimate / error* is the median,
*least* the smallest. The worst-case bound was held against {bounded} rows: {violated} violate it, and it is
{bound:.0f} times the error in the median under the plan.

| setting | model | layer | keys seen | rows | within {factor:g}x | estimate / error | least |
|---|---|---|---|---|---|---|---|
"""


def parts(results: Path) -> str:
    """Everything there is a result for."""
    made = (
        (("presets"), _presets),
        ("calibration", _calibration),
        ("fragile", _fragile),
        ("certificate", _certificate),
    )
    return "".join(write(*found) for name, write in made if (found := _latest(results, name)))


def _latest(results: Path, name: str) -> tuple[str, dict[str, Any]] | None:
    paths = sorted(results.glob(f"*-{name}-*.json"))
    return (paths[-1].name, json.loads(paths[-1].read_text(encoding="utf-8"))) if paths else None


def _head(file: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"file": file, "device": data["device"], "torch": data["versions"]["torch"]}


def _agreement(row: dict[str, Any]) -> str:
    return f"{row['agreement']:.2%} ({row['agreement_low']:.2%} to {row['agreement_high']:.2%})"


def _kl(row: dict[str, Any]) -> str:
    return f"{row['kl']:.2e} ± {row['kl_half_interval']:.1e}"


def _presets(file: str, data: dict[str, Any]) -> str:
    kind = "cpu" if data["device"].startswith("cpu") else "cuda"
    about = {name: data[name] for name in ("windows", "context")}
    text = PRESETS.format(**_head(file, data), **about, kind=kind, positions=f"{data['rows'][0]['positions']:,}")
    for row in data["rows"]:
        text += f"| {row['name']} | {row['bits']:.2f} | {_kl(row)} | {_agreement(row)} |\n"
    text += "\n| target: agreement of | limit | measured | |\n|---|---|---|---|\n"
    for item in data["targets"]:
        word = "met" if item["met"] else "missed"
        text += f"| {item['target']} | {item['limit']:.1%} | {item['measured']:.2%} | {word} |\n"
    return text


def _calibration(file: str, data: dict[str, Any]) -> str:
    text = CALIBRATION.format(
        **_head(file, data), model=data["model"], tokens=f"{data['tokens']:,}", context=data["context"]
    )
    for row in data["rows"]:
        held = row["held_out"]
        preset, uniform, calibrated = (held[name] for name in ("preset", "uniform", "calibrated"))
        text += (
            f"| {row['name']} | {preset['bits_per_value']:.2f} | {_kl(preset)} | {_kl(uniform)} | "
            f"{calibrated['bits_per_value']:.2f} | {_kl(calibrated)} | "
            f"{held['kl_difference']:+.1e} ± {held['kl_difference_half_interval']:.1e} | "
            f"{'yes' if held['better'] else 'no'} |\n"
        )
    text += (
        "\nWhat each layer costs alone, in KL, balanced as the text asks; and how the sum of what was chosen held:\n\n"
    )
    sensitivity = data["rows"][0]["sensitivity"]
    taus = [option["tau"] for option in next(iter(sensitivity.values())) if option["tau"] >= 0]
    text += f"| layer | {' | '.join(f'tau {tau:g}' for tau in sorted(taus))} |\n|---{'|---' * len(taus)}|\n"
    for name, options in sensitivity.items():
        costs = {option["tau"]: option["kl"] for option in options}
        text += f"| `{name}` | {' | '.join(f'{costs[tau]:.1e}' for tau in sorted(taus))} |\n"
    text += "\n| preset | sum of each alone | measured together |\n|---|---|---|\n"
    for row in data["rows"]:
        text += f"| {row['name']} | {row['predicted_kl']:.2e} | {row['measured_kl']:.2e} |\n"
    return text


def _fragile(file: str, data: dict[str, Any]) -> str:
    planted = {
        (site, head, channel)
        for site, heads in data["planted"]["channels"].items()
        for head, channels in enumerate(heads)
        for channel in channels
    }
    found = {(key["site"], key["head"], key["channel"]) for key in data["fragile"]["planted"]}
    text = FRAGILE.format(
        **_head(file, data), bias=data["planted"]["bias"], scale=data["planted"]["scale"],
        sites=len(data["planted"]["sites"]), change=data["function_change"]["kl"], found=len(found & planted),
        planted=len(planted),
    )  # fmt: skip
    for row in data["rows"]:
        cells = (row["name"], f"{row['bits_per_value']:.2f}", _kl(row), _agreement(row), str(len(row["balanced"])))
        text += f"| {' | '.join(cells)} |\n"
    return text


def _certificate(file: str, data: dict[str, Any]) -> str:
    bounds = sorted(row["median_bound_over_error"] for row in data["worst_case"] if row["setting"] == "plan")
    text = CERTIFICATE.format(
        **_head(file, data), windows=data["windows"], context=data["context"], factor=data["factor"],
        bounded=f"{sum(row['rows'] for row in data['worst_case']):,}",
        violated=sum(row["violated"] for row in data["worst_case"]) or "none", bound=bounds[len(bounds) // 2],
    )  # fmt: skip
    for row in data["rows"]:
        if "all" not in (row["layer"], row["length"]) or (row["setting"] != "plan" and row["layer"] != row["length"]):
            continue
        text += (
            f"| {row['setting']} | {row['model']} | {row['layer']} | {row['length']} | {row['rows']:,} | "
            f"{row['coverage']:.3%} ({row['coverage_low']:.3%}) | {row['median_overestimate']:.2f} | "
            f"{row['least_ratio']:.2f} |\n"
        )
    return text
