"""Decoding with ONNX Runtime's CUDA provider: an artifact for target "cuda" against the plain export and torch.

    python benchmarks/onnx_cuda.py --model DIR --text FILE --out

One process; every way is given the same text as its prompt and then the same tokens, takes its turn in rounds of a few
steps, and its time is the median over rounds. The logits of every timed step are held against torch's in float32 (no
TF32 anywhere). A step appends one token and ends with its logits on the host.

There are no native operators for CUDA yet: bodies of standard operators run, many small kernels, which a CUDA graph
saves the launches of but not the passes over the planes. Needs onnxruntime-gpu; --provider cpu is for a try without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _onnx_models
import numpy as np
import torch
from decode_kernel import default_out
from onnx_decode import MODEL, TEXT

from lamp_compile.quality import load, windows
from lamp_compile.quality.environment import environment, write_json

ROWS = ("torch", "plain", "lamp", "lamp_graph")
ABOUT = {
    "torch": "transformers, eager, float32, dynamic cache",
    "plain": "transformers' ONNX export, float32, past and present joined by Concat, both on the device",
    "lamp": 'export_onnx(target="cuda"): guard "select", bodies of standard operators',
    "lamp_graph": "the same, OrtSession(graph=True): steps replay a CUDA graph",
}
WARM = 6
"""Steps before any is timed."""


class Torch:
    """transformers, eager."""

    def __init__(self, folder: Path, prompt: np.ndarray, room: int, device: str) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self.device = device
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval().to(device)
        self.cache = DynamicCache(config=self.model.config)
        for first in range(0, len(prompt), 512):
            ids = torch.from_numpy(prompt[None, first : first + 512]).to(device)
            self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        self.kv_bytes = sum(x[:, :, :1].nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        ids = torch.tensor([[token]], device=self.device)
        found = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        logits: np.ndarray = found.logits[0, -1].cpu().numpy()
        return logits


class Plain:
    """transformers' ONNX export; every step's present is the next one's past, on the device, without a copy."""

    def __init__(self, folder: Path, prompt: np.ndarray, room: int, device: str) -> None:
        import onnxruntime

        from lamp_compile.runtime.ort import providers

        self.device, options = device, onnxruntime.SessionOptions()
        options.log_severity_level = 4
        provider = providers.resolve(device)
        self.session = providers.make_session(str(folder / "plain.onnx"), provider, options, strict=False)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.logits = next(i for i, name in enumerate(self.outputs) if "logits" in name)
        names = [value.name for value in self.session.get_inputs()]
        self.past = [name for name in names if name.endswith((".keys", ".values"))]
        self.token = next(name for name in names if "input_ids" in name)
        self.place = next((name for name in names if "position" in name), None)
        source = Torch(folder, prompt, room, device)
        self.kv_bytes, self.held = source.kv_bytes, {}
        for name in self.past:
            layer = source.cache.layers[int(name.split(".")[-2])]
            rows = (layer.values if name.endswith(".values") else layer.keys).cpu().numpy()
            self.held[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows), device, 0)

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        binding = self.session.io_binding()
        binding.bind_cpu_input(self.token, np.array([[token]]))
        if self.place:
            binding.bind_cpu_input(self.place, np.array([[slot]]))
        for name, value in self.held.items():
            binding.bind_ortvalue_input(name, value)
        for index, name in enumerate(self.outputs):
            binding.bind_output(name, "cpu" if index == self.logits else self.device)
        self.session.run_with_iobinding(binding)
        made = binding.get_outputs()
        self.held = {name: made[self.outputs.index(name.replace("input.", "output."))] for name in self.past}
        logits: np.ndarray = made[self.logits].numpy()[0, -1]
        return logits


