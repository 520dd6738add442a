"""One way to decode, in a process of its own: memory that no other row hides, and turns taken on request.

Started by _cpu_model.py with a JSON object as its argument. It answers one line of JSON to "ready" (which it is by
itself), and to every line "round" or "end" on its standard input.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _models
import torch
import torch.nn.functional as F
from _models import Decoder, Size
from decode_model import cache_bytes, generated, layer_shares, reset_statistics
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig
from transformers.masking_utils import sdpa_mask

import lamp_compile
from lamp_compile.errors import OptionError
from lamp_compile.quality import load

GROUPED = "benchmark_grouped"
WARM_STEPS = 6
QUANTIZED_BITS = 4


def grouped(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """SDPA with the query heads of a group as queries of one head, which on a CPU is its fastest call for one token."""
    batch, heads, new, dim = query.shape
    if new > 1:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
    else:
        rows = query.reshape(batch, key.shape[1], -1, dim)
        out = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        out = out.reshape(batch, heads, 1, -1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class Skip(Exception):
    """This row cannot run here, and why."""


Build = Callable[[Any, Size, Tensor], Decoder]


def _compiled(model: Any, size: Size, text: Tensor, name: str, freeze: bool) -> Decoder:
    import torch._inductor.config as inductor

    inductor.freezing = freeze
    model.config._attn_implementation = name
    cache = _models.StaticCache(config=model.config, max_cache_len=size.length)
    _models._fill(model, cache, size, text)
    return Decoder(
        model, _models.compiled(model, "default", CompileConfig(mode="default", fullgraph=True)), cache, size
    )


def _lamp(model: Any, size: Size, text: Tensor, freeze: bool, options: dict[str, Any]) -> Decoder:
    import torch._inductor.config as inductor

    inductor.freezing = freeze
    try:
        fast = lamp_compile.compile(model, mode="default", guard_budget=float("inf"), **options)
    except (TypeError, OptionError) as problem:
        if not options:
            raise
        raise Skip(f"this lamp_compile has no {', '.join(options)}: {str(problem).splitlines()[0][:200]}") from None
    cache = fast.lamp.cache(size.length)
    _models._read(fast, cache, text[:, : size.held])
    return Decoder(fast, _models.compiled(fast, "default", fast.lamp.compile_config), cache, size)


def _quantized(model: Any, size: Size, text: Tensor, backend: str) -> Decoder:
    try:
        __import__({"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}[backend])
        from transformers import QuantizedCache

        axis = 0 if backend == "quanto" else 1
        cache = QuantizedCache(backend, model.config, nbits=QUANTIZED_BITS, axis_key=axis, axis_value=axis)
    except ImportError as problem:
        raise Skip(f"{backend}: {str(problem).splitlines()[0][:200]}") from None
    _models._fill(model, cache, size, text)
    return Decoder(model, model.__call__, cache, size)


ROWS: dict[str, Build] = {
    "hf_eager": lambda m, s, t: _models.eager(m, s, t),
    "hf_static": lambda m, s, t: _compiled(m, s, t, "sdpa", False),
    "compiled_fp32": lambda m, s, t: _compiled(m, s, t, GROUPED, True),
    "compiled_bf16": lambda m, s, t: _compiled(m.bfloat16(), s, t, GROUPED, True),
    "lamp": lambda m, s, t: _lamp(m, s, t, False, {}),
    "lamp_frozen": lambda m, s, t: _lamp(m, s, t, True, {}),
    "lamp_linears": lambda m, s, t: _lamp(m, s, t, False, {"linears": "auto"}),
    "hf_quanto": lambda m, s, t: _quantized(m, s, t, "quanto"),
    "hf_hqq": lambda m, s, t: _quantized(m, s, t, "hqq"),
}
ABOUT = {
    "hf_eager": "transformers' dynamic cache, eager, float32",
    "hf_static": "transformers' static cache, compiled, float32",
    "compiled_fp32": "the same with grouped SDPA and weights packed by Inductor (freezing)",
    "compiled_bf16": "the same in bfloat16",
    "lamp": "lamp_compile.compile(model)",
    "lamp_frozen": "the same with Inductor's freezing",
    "lamp_linears": 'lamp_compile.compile(model, linears="auto")',
    "hf_quanto": "transformers' quantised cache, quanto, 4 bits, eager",
    "hf_hqq": "transformers' quantised cache, hqq, 4 bits, eager",
}


def held_bytes(thing: Any) -> int:
    """Bytes of the tensors in a nest of tuples, lists, dicts and tensor subclasses."""
    if is_traceable_wrapper_subclass(thing):
        return sum(held_bytes(getattr(thing, name)) for name in thing.__tensor_flatten__()[0])
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(map(held_bytes, thing.values()))
    return sum(map(held_bytes, thing)) if isinstance(thing, (list, tuple)) else 0


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values, scales included; of a quantised cache also the rows that it still holds in floats."""
    names = ("_quantized_keys", "_quantized_values")
    packed = sum(held_bytes(getattr(layer, name, None)) for layer in getattr(cache, "layers", []) for name in names)
    return cache_bytes(cache) + packed


