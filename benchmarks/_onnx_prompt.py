"""A prompt through an artifact, with logits of all its tokens and with those of the last; part of onnx_decode.py."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS = {"lamp_portable": False, "lamp_native": True}


def rows(file: Path, ids: np.ndarray, threads: int, names: list[str], rounds: int = 5) -> list[dict[str, Any]]:
    """One row for each way: median milliseconds of both, in turns on one session."""
    import lamp_compile

    found = []
    for name, native in WAYS.items():
        if name not in names:
            continue
        session = lamp_compile.OrtSession(file, native=native, threads=threads)
        session.start(1, len(ids))
        about = session.artifact
        times: dict[int, list[float]] = {0: [], -1: []}
        for turn in range(rounds + 1):
            for first, taken in times.items():
                session.reset()
                session.artifact = dataclasses.replace(about, logits_from=about.logits_from if first else "")
                session._bound = None
                began = time.perf_counter()
                session.step(ids[None])
                if turn:
                    taken.append((time.perf_counter() - began) * 1e3)
        every, last = (statistics.median(times[first]) for first in (0, -1))
        found.append({"name": name, "tokens": len(ids), "all_logits_ms": every, "last_logits_ms": last})
        print(f"prompt of {len(ids)}: {name} {every:.1f} ms with all logits, {last:.1f} ms with the last", flush=True)
    return found
