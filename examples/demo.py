"""The demo: compile a real model, let it write, measure it, break it, and watch it fall back.

    python examples/demo.py --model examples/models/nano --text examples/data/walden.txt

Leaves plan.json (what was decided) and demo.json (everything printed, as data) in the folder it runs in. Exits 1 when
nothing was rewritten, when next-token agreement is below 98 %, when the KV cache is larger than claimed, or when the
guard does not catch the planted faults.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

import lamp_compile
from lamp_compile.errors import LampError
from lamp_compile.quality import load, rows, windows
from lamp_compile.quality.continuation import Continuation, compare, write
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.environment import cpp_compiler, environment
from lamp_compile.quality.evaluate import Evaluation, Row
from lamp_compile.report import Report
from lamp_compile.runtime import kernels
from lamp_compile.runtime.kernels import cpu

MIN_AGREEMENT = 0.98
PROMPT_TOKENS, NEW_TOKENS = 96, 32
WINDOWS, CONTEXT = 4, 1024
FP8 = {"k_format": "fp8", "v_format": "fp8", "rotation": "none", "query_bits": 0}


def section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def show_site(report: Report) -> None:
    """One site of the decode graph before and after the rewrite, with short names."""
    for title, text in (
        ("before: one operator in the place of the model's attention", report.before),
        ("after: the steps that it becomes (quantize, look_ahead, select, attend, guard)", report.after),
    ):
        print(f"{title}")
        for line in text.splitlines():
            short = re.sub(r"\b(l_|past_key_values_)\w*?layers_\d+_(spec_)?", "cache.", line)
            print(textwrap.fill(short, 116, initial_indent="  ", subsequent_indent="        "))


def show_continuations(tokenizer: Any, prompt: torch.Tensor, plain: Continuation, fast: Continuation) -> dict[str, Any]:
    """Both texts and where they part."""
    difference = compare(plain, fast)

    def text(ids: list[int]) -> str:
        return " ".join(str(tokenizer.decode(ids)).split())

    print(f"prompt      ...{text(prompt[0].tolist())[-160:]}")
    print(f"uncompiled  {text(plain.ids)}")
    print(f"LAMP        {text(fast.ids)}")
    if difference is None:
        print(f"the {len(plain.ids)} tokens are the same")
    else:
        print(
            f"first differing token: number {difference + 1} of {len(plain.ids)}, "
            f"{tokenizer.decode([plain.ids[difference]])!r} and {tokenizer.decode([fast.ids[difference]])!r}"
        )
    return {
        "uncompiled": text(plain.ids),
        "lamp": text(fast.ids),
        "tokens": len(plain.ids),
        "first_difference": difference,
    }


def quality(model: Any, picked: torch.Tensor) -> list[Row]:
    """16-bit KV, fp8 KV and LAMP, against the uncompiled model in float32."""
    evaluation = Evaluation(
        model, picked, lambda m, balance: CompiledEngine(lamp_compile.compile(m, mode="eager", balance=balance))
    )
    return evaluation.measure_all((rows.BF16, rows.FP8, rows.LAMP))


def show_table(measured: list[Row], speed: dict[str, float]) -> list[dict[str, Any]]:
    """The table, and it as data. A slow-down is called one."""
    names = {"bf16": "uncompiled (16-bit KV)", "fp8_kv": "fp8 KV", "lamp": "LAMP"}
    header = ("", "agreement (95 % interval)", "KL", "ppl ratio", "KV bytes", "tiles refined", "tokens/s")
    print("{:<24}{:>28}{:>10}{:>11}{:>12}{:>15}{:>10}".format(*header))
    table = []
    for row in measured:
        interval = f"{row.agreement:.2%} ({row.agreement_low:.2%}-{row.agreement_high:.2%})"
        refined = f"{row.refined_share:.1%}" if row.name == "lamp" else "-"
        print(
            f"{names[row.name]:<24}{interval:>28}{row.kl:>10.1e}{row.perplexity_ratio:>11.5f}{row.kv_bytes:>12,}"
            f"{refined:>15}{speed[row.name]:>10.1f}"
        )
        table.append({**row.to_dict(), "tokens_per_second": speed[row.name]})
    print("Quality is against the same model in float32; tokens/s are of generate(), prefill included, in float32.")
    lamp, plain = measured[-1], measured[0]
    ratio = speed["lamp"] / speed["bf16"]
    smaller = plain.kv_bytes / lamp.kv_bytes
    print(f"KV memory is {smaller:.2f}x smaller; a step reads {lamp.bits_per_value:.2f} bits a value")
    word = "a slow-down" if ratio < 1 else "a speed-up"
    slow = kernels.why_not_device("cpu")
    runs = f"the reference in plain torch: {slow}" if slow else f"CPU kernels, {cpu.instruction_set()}"
    print(f"Speed: {ratio:.2f} times the uncompiled model's tokens/s, {word} ({runs}).")
    return table


def planted_faults(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Teacher-forced decoding with two faults in it; prints what the guard makes of them, step by step.

    First the threshold is broken, so that nothing is refined any more: the error estimate exceeds the budget, and the
    floor level rises to both planes until the threshold is mended. Then a stored scale becomes NaN, which no precision
    can mend: it is flagged.
    """
    fast = lamp_compile.compile(model, mode="eager", guard_budget=0.1, guard_window=4, guard_hold=10)
    tau = fast.lamp.plan.sites[0].tau
    start, broken, mended, poisoned, end = 128, 5, 17, 36, 38
    cache = fast.lamp.cache(start + end)
    steps = []
    print("Floor: a layer's least precision. 0: the rule decides; 1: both planes everywhere; 2: exact where possible.")
    print("step  error estimate  floor per layer   tiles refined   KL of the step")
    with torch.no_grad():
        reference = model(ids[:, : start + end]).logits.log_softmax(-1)
        fast(ids[:, :start], cache=cache)
        before = counts(cache)
        for step in range(end):
            if step == broken:
                print("      -- fault: tau set to 1e30, so that no tile is ever refined by the rule")
                fast.lamp.controls.set(tau=1e30)
            elif step == mended:
                print("      -- mended: tau is back")
                fast.lamp.controls.set(tau=tau)
            elif step == poisoned:
                print("      -- fault: the scale of one stored value becomes NaN")
                cache.layers[0].v_scale[0, 0, start - 1] = torch.nan
            logits = fast(ids[:, start + step : start + step + 1], cache=cache).logits
            now = counts(cache)
            wanted = reference[0, start + step]
            kl = float((wanted.exp() * (wanted - logits[0, -1].log_softmax(-1))).sum())
            report = cache.guard_report()
            floor = [int(max(site["floor"])) for site in report]
            error = max(max(site["error"]) for site in report)
            share = (now[1] - before[1]) / max(1, now[0] - before[0])
            before = now
            steps.append({"step": step, "error": error, "floor": floor, "refined": share, "kl": kl})
            print(f"{step:4d}  {error:14.3f}  {' '.join(map(str, floor)):<16}  {share:13.1%}   {kl:.1e}")
    found = {
        "steps": steps,
        "raised": sum(site["raised"] for site in report),
        "lowered": sum(site["lowered"] for site in report),
        "bad_steps": sum(site["bad_steps"] for site in report),
        "flags": sorted({flag for site in report for flag in site["flags"]}),
        "fell_back": max(steps[broken - 1]["floor"]) == 0 and all(max(s["floor"]) for s in steps[mended - 3 : mended]),
        "recovered": max(steps[poisoned - 1]["floor"]) == 0,
    }
    print(f"floor raised {found['raised']} times, lowered {found['lowered']}; outputs not finite: {found['bad_steps']}")
    print(f"flags (they stay): {'; '.join(found['flags']) or 'none'}")
    return found


