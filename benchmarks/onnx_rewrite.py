"""Which exporters' spellings of attention the ONNX rewriter reads, and how close the result stays.

    python benchmarks/onnx_rewrite.py --out results.json

Tiny random models of several families go through torch's exporter (eager and SDPA attention, opsets 18, 20, 23) and
through transformers' exporter with a KV cache (plain, and fused into com.microsoft operators). Each file is rewritten;
original and result run on ONNX Runtime with the same inputs, one row per file: sites, sites rewritten, what stays,
relative error of the first output with both planes everywhere and with the high plane alone.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import transformers
from torch import nn

from lamp_compile.errors import LampError
from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
from lamp_compile.quality.environment import environment, write_json

TORCH = (
    ("llama", "eager", 18),
    ("llama", "eager", 20),
    ("llama", "sdpa", 20),
    ("gemma2", "eager", 18),
    ("gpt2", "eager", 18),
    ("gpt2", "sdpa", 23),
    ("bert", "eager", 18),
    ("bert", "sdpa", 20),
    ("bert", "sdpa", 23),
    ("vit", "sdpa", 18),
)
WITH_CACHE = (None, "cpu", "cuda")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = 64


def tiny(family: str, attention: str) -> nn.Module:
    """A random model of two layers."""
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": WORDS, "attn_implementation": attention}
    grouped = {**text, "num_key_value_heads": 2, "head_dim": 16}
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 128}
        config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
        return transformers.GPT2LMHeadModel(config).eval()
    if family == "bert":
        return transformers.BertModel(transformers.BertConfig(**text), add_pooling_layer=False).eval()
    if family == "vit":
        config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8, attn_implementation=attention)
        return transformers.ViTModel(config, add_pooling_layer=False).eval()
    if family == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**grouped, sliding_window=8)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**grouped)).eval()


class Plain(nn.Module):
    """One tensor or two in, one out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None:
            return self.model(pixel_values=x).last_hidden_state
        cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        out = self.model(input_ids=x, attention_mask=mask, **cache)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def by_torch(family: str, attention: str, opset: int) -> onnx.ModelProto:
    """Through torch.onnx.export, batch and length dynamic."""
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=100)
    if family == "vit":
        args, dynamic = (torch.randn(2, 3, 32, 32),), ({0: batch},)
    else:
        args = (torch.randint(0, WORDS, (2, 12)), torch.ones(2, 12, dtype=torch.long))
        dynamic = ({0: batch, 1: length}, {0: batch, 1: length})
    model = Plain(tiny(family, attention)).eval()
    with torch.no_grad():
        done = torch.onnx.export(
            model, args, dynamic_shapes=dynamic, opset_version=opset, dynamo=True, verbose=False, optimize=True
        )
    return done.model_proto


def by_transformers(fusions: str | None) -> onnx.ModelProto:
    """One decode step of a decoder over its KV cache, through transformers' exporter."""
    import onnx_ir
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = tiny("llama", "sdpa")
    with torch.no_grad():
        past = model(torch.randint(0, WORDS, (2, 6)), use_cache=True).past_key_values
    ids, mask = torch.randint(0, WORDS, (2, 1)), torch.ones(2, 7, dtype=torch.long)
    options = {} if fusions is None else {"ort_fusions": fusions}
    inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": past}
    done = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, **options))
    return onnx_ir.to_proto(done.program)


def feeds(model: onnx.ModelProto) -> dict[str, Any]:
    """Inputs for an exported model, by name, type and rank: 3 sequences of 40 tokens, or 30 cached and one new."""
    rng, made = np.random.default_rng(0), {}
    cached = any("past" in given.name for given in model.graph.input)
    for given in model.graph.input:
        kind = given.type.tensor_type
        fixed = [d.dim_value or int(d.dim_param if d.dim_param.isdigit() else 0) for d in kind.shape.dim]
        if len(fixed) == 4 and "past" in given.name:
            shape = (3, fixed[1], 30, fixed[3])
        elif len(fixed) == 4:
            shape = (3, *fixed[1:])
        else:
            shape = (3, (31 if "mask" in given.name else 1) if cached else 40)
        if kind.elem_type == onnx.TensorProto.FLOAT:
            made[given.name] = rng.standard_normal(shape).astype(np.float32)
        elif "mask" in given.name:
            made[given.name] = np.ones(shape, np.int64)
            made[given.name][1, :7] = 0 if not cached else 1
        elif "position" in given.name:
            made[given.name] = np.full(shape, 30, np.int64)
        else:
            made[given.name] = rng.integers(0, WORDS, shape)
    return made


def run(model: onnx.ModelProto, fed: dict[str, Any]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, fed)[0].astype(np.float64)


def passes(model: onnx.ModelProto) -> bool:
    """Whether a model passes onnx's full check; those fused for ONNX Runtime do not."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def measure(name: str, model: onnx.ModelProto) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"name": name, "nodes": len(model.graph.node)}
    try:
        done = rewrite_onnx(model, tau=0.0)
    except LampError as error:
        return {**row, "sites": 0, "rewritten": 0, "stays": [error.what]}
    if passes(model):
        onnx.checker.check_model(done.model, full_check=True)
        onnx.shape_inference.infer_shapes(done.model, strict_mode=True)
    report, fed = done.report, feeds(model)
    wanted = run(model, fed)
    errors = [
        float(np.linalg.norm(run(made.model, fed) - wanted) / np.linalg.norm(wanted))
        for made in (done, rewrite_onnx(model, tau=1e9))
    ]
    stays = [f"{item.site}: {item.reason}" for item in (*report.refusals, *report.unclaimed)]
    sites = len(report.sites) + len(report.refusals)
    patterns = sorted({site.pattern for site in report.sites})
    return {
        **row, "sites": sites, "rewritten": len(report.rewritten), "pattern": ", ".join(patterns), "stays": stays,
        "error_both_planes": errors[0], "error_high_plane": errors[1],
    }  # fmt: skip


def models(only: str) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Names and exported files."""
    for family, attention, opset in TORCH:
        name = f"{family}, {attention}, opset {opset}, torch.onnx"
        if only in name:
            yield name, by_torch(family, attention, opset)
    for fusions in WITH_CACHE:
        name = f"llama over its cache, {fusions or 'no'} fusions, transformers"
        if only in name:
            yield name, by_transformers(fusions)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, model in models(args.only):
        rows.append(measure(name, model))
        print(rows[-1], flush=True)
    found = {**environment("cpu"), "onnx": onnx.__version__, "onnxruntime": ort.__version__, "rows": rows}
    print({key: value for key, value in found.items() if key != "rows"})
    if args.out is not None:
        write_json(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