class Lamp:
    """``lamp_compile.OrtSession``, prompt and all."""

    def __init__(self, folder: Path, prompt: np.ndarray, room: int, device: str, graph: bool = False) -> None:
        import lamp_compile

        native = False if device == "cpu" else None
        self.session = lamp_compile.OrtSession(folder / "cuda.onnx", provider=device, native=native, graph=graph)
        self.session.start(1, len(prompt) + room)
        self.session.prefill([prompt])
        self.kv_bytes = self.session.nbytes // self.session.capacity
        self.begin = self.session.statistics()

    def step(self, token: int, slot: int) -> np.ndarray:
        """Logits ``[V]``."""
        found: np.ndarray = self.session.step([[token]])[0]
        return found

    def more(self) -> dict[str, Any]:
        """Share of the sub-tiles refined in all steps, and what runs where."""
        now = self.session.statistics()
        live = sum(int((now[n].live - b.live).sum()) for n, b in self.begin.items())
        refined = sum(int((now[n].refined - b.refined).sum()) for n, b in self.begin.items())
        nodes = {name: sum(found.values()) for name, found in self.session.placement().items()}
        return {"refined_share": refined / max(1, live), "nodes": nodes}


def make(name: str, *given: Any) -> Any:
    """The way called ``name``."""
    if name.startswith("lamp"):
        return Lamp(*given, graph=name == "lamp_graph")
    return Torch(*given) if name == "torch" else Plain(*given)


def context(cached: int, ids: np.ndarray, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every way at one number of cached tokens."""
    steps, rows, logits = WARM + args.rounds * args.burst, [], {}
    ways: dict[str, Any] = {}
    for name in args.rows.split(","):
        try:
            ways[name] = make(name, folder, ids[:cached], steps, args.provider)
        except Exception as problem:  # noqa: BLE001  (a row that says so)
            rows.append({"cached": cached, "name": name, "failed": f"{type(problem).__name__}: {str(problem)[:300]}"})
    times: dict[str, list[float]] = {name: [] for name in ways}
    at = dict.fromkeys(ways, 0)

    def burst(name: str, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            slot = cached + at[name]
            logits.setdefault(name, []).append(ways[name].step(int(ids[slot]), slot))
            at[name] += 1
        return (time.perf_counter() - began) * 1e3 / count

    for name in ways:
        burst(name, WARM)
    for turn in range(args.rounds):
        for index in range(len(ways)):
            name = list(ways)[(index + turn) % len(ways)]
            times[name].append(burst(name, args.burst))
    for name, way in ways.items():
        more = way.more() if hasattr(way, "more") else {}
        row = {"cached": cached, "name": name, "ms": statistics.median(times[name]), "kv_bytes_per_token": way.kv_bytes}
        rows.append({**row, **compared(np.stack(logits[name]), np.stack(logits[next(iter(ways))])), **more})
    plain = next((row["ms"] for row in rows if row["name"] == "plain" and "ms" in row), None)
    for row in rows:
        if "ms" in row and plain:
            row["speed_over_plain"] = plain / row["ms"]
    return rows


def compared(got: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Logits of all steps against the first way's."""
    error = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    same = int((got.argmax(1) == wanted.argmax(1)).sum())
    return {"logits_error": float(np.median(error)), "same_tokens": same, "positions": len(wanted)}


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Write the artifacts; verified on the way, on the CPU."""
    _onnx_models.make(args.model, folder, ["plain"] if "plain" in args.rows else [])
    if not (folder / "cuda.onnx").exists():
        import lamp_compile

        lamp_compile.export_onnx(_onnx_models.load(args.model), None, folder / "cuda.onnx", target="cuda")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="local folder (default: the packaged one)")
    parser.add_argument("--text", default=str(TEXT), help="UTF-8 file or *.u16 token ids")
    parser.add_argument("--cached", default="512,1024,4096,8192")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--burst", type=int, default=8, help="steps of a round")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--folder", help="where artifacts are kept; a temporary one when left out")
    parser.add_argument("--out", nargs="?", const="", help="JSON; a name is made up when left out")
    args = parser.parse_args(argv)
    lengths = [int(n) for n in args.cached.split(",")]
    encode = None if args.text.endswith(".u16") else load.encoder(args.model)
    ids = windows.token_ids(args.text, encode).numpy()[: max(lengths) + WARM + args.rounds * args.burst]
    rows = []
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(args.folder or temporary)
        prepare(args, folder)
        for cached in lengths:
            for row in context(cached, ids.astype(np.int64), folder, args):
                rows.append(row)
                print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    if args.out is not None:
        given = {k: v for k, v in vars(args).items() if k not in ("model", "text", "folder", "out")}
        file = Path(args.out) if args.out else default_out("onnx_cuda", args.provider)
        write_json(file, {**environment(args.provider), "about": ABOUT, "options": given, "rows": rows})
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
