"""The one table of tolerances, each with its reason. No test states a tolerance of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """A bound on ||got - wanted|| / ||wanted||, and why it is that number."""

    relative: float
    reason: str


ARITHMETIC = {
    torch.float64: Tolerance(1e-12, "float64 sums of up to 10^5 terms; only the order of summation differs"),
    torch.float32: Tolerance(2e-5, "float32 sums of up to 10^4 terms; only the order of summation differs"),
    torch.bfloat16: Tolerance(6e-3, "the output is rounded to 8 bits of mantissa (2^-9 = 2e-3), inputs once more"),
    torch.float16: Tolerance(1e-3, "the output is rounded to 11 bits of mantissa (2^-12 = 2.4e-4), inputs once more"),
}
"""Same mathematics, other order: attend against brute force over the same dequantised planes."""

STORAGE = {
    "bf16": Tolerance(
        5e-3, "8 bits of mantissa: 2^-9/sqrt(3) a value, errors of K and V and of the query add in squares"
    ),
    "fp16": Tolerance(7e-4, "11 bits of mantissa"),
    "fp8": Tolerance(6e-2, "4 bits of mantissa: 2.6 % rms a value; scores of unit variance carry it into the weights"),
    "int8": Tolerance(2e-2, "step max/127 over normal rows: 0.7 % rms a value"),
    "nested8": Tolerance(2e-2, "step max/119 over normal rows: 0.7 % rms a value"),
    "nested8_high": Tolerance(3.5e-1, "16 times the step of both planes: 11 % rms a value"),
}
"""Everything at one precision against exact attention, standard-normal q, k, v, 8-bit query (see
``runtime/arguments.py``)."""


class Growth(NamedTuple):
    """A bound on the relative error at any length, and on its growth from 1K to 128K keys."""

    relative: float
    growth: float
    reason: str


MEAN_ERROR = {
    ("HIGH", "diffuse"): Growth(0.2, 1.5, "independent errors shrink as the average does: about 10 % at any length"),
    ("BOTH", "diffuse"): Growth(0.02, 1.5, "the same, a sixteenth of the step; the 8-bit query adds to it"),
    ("HIGH", "peaked"): Growth(
        0.6, 3.0, "the largest of more scores is larger, and so is its error; never refined here"
    ),
    ("BOTH", "peaked"): Growth(0.06, 3.0, "the same, a sixteenth of the step; the 8-bit query adds to it"),
}
"""Normal q, k, v (q scaled by 0.05 or 3), everything at one precision."""

ZOO = {
    "exact": Tolerance(1e-5, "original K and V in float32: only the order of summation differs, through two layers"),
    "both": Tolerance(2.5e-2, "two to six peaked attentions at 0.7 % rms a value; the peak of 16 channels varies"),
}
"""Outputs of the tiny random models against the same model uncompiled, everything at one precision."""
HIGH_OVER_BOTH = 5.0
"""The high plane alone must be at least so much worse: its step is 16 times that of both planes. Guards against a
comparison that would pass with the original attention in place."""

TIPPED = {
    torch.float32: Tolerance(3e-4, "a last-bit difference tips the rounding of a few keys of the next layer by a step"),
    torch.bfloat16: Tolerance(3e-2, "the same, and every activation is rounded to 8 bits of mantissa on its way"),
    torch.float16: Tolerance(4e-3, "the same, and every activation is rounded to 11 bits of mantissa on its way"),
}
"""Logits of a whole model, the same mathematics in another order, keys and values rounded on the way."""
TIPPED_EIGHT = Tolerance(
    1e-3, "the same in float32 where kernels round weights of cold sub-tiles to 8 bits, which tip just as well"
)
"""Logits of a whole model by whatever serves its device."""
MOVED = Tolerance(
    8e-3, "keys at other positions: 8-bit weights are cut by a dither that goes by position, half of KERNELS' output"
)
"""Logits of a whole model whose kernels see the same keys elsewhere."""
DEVICES = Tolerance(
    6e-3,
    "everything refined: Triton's kernels round weights to 15 bits, to 7 on the residual plane, the CPU's differently",
)
"""Logits of a whole model on a GPU against those on a CPU, 3.4e-3 in the interpreter."""
MODEL = Tolerance(6e-2, "two layers of peaked attention over nested8 planes, each within STORAGE")
"""Logits of a whole tiny model with everything refined, against the original."""

FP8_PRODUCTS = Tolerance(
    0.12, "query and weights in e4m3 besides, 6 % the largest step; the interpreter cuts off where a device rounds"
)
"""The rival kernel of the benchmarks where it multiplies in e4m3, against float32 over the same stored keys."""


class Limit(NamedTuple):
    """A bound, and why it is that number."""

    bound: float
    reason: str


ONE_FORWARD = {
    "reference_only": Limit(2e-6, "sums in another order now and then round a stored value or a query the other way"),
    "cpu_kernels": Limit(5e-5, "besides, 8-bit weights of cold sub-tiles: a third of the plan's own 1.6e-4"),
}
"""KL of decoding against one forward of the reference, trained nano model."""

KERNELS = {
    "lse": Limit(1e-5, "absolute; integer products are exact, the rest is float32 at log-sum-exps of up to 40"),
    "rows": Limit(4e-2, "a row of cold sub-tiles: int8 softmax weights, 0.3 steps rms of 127, where few keys matter"),
    "output": Limit(1.5e-2, "all rows together, cold sub-tiles among them: the same, independent between rows"),
    "refined": Limit(3e-3, "every sub-tile refined: weights of 15 bits on the high plane, 7 on a plane 16 times finer"),
    "truth": Limit(1.06, "error against float64 over the reference's: 0.5 % of the output joins 5 % in squares"),
    "understated": Limit(0.9, "certificate over the reference's: it may only be larger, but for float32"),
    "overstated": Limit(
        4.0, "error estimate over the reference's: cold keys count with the largest scale, and rows vary"
    ),
    "guard": Limit(1e-4, "the guard's mean error in float32, from the same certificate"),
    "drift": Limit(0.15, "mean signed error of cold attention in steps of both planes: noise, and 0.09 of row peaks"),
    "refined drift": Limit(0.03, "the same where everything is refined: a sixteenth of the noise"),
    "planted": Limit(0.35, "the same where the high plane is read as 16 hi: lo averages half a step"),
    "bytes": Limit(2e-3, "share of stored bytes one step away: sums in another order tip what is near a middle"),
}
"""Kernels against the reference with the same decisions (``tests/kernels``)."""

CPU_KERNELS = {
    "lse": Limit(4e-6, "absolute; integer products are exact, the rest is float32 at log-sum-exps of up to 40"),
    "rows": Limit(2e-2, "a row of cold sub-tiles: weights of 8 bits, 0.3 steps rms of 255, and 512 keys share a step"),
    "output": Limit(8e-3, "all rows together, cold sub-tiles among them: the same, independent between rows"),
    "refined": Limit(1.5e-3, "every sub-tile refined: 16 bits on the high plane, 8 on a plane 16 times finer"),
    "certificate": Limit(1e-5, "relative: the reference's own sums over keys, added in another order in float32"),
    "growth": Limit(0.5, "from 1K to 64K keys of cold attention: independent errors become 8 times smaller"),
    "sets": Limit(
        4e-3, "two instruction sets: weights of 8 bits share a scale over 256 keys or 512, and sums have another order"
    ),
}
"""The compiled core for CPUs in place of these; there every token decides for itself, as in the reference."""

PREDICTED = {
    "output": Limit(1.5e-2, "as CPU_KERNELS' output, over few rows of which nearly all are cold in some cases"),
    "state": Limit(3e-2, "the guard's mean error, over the square of an output that differs by CPU_KERNELS' output"),
    "history": Limit(2e-5, "importance: an exponential of a float32 log-sum-exp of up to 10, polynomials for both"),
    "trust": Limit(5e-5, "ratios of sums of squared importances"),
    "steps": Limit(2e-3, "the same after 90 steps, each of which hears of the one before"),
}
"""A predicted step of the compiled core against the reference; relative."""


def limits(native: bool) -> dict[str, Limit]:
    """Of one kind of kernels."""
    return {**KERNELS, **CPU_KERNELS} if native else KERNELS


LINEAR = {
    "int8": Tolerance(1.2e-2, "step max/127 over normal weights, up to 1,024 of them: 0.3 max/127 = 0.8 % rms"),
    "int8_dynamic": Tolerance(1.7e-2, "the same for weights and for each row of activations, added in squares"),
}
"""A linear layer in INT8 against the original in float64, standard-normal weights and activations."""

ORT_TOY = Tolerance(
    1.5e-2, "two attentions of an ONNX artifact at both planes, 0.7 % rms a value each, against float attention"
)
"""Logits of ``tests/ort/toy.py``; nearly all sub-tiles are refined."""

NETWORK = {
    "summaries": Tolerance(
        2e-2, "means of 8 stored keys (0.7 % rms each), rounded to 11 bits, against the keys themselves"
    ),
    "kernel": Tolerance(2e-6, "importance and its running mean: float32 in another order; integer products are exact"),
    "trust": Tolerance(1e-4, "relative: sums of squares of these over sub-tiles, against sums that may be small"),
    "rounding": Tolerance(1e-3, "a summary once in a while falls to the next float16: 2^-11 of it"),
    "share": Tolerance(2e-2, "tau is searched to 0.5 % of the refined share on two windows, and measured on others"),
}
"""Look-ahead networks."""
ONNX = {
    "node": Tolerance(1e-5, "float32 in another order, through softmax and two products"),
    "state": Tolerance(1e-4, "a mean of squared errors: twice the relative error, over sums of 10^3 terms"),
    "decoder": Tolerance(2e-3, "one layer of random weights: a key on the edge of a rounding step moves by one step"),
    "encoder": Tolerance(1e-4, "the same, and encoders quantise keys that differ in the last bit"),
}
"""Artifacts in ONNX Runtime against the same operators in torch."""

REWRITTEN = Tolerance(
    1e-2, "step max/119 over rows of 8 to 16 channels, few keys: 0.5 % measured on node tests, 0.8 % on peaked ones"
)
"""An ONNX graph rewritten at tau 0 (both planes everywhere, 8-bit query) against the original."""
