"""Compiles the launches of representative calls for GPUs that are not here; prints one JSON line per kernel.

Run as a program, without TRITON_INTERPRET: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lamp_compile.runtime import ops as _ops  # noqa: F401 (registers torch.ops.lamp)
from lamp_compile.runtime.kernels import append_rows, decode, decode_predicted, summarize_row, targets
from tests.kernels import offline

CALLS: dict[str, dict[str, Any]] = {
    "plain": {"batch": 4, "keys": 32768},
    "many heads": {"batch": 32, "keys": 32768},
    "tokens": {"tokens": 9, "window": 512},
    "paged": {"paged": True},
    "long": {"batch": 1, "keys": 131072, "paged": True},
    "softcap": {"softcap": 30.0, "rule": "lamp_strict"},
    "dim 80": {"dim": 80},
    "dim 256": {"dim": 256},
    "group 16": {"heads": 16, "kv_heads": 1},
    "predicted": {"batch": 32, "keys": 32768, "rank": 16},
    "predicted, paged": {"paged": True, "rank": 16},
}
KERNELS = ("prepare_query", "look_ahead", "decide", "refine", "merge", "guard_step")
AROUND = ("predict_parts", "list_subtiles", "merge_and_audit", "trust_and_guard")
"""Kernels that only a predicted step launches."""
READERS = ("look_ahead", "refine")
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536, "gfx950": 163840}
"""Bytes of shared memory that a program may have."""
DEPENDENT = ("sm_90", "sm_100")
"""Where launches may begin while the one ahead ends."""
EVERYWHERE, ON_SM_90 = ("plain", "dim 256", "predicted"), tuple(CALLS)
SMALL = ("plain", "dim 80", "dim 256", "predicted")
"""Calls of which the small kernels are compiled too; the others do not change them."""


def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def planes(batch: int, kv_heads: int, keys: int, dim: int, tile: int = 32) -> tuple[Tensor, ...]:
    lead = (batch, kv_heads, keys // tile)
    k, v = empty(*lead, tile, dim // 2), empty(*lead, dim // 2, tile)
    scale = empty(batch, kv_heads, keys, dtype=torch.float16)
    return k, torch.empty_like(k), scale, v, torch.empty_like(v), torch.empty_like(scale)


def target(name: str) -> targets.Target:
    """As ``target_of`` describes such a device."""
    nvidia = name.startswith("sm_")
    made = replace(targets.target_of(torch.device("cpu")), name=name, asm=nvidia, columns=8 if nvidia else 16)
    if hasattr(made, "precision"):
        made = replace(made, precision="tf32x3" if nvidia else "ieee")
    return replace(made, pdl=name in DEPENDENT, processors=132 if nvidia else 304, shared=SHARED[name])


def signs(dim: int, device: torch.device) -> Tensor:
    from lamp_compile.runtime.kernels import _tensors

    return _tensors.signs(dim, torch.device("cpu")).to("meta")


def record(kernels: dict[Any, tuple[str, ...]], name: str, run: Any) -> dict[str, offline.Recorder]:
    """What some kernels of some modules are launched with on this target."""
    found: dict[str, offline.Recorder] = {}
    with contextlib.ExitStack() as stack:
        for module, names in kernels.items():
            recorders = {kernel: offline.Recorder(getattr(module, kernel)) for kernel in names}
            patches: dict[str, Any] = dict(recorders)
            if hasattr(module, "signs"):
                patches["signs"] = signs
            if hasattr(module, "target_of"):
                patches["target_of"] = lambda device: target(name)
            stack.enter_context(mock.patch.multiple(module, **patches))
            found |= recorders
        run()
    return {kernel: recorder for kernel, recorder in found.items() if recorder.calls}


def decoded(
    batch: int = 4, heads: int = 32, kv_heads: int = 8, tokens: int = 1, keys: int = 4096, dim: int = 128,
    paged: bool = False, rank: int = 0, **given: Any,
) -> None:  # fmt: skip
    options = {
        "causal": "bottom_right", "window": 0, "scale": None, "softcap": 0.0, "keys": keys, "rotation": "hadamard",
        "rule": "energy", "query_bits": 8, "subtile": 32, "guard_window": 16, "guard_hold": 64, "hysteresis": 0.5,
        **given,
    }  # fmt: skip
    q = empty(batch, heads, tokens, dim, dtype=torch.bfloat16)
    setting = empty(kv_heads, dtype=torch.float32)
    state = empty(batch, kv_heads, 4, dtype=torch.float32), empty(batch, kv_heads, 7, dtype=torch.int64)
    table = empty(batch, keys // 32, dtype=torch.int32) if paged else None
    stored = planes(1 if paged else batch, kv_heads, keys * (2 if paged else 1), dim)
    seen = (None, None, None, None, empty(batch, dtype=torch.int64), table)
    hot = (setting, setting, setting, *state)
    if rank:
        known = gate(batch, heads, kv_heads, keys * (2 if paged else 1), dim, rank, 1 if paged else batch)
        options |= {"trained": keys, "skip": 0.05}
        decode_predicted.decode_predicted(q, stored, hot, None, seen, known, options)
    else:
        decode.decode(q, stored, hot, None, seen, options)


def gate(batch: int, heads: int, kv_heads: int, keys: int, dim: int, rank: int, pages: int) -> decode_predicted.Gate:
    lead, half, real = (batch, kv_heads), torch.float16, torch.float32
    return decode_predicted.Gate(
        empty(pages, kv_heads, keys // 8, rank, dtype=half), empty(*lead, keys // 32, 2, dtype=real),
        empty(*lead, 7, dtype=real), empty(heads, dim, rank, dtype=half), empty(heads, rank, dtype=real),
        empty(heads, 16, dtype=real), empty(heads, 4, dtype=real), empty(kv_heads, dtype=real),
        empty(kv_heads, dtype=real),
    )  # fmt: skip


def summarized() -> None:
    summary = empty(4, 8, 512, 16, dtype=torch.float16)
    key, bias = empty(8, 128, 16, dtype=torch.float16), empty(8, 16, dtype=torch.float32)
    summarize_row.summarize(planes(4, 8, 4096, 128)[:3], summary, key, bias, empty(4, dtype=torch.int64), None, 8)


def appended(value_dim: int = 128) -> None:
    k, v = (empty(4, 8, 1, dim, dtype=torch.bfloat16) for dim in (128, value_dim))
    stored = (*planes(4, 8, 4096, 128)[:3], *planes(4, 8, 4096, value_dim)[3:])
    append_rows.append(k, v, stored, None, empty(4, dtype=torch.int64), None, "hadamard")


def fenced(text: str) -> bool:
    """Whether a barrier stands between what a kernel reads behind its wait and the first step of a sum over threads."""
    behind = text[text.find("griddepcontrol.wait") :]
    steps = [place for what in ("st.shared", "shfl") if (place := behind.find(what)) >= 0]
    read = behind[: min(steps, default=0)]
    return read.rfind("ld.global") < read.rfind("bar.sync")


def compiled(name: str, case: str, recorders: dict[str, offline.Recorder]) -> None:
    for kernel, recorder in recorders.items():
        always = (*READERS, *AROUND, "decide", "merge", "append_rows", "summarize_row")
        if kernel not in always and case not in (SMALL if name == "sm_90" else ("dim 256",)):
            continue
        _, args, kwargs = recorder.calls[0]
        made = offline.compile_call(recorder.kernel, args, kwargs, offline.TARGETS[name])
        text = made.asm["ptx" if name.startswith("sm_") else "amdgcn"]
        row = {
            "target": name, "case": case, "kernel": kernel,
            "int8_products": text.count(".s8.s8.s32") + text.count("v_mfma_i32"),
            "order": [text.find(what) for what in ("griddepcontrol.wait", "griddepcontrol.launch_dep", "st.global")],
            "fenced": fenced(text),
            "last_product": text.rfind("mma.sync"), "joins": text.find("ld.global.cg"),
            "kept": text.count("evict_last"),
            "asynchronous": text.count("cp.async.c") + text.count("cp.async.bulk"),
            "shared": made.metadata.shared, "room": SHARED[name],
            "spilled": offline.spilled(made, offline.TARGETS[name]), "registers": kwargs.get("maxnreg"),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def main(names: list[str]) -> None:
    """Everything for sm_90, the plain calls for the others."""
    attention = {decode: KERNELS, decode_predicted: AROUND}
    for name in names:
        for case in ON_SM_90 if name == "sm_90" else EVERYWHERE:
            compiled(name, case, record(attention, name, lambda case=case: decoded(**CALLS[case])))
        for case, value_dim in {"append": 128, "append smaller values": 64}.items():
            compiled(name, case, record({append_rows: ("append_rows",)}, name, lambda dim=value_dim: appended(dim)))
        compiled(name, "summarize", record({summarize_row: ("summarize_row",)}, name, summarized))


if __name__ == "__main__":
    main(sys.argv[1:])
