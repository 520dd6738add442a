"""One way to decode with ONNX Runtime (or torch, to compare with), in a process of its own, turns taken on request.

Started by _onnx_rows.py with a JSON object as its argument; speaks as _cpu_worker.py does. All ways start from the same
keys and values and are given the same tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cpu_ort import _integers, _stored
from _cpu_worker import peak_mb
from _onnx_models import BITS

WARM_STEPS = 4
SPIN = {"session.force_spinning_stop": "1"}
"""Threads of ONNX Runtime stop when a call ends, so that they disturb no other way."""


class Given:
    """What every way is told: cached keys and values, float32 ``[layers, 2, G, N, D]``, and the tokens to feed."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.folder, self.threads = Path(task["folder"]), task["threads"]
        self.config = json.loads((self.folder / "model" / "config.json").read_text())
        self.held, self.steps, self.share = task["cached"], task["steps"] + WARM_STEPS, task["share"]
        text = np.fromfile(task["tokens"], "<u2").astype(np.int64)
        self.tokens = text[self.held : self.held + self.steps].tolist()
        shape = self.kv_shape
        if task["kv"]:
            self.kv = np.load(task["kv"], mmap_mode="r")[:, :, :, : self.held]
        else:  # normal numbers; keys whose scores matter to a normal query
            self.kv = np.random.default_rng(0).standard_normal((*shape[:3], self.held, shape[3]), np.float32)

    @property
    def kv_shape(self) -> tuple[int, int, int, int]:
        """Layers, 2, kv heads, channels."""
        return (
            self.config["num_hidden_layers"], 2, self.config["num_key_value_heads"], self.config["head_dim"],
        )  # fmt: skip

    @property
    def room(self) -> int:
        """Tokens that a cache must hold at the end."""
        return self.held + self.steps

    def padded(self, layer: int, which: int) -> np.ndarray:
        """Keys or values of a layer with room for all steps, ``[1, G, room, D]``."""
        rows = np.zeros((1, self.kv.shape[2], self.room, self.kv.shape[4]), np.float32)
        rows[0, :, : self.held] = self.kv[layer, which]
        return rows


class Torch:
    """transformers in float32, eager, with its dynamic cache."""

    def __init__(self, given: Given) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self.model = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float32).eval()
        self.cache = DynamicCache(config=self.model.config)
        for layer in range(given.kv.shape[0]):
            k, v = (torch.from_numpy(np.array(given.kv[layer, which]))[None] for which in (0, 1))
            self.cache.update(k, v, layer)
        self.kv_bytes = 4 * given.kv[:, :, :, :1].size
        self.refined = None

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        found = self.model(
            input_ids=torch.tensor([[token]]), position_ids=torch.tensor([[slot]]), past_key_values=self.cache,
            use_cache=True,
        )  # fmt: skip
        return found.logits[0, -1].numpy()


def _session(given: Given, name: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given.threads
    options.log_severity_level = 4
    for key, value in SPIN.items():
        options.add_session_config_entry(key, value)
    file = str(given.folder / f"{name}.onnx")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


class Plain:
    """transformers' ONNX export: every step's present is the next one's past, handed over without a copy."""

    def __init__(self, given: Given) -> None:
        from onnxruntime import OrtValue

        self.session = _session(given, "plain")
        self.binding, self.small = self.session.io_binding(), {}
        outputs = [output.name for output in self.session.get_outputs()]
        self.logits = outputs.index(next(name for name in outputs if "logits" in name))
        self.pairs = []
        for value in self.session.get_inputs():
            name = value.name
            if not name.endswith((".keys", ".values")):
                self.small["tokens" if "input_ids" in name else "places"] = (name, np.zeros((1, 1), np.int64))
                continue
            layer, which = int(name.split(".")[-2]), int(name.endswith(".values"))
            self.pairs.append((name, outputs.index(name.replace("input.", "output."))))
            held = np.ascontiguousarray(given.kv[layer, which][None])
            self.binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(held))
        for name in outputs:
            self.binding.bind_output(name, "cpu")
        self.outputs, self.refined = outputs, None
        self.kv_bytes = 4 * given.kv[:, :, :, :1].size

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        for key, number in (("tokens", token), ("places", slot)):
            name, array = self.small[key]
            array[...] = number
            self.binding.bind_cpu_input(name, array)
        self.session.run_with_iobinding(self.binding)
        values = self.binding.get_outputs()
        logits: np.ndarray = values[self.logits].numpy()[0, -1]
        for name, place in self.pairs:
            self.binding.bind_ortvalue_input(name, values[place])
        self.binding.clear_binding_outputs()
        for name in self.outputs:
            self.binding.bind_output(name, "cpu")
        return logits


