"""Attention of one new token over keys and values in bf16 and in e4m3, and what it should be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from _planes import Inputs
from _timing import milliseconds, synchronize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "default": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
QUICK = 3


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q ``[H, D]`` over k, v ``[G, N, D]`` in float64, a kv head at a time: ``[H, D]``."""
    parts = []
    for grouped, keys, values in zip(q.double().reshape(k.shape[0], -1, k.shape[2]), k, v, strict=True):
        weights = (grouped @ keys.double().T * k.shape[2] ** -0.5).softmax(-1)
        parts.append(weights @ values.double())
    return torch.cat(parts)


def references(inputs: Inputs) -> dict[int, Tensor]:
    """The exact output ``[H, D]`` of the first and the last sequence."""
    last = inputs.q.shape[0] - 1
    return {b: exact(inputs.q[b, :, 0], inputs.k[b], inputs.v[b]) for b in sorted({0, last})}


def error(out: Tensor, wanted: dict[int, Tensor]) -> float:
    """||out - wanted|| / ||wanted|| over the sequences there is a reference for."""
    got = torch.stack([out[b, :, 0].double() for b in wanted])
    known = torch.stack(list(wanted.values()))
    return float((got - known).norm() / known.norm())


def _sdpa(backend: SDPBackend | None, grouped: bool) -> Callable[[Inputs], Tensor]:
    """SDPA through one backend; ``grouped`` hands the query heads of a group over as queries, which is the same without
    a mask."""

    def call(inputs: Inputs) -> Tensor:
        q = inputs.q.reshape(inputs.q.shape[0], inputs.k.shape[1], -1, inputs.q.shape[3]) if grouped else inputs.q
        if backend is None:
            out = F.scaled_dot_product_attention(q, inputs.k, inputs.v, enable_gqa=not grouped)
        else:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, inputs.k, inputs.v, enable_gqa=not grouped)
        return out.reshape(inputs.q.shape)

    return call


def bf16(sets: Sequence[Inputs], repeats: int, wanted: dict[int, Tensor]) -> dict[str, Any]:
    """The fastest SDPA that runs: its time and error, and which it is."""
    device = sets[0].q.device
    timed: dict[str, float] = {}
    calls: dict[str, Callable[[Inputs], Tensor]] = {}
    for name, backend in BACKENDS.items():
        if device.type != "cuda" and backend is not None:
            continue
        for grouped in (False, True):
            call, word = _sdpa(backend, grouped), f"{name}, {'grouped' if grouped else 'enable_gqa'}"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(sets[0])
                    synchronize(device)
                    timed[word] = milliseconds([lambda c=call, s=s: c(s) for s in sets], min(QUICK, repeats), device)
            except RuntimeError:  # this backend does not take these arguments
                continue
            calls[word] = call
    best = min(timed, key=timed.__getitem__)
    call = calls[best]
    ms = milliseconds([lambda s=s: call(s) for s in sets], repeats, device)
    return {"name": "bf16", "ms": ms, "error": error(call(sets[0]), wanted), "backend": best, "tried_ms": timed}


def fp8(sets: Sequence[Inputs], repeats: int, wanted: dict[int, Tensor]) -> dict[str, Any]:
    """Our own kernel over e4m3 at its best configuration for this size: time, error, configuration."""
    device = sets[0].q.device
    if device.type != "cuda":
        return _emulated(sets, repeats, wanted)
    return tuned_fp8(sets, repeats, wanted, torch.cuda.get_device_properties(device).multi_processor_count)


def tuned_fp8(sets: Sequence[Inputs], repeats: int, wanted: dict[int, Tensor], units: int) -> dict[str, Any]:
    """The kernel at its best on a device of ``units`` multiprocessors: configurations first, then splits of the two
    fastest."""
    from _fp8_decode import CONFIGS, TILE, WAVES, Decode, Stored

    device, (batch, kv_heads, keys, dim) = sets[0].q.device, sets[0].k.shape
    stored = []
    for inputs in sets:
        made = Stored.empty(batch, kv_heads, keys, dim, device)
        for b in range(batch):
            made.fill(b, inputs.k[b], inputs.v[b])
        stored.append(made)
    timed: dict[Any, float] = {}
    failed = ""

    def measure(config: Any, count: int) -> tuple[float, Any]:
        decode = Decode(sets[0].q, stored[0], sets[0].lengths, config, even=keys % TILE == 0, units=units)
        calls = [lambda s=s, e=e: decode(s.q, e) for s, e in zip(sets, stored, strict=True)]
        return milliseconds(calls, count, device), decode

    def compare(configs: Sequence[Any]) -> None:
        nonlocal failed
        for config in configs:
            try:
                timed[config] = measure(config, min(QUICK, repeats))[0]
            except Exception as problem:  # noqa: BLE001  (a configuration that does not fit the device)
                failed = f"{config}: {problem}"

    compare(CONFIGS)
    if not timed:
        raise RuntimeError(failed)
    for config in sorted(timed, key=timed.__getitem__)[:2]:
        compare([replace(config, waves=waves) for waves in WAVES])
    best = min(timed, key=timed.__getitem__)
    ms, decode = measure(best, repeats)
    off = error(decode(sets[0].q, stored[0]), wanted)
    tried = {str(config): time for config, time in timed.items()}
    return {"name": "fp8", "ms": ms, "error": off, "config": str(best), "tried_ms": tried}


def _emulated(sets: Sequence[Inputs], repeats: int, wanted: dict[int, Tensor]) -> dict[str, Any]:
    """The same numbers in plain torch, where there is no device for the kernel."""
    rounded = [Inputs(s.q, *rounded_fp8(s.k, s.v), s.planes, s.lengths) for s in sets]

    def call(inputs: Inputs) -> Tensor:
        return torch.stack([exact(q[:, 0], k, v) for q, k, v in zip(inputs.q, inputs.k, inputs.v, strict=True)])

    device = sets[0].q.device
    ms = milliseconds([lambda r=r: call(r) for r in rounded], repeats, device)
    return {"name": "fp8", "ms": ms, "error": error(call(rounded[0])[:, :, None], wanted), "config": "emulated"}


def rounded_fp8(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[..., N, D]`` as e4m3 with one scale per head keeps them, in float32."""
    rounded = []
    for x in (k.float(), v.float()):
        scale = (x.abs().amax((-1, -2), keepdim=True) / 448.0).clamp_min(1e-20)
        rounded.append((x / scale).to(torch.float8_e4m3fn).float() * scale)
    return rounded[0], rounded[1]