def counts(cache: Any) -> tuple[int, int]:
    """Live and refined sub-tiles so far, over all layers."""
    total = sum(layer.stats.sum((0, 1)) for layer in cache.layers if hasattr(layer, "stats"))
    return int(total[1]), int(total[2])


def complaints(report: Report, measured: list[Row], context: int, faults: dict[str, Any]) -> list[str]:
    """Everything that makes the demo fail."""
    found = []
    if not report.rewritten:
        found.append("no attention site was rewritten")
    lamp = next(row for row in measured if row.name == "lamp")
    if not lamp.agreement >= MIN_AGREEMENT:
        found.append(f"agreement is {lamp.agreement:.2%}, below {100 * MIN_AGREEMENT:g} %")
    values = sum(2 * site.kv_heads * site.head_dim for site in report.sites if site.name in report.rewritten) * context
    bits = 8 * lamp.kv_bytes / max(1, values)
    claim = 8 + 16 / min((site.head_dim for site in report.sites), default=64)
    if bits > claim:
        found.append(f"the KV cache takes {bits:.3f} bits a value, the claim is {claim:.3f}")
    if not faults["fell_back"] or not faults["recovered"]:
        found.append("the guard did not raise the floor for the broken threshold, or did not lower it afterwards")
    if not faults["bad_steps"] or not faults["flags"]:
        found.append("the NaN was not flagged")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/models/nano")
    parser.add_argument("--text", default="examples/data/walden.txt")
    parser.add_argument("--mode", choices=("auto", "eager", "default"), default="auto", help="how decoding runs")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for plan.json and demo.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began = time.perf_counter()
    if not sys.stderr.isatty():
        disable_progress_bar()
    model, tokenizer = load.load_model(args.model), load.load_tokenizer(args.model)
    ids = windows.token_ids(args.text, lambda t: tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"])
    longest = getattr(model.config, "max_position_embeddings", CONTEXT)
    context = 1 << (min(CONTEXT, longest, ids.numel()).bit_length() - 1)
    picked = windows.spread(ids, context, min(WINDOWS, 1 + (ids.numel() - context) // 64), where=args.text)
    mode = args.mode
    if mode == "auto" and cpp_compiler() is None:
        mode = "eager"
        print("There is no C++ compiler here, so decoding runs in eager mode instead of through Inductor.")

    section("What the compiler does")
    report = lamp_compile.explain(model)
    print(report.text())
    show_site(report)

    section(f"Both continue the text ({'eager' if mode == 'eager' else 'decode step compiled with Inductor'})")
    fast = lamp_compile.compile(model, mode=mode)
    args.out.mkdir(parents=True, exist_ok=True)
    fast.lamp.plan.save(args.out / "plan.json")
    prompt = ids[None, 1000 : 1000 + PROMPT_TOKENS] if ids.numel() > 2000 else ids[None, :PROMPT_TOKENS]
    plain, lamp = write(model, prompt, NEW_TOKENS), write(fast, prompt, NEW_TOKENS)
    fp8 = write(lamp_compile.compile(model, mode=mode, balance="never", **FP8), prompt, NEW_TOKENS)
    texts = show_continuations(tokenizer, prompt, plain, lamp)
    print(f"first call {lamp.warm_up_s:.1f} s with compilation (uncompiled: {plain.warm_up_s:.1f} s)")

    section(f"What it costs: {picked.shape[0]} windows of {context} tokens of {Path(args.text).name}")
    measured = quality(model, picked)
    speed = {"bf16": plain.tokens_per_s, "fp8_kv": fp8.tokens_per_s, "lamp": lamp.tokens_per_s}
    table = show_table(measured, speed)

    section("Planted faults: when it goes wrong, it falls back and says so")
    faults = planted_faults(model, picked[:1])

    failed = complaints(report, measured, context, faults)
    data = {
        **environment("cpu"),
        "model": Path(args.model).name,
        "mode": mode,
        "rewritten": list(report.rewritten),
        "continuation": texts,
        "rows": table,
        "faults": faults,
        "failed": failed,
    }
    (args.out / "demo.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    section(f"{'FAILED' if failed else 'Done'} in {time.perf_counter() - began:.0f} s; see plan.json and demo.json")
    for line in failed:
        print(f"  {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LampError as error:
        sys.exit(f"error: {error}")