class Grouped:
    """GroupQueryAttention; past and present share a buffer. Static scales, of the very keys and values stored."""

    def __init__(self, given: Given, name: str) -> None:
        from onnxruntime import OrtValue

        bits = BITS[name]
        self.session, self.kv_bytes, self.refined = _session(given, name), 0, None
        self.binding = self.session.io_binding()
        for layer in range(given.kv.shape[0]):
            for which, letter in enumerate("kv"):
                rows = torch.from_numpy(given.padded(layer, which))
                stored, _ = _stored(rows, bits)
                buffer = OrtValue.ortvalue_from_numpy(stored.numpy())
                self.kv_bytes += stored.nbytes // given.room
                self.binding.bind_ortvalue_input(f"past.{layer}.{letter}", buffer)
                self.binding.bind_ortvalue_output(f"present.{layer}.{letter}", buffer)
                if bits != 32:
                    scale = _integers(rows, bits)[1].contiguous().numpy()
                    self.binding.bind_ortvalue_input(f"scale.{layer}.{letter}", OrtValue.ortvalue_from_numpy(scale))
        self.ids, self.positions = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        for name_, array in (("input_ids", self.ids), ("positions", self.positions)):
            self.binding.bind_ortvalue_input(name_, OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_output("logits", "cpu")

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        self.ids[...], self.positions[...] = token, slot
        self.session.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[-1].numpy()[0, -1].copy()


class Lamp:
    """``lamp_compile.OrtSession``, its planes filled by ``lamp::append``."""

    def __init__(self, given: Given, native: bool) -> None:
        import lamp_compile
        from lamp_compile.runtime import fused_ops as _ops  # noqa: F401  (registers lamp::append)

        self.session = lamp_compile.OrtSession(
            given.folder / "lamp.onnx", native=native, threads=given.threads, config=SPIN
        )
        self.session.controls.set(budget=float("inf"))  # the guard would refine more where it is over budget
        self.session.start(1, given.room)
        names = ("k_high", "k_residual", "k_scale", "v_high", "v_residual", "v_scale")
        for layer, site in enumerate(self.session.artifact.planes):
            values = self.session.planes(site.name)
            planes = [torch.from_dlpack(values[name]) for name in names]
            k, v = (torch.from_numpy(np.array(given.kv[layer, which]))[None] for which in (0, 1))
            torch.ops.lamp.append(
                k, v, *planes, None, torch.zeros(1, dtype=torch.int64), None, k_format="nested8", v_format="nested8",
                rotation="hadamard", site=site.name,
            )  # fmt: skip
        self.held = given.held
        self.session._lengths[:] = given.held
        if given.share is not None:
            self._impose(given.share, given.tokens[0])
        self.kv_bytes = self.session.nbytes / self.session.capacity
        self.begin = self.session.statistics()

    def _impose(self, share: float, token: int) -> None:
        """Find each layer's tau that refines this share, by halving on a logarithmic scale; then forget the steps."""
        low = dict.fromkeys(self.session.controls, 1e-05)
        high = dict.fromkeys(low, 1.0)
        for _ in range(14):
            tau = {name: (low[name] * high[name]) ** 0.5 for name in low}
            for name, value in tau.items():
                self.session.controls.set(tau=value, sites=name)
            before = self.session.statistics()
            self.session.step([[token]])
            self.session.crop(self.held)
            for name, after in self.session.statistics().items():
                live = int((after.live - before[name].live).sum())
                found = int((after.refined - before[name].refined).sum()) / live
                (low if found > share else high)[name] = tau[name]

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        return self.session.step([[token]])[0]

    @property
    def refined(self) -> float:
        """Share of the sub-tiles refined in all steps."""
        now = self.session.statistics()
        live = sum(int((now[n].live - b.live).sum()) for n, b in self.begin.items())
        return sum(int((now[n].refined - b.refined).sum()) for n, b in self.begin.items()) / max(1, live)


def build(name: str, given: Given) -> Any:
    """The way called ``name``."""
    if name == "torch":
        return Torch(given)
    if name == "plain":
        return Plain(given)
    return Lamp(given, name == "lamp_native") if name.startswith("lamp") else Grouped(given, name)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    try:
        with torch.no_grad():
            given = Given(task)
            way, at, logits = build(task["name"], given), 0, []

            def steps(count: int) -> list[float]:
                nonlocal at
                times = []
                for _ in range(count):
                    began = time.perf_counter()
                    found = way.step(given.tokens[at], given.held + at)
                    times.append((time.perf_counter() - began) * 1e3)
                    logits.append(found.astype(np.float32))
                    at += 1
                return times

            steps(WARM_STEPS)
            answer({"ready": True})
            for request in sys.stdin:
                if request.strip() == "round":
                    answer({"ms": steps(task["burst"])})
                    continue
                np.save(task["logits"], np.stack(logits))
                answer({"kv_bytes_per_token": way.kv_bytes, "refined_share": way.refined, "peak_mb": peak_mb()})
    except Exception as problem:
        answer({"failed": f"{type(problem).__name__}: {str(problem)[:400]}"})
        raise


if __name__ == "__main__":
    main()
