"""What the CPU benchmark is held to, and the largest agreement there can be said of so many positions."""

from __future__ import annotations

from typing import Any

import _cpu_model
from _planes import Case

NEVER_BELOW = 0.95


def targets(
    rows: list[dict[str, Any]], real: list[dict[str, Any]], prefill: list[dict[str, Any]], model: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The project's targets on a CPU, each with what was measured; nothing measured is nothing met."""
    step = {row["case"]: row for row in rows if row["name"] == "lamp" and "ms" in row and "failed" not in row}
    whole = {(row["case"], row["name"]): row for row in model if "ms" in row}
    found: list[dict[str, Any]] = []

    def check(text: str, measured: float | None, limit: float, at_most: bool = False) -> None:
        met = measured is not None and (measured <= limit if at_most else measured >= limit)
        found.append({"target": text, "measured": measured, "limit": limit, "met": met})

    for length, limit in ((16384, 2.5), (4096, 2.0), (512, 1.0)):
        check(f"1x{length}: times the better SDPA", step.get(f"1x{length}", {}).get("ratio_to_sdpa"), limit)
    check("1x16384: share of the measured bandwidth", step.get("1x16384", {}).get("bandwidth_share"), 0.6)
    errors = {row["name"]: row["error"] for row in real}
    share = errors["lamp"] / errors["fp8"] if {"lamp", "fp8"} <= set(errors) and errors["fp8"] else None
    check("error on real data over that of fp8", share, 1.0, True)

    prompts = [row["ratio_to_sdpa"] for row in prefill if "ratio_to_sdpa" in row]
    check("prefill of any length: times SDPA", min(prompts, default=None), NEVER_BELOW)

    def ratio(case: str, name: str) -> float | None:
        value: float | None = whole.get((case, name), {}).get("ratio_to_compiled")
        return value

    check("1x4096, int8 linears: times compiled float32", ratio("1x4096", "lamp_linears"), 2.0)
    check("1x4096: times compiled float32", ratio("1x4096", "lamp"), 1.3)
    ours = [row for (_, name), row in whole.items() if name in ("lamp", "lamp_linears")]
    slowest = [row["ratio_to_compiled"] for row in ours if row.get("ratio_to_compiled")]
    check("any length: times compiled float32", min(slowest, default=None), NEVER_BELOW)
    for name in ("lamp", "lamp_linears"):
        known = _cpu_model.agreement(model, name)
        check(f"{name}: agreement with the original", known and known["agreement"], 0.99)
    check("KV memory over float32's", max((row["kv_share_of_fp32"] for row in ours), default=None), 0.27, True)
    check("KV memory over bf16's", max((row["kv_share_of_bf16"] for row in ours), default=None), 0.52, True)
    stops = [row["graph_breaks"] + row["recompiles"] for row in ours]
    check("graph breaks and recompilations", max(stops, default=None), 0, True)
    return found


def break_even(rows: list[dict[str, Any]]) -> int | None:
    """Cached tokens (batch times length) from which on no measured case is slower than the better SDPA."""
    found = None
    timed = [row for row in rows if row["name"] == "lamp" and row.get("ratio_to_sdpa")]
    for row in sorted(timed, key=lambda row: -Case.parse(row["case"]).tokens):
        if row["ratio_to_sdpa"] < 1:
            break
        found = Case.parse(row["case"]).tokens
    return found


def report(data: dict[str, Any]) -> None:
    """Agreement, break-even and targets as printed last."""
    for item in data.get("agreement", []):
        said = f"{item['agreement']:.2%} ({item['low']:.2%} to {item['high']:.2%}) of {item['positions']} positions"
        print(f"{item['name']} writes the original's token at {said}")
    print(f"attention: never slower than the better SDPA from {data.get('break_even')} cached tokens on")
    for item in data.get("targets", []):
        measured = "not measured" if item["measured"] is None else f"{item['measured']:.3g}"
        print(f"{'met   ' if item['met'] else 'MISSED'} {item['target']}: {measured} (limit {item['limit']:g})")