def peak_mb() -> float:
    """Most memory this process has had. Not what getrusage says where the system is more exact: that starts from the
    parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


class Worker:
    """A decoder with its text: every step is given the text's own token, whatever the model would have written."""

    def __init__(self, task: dict[str, Any]) -> None:
        torch.set_num_threads(task["threads"])
        self.task, began = task, time.monotonic()
        model = load.load_model(task["model"], dtype=torch.float32, device=torch.device("cpu"))
        text = load.load_windows(model, task["model"], task["text"], task["length"], 1)
        self.loaded_mb = peak_mb()
        self.size = Size(1, task["length"], task["length"] - task["steps"])
        self.text = text[0].tolist()
        self.decoder = ROWS[task["name"]](model, self.size, text)
        self.decoder.begin()
        self.at = self.size.held
        self.decoder.ids[:, -1] = self.text[self.at]
        reset_statistics(self.decoder)
        self.tokens: list[int] = []
        self.steps(WARM_STEPS)
        self.graphs = int(counters["stats"]["unique_graphs"])
        self.prepared = time.monotonic() - began

    def steps(self, count: int) -> list[float]:
        """Milliseconds of so many steps; what the model would have written goes to ``tokens``."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            self.decoder.step()
            times.append((time.perf_counter() - began) * 1e3)
            self.at += 1
            self.tokens.append(int(self.decoder.ids[0, -1]))
            if self.at < len(self.text):
                self.decoder.ids[:, -1] = self.text[self.at]
        return times

    def end(self) -> dict[str, Any]:
        """Everything that is known only now."""
        graphs = int(counters["stats"]["unique_graphs"])
        shares = layer_shares(self.decoder)
        made = {
            "tokens": self.tokens,
            "kv_bytes": kv_bytes(self.decoder.cache),
            "graphs": graphs,
            "recompiles": graphs - self.graphs,
            "graph_breaks": sum(counters["graph_break"].values()),
            "refined_share": sum(shares) / len(shares) if shares else None,
            "peak_mb": peak_mb(),
            "loaded_mb": self.loaded_mb,
            "prepare_seconds": round(self.prepared, 1),
            "fused": None,
            "generate_ms": None,
        }
        if shares:
            made["fused"] = "fused_attention" in self.decoder.model.lamp.report().after
        if self.task["generate"] and (shares or self.task["name"] == "hf_eager"):
            made["generate_ms"] = generated(self.decoder)
        return made


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    task = json.loads(sys.argv[1])
    try:
        with torch.no_grad():
            worker = Worker(task)
            answer({"ready": True})
            for request in sys.stdin:
                answer({"ms": worker.steps(task["burst"])} if request.strip() == "round" else worker.end())
    except Skip as reason:
        answer({"skipped": str(reason)})
    except Exception as problem:
        answer({"failed": f"{type(problem).__name__}: {str(problem)[:400]}"})
        raise


if __name__ == "__main__":
    main()
