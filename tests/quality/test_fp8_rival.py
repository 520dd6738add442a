"""The FP8 kernel of the benchmarks: right in Triton's interpreter, and it compiles for Hopper without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tolerances import ARITHMETIC, FP8_PRODUCTS, STORAGE

pytest.importorskip("triton", reason="triton is not installed")
CASES = {"even": (2, 2, 4, 512, 64, 512), "ragged": (2, 1, 4, 300, 128, 263), "one head": (1, 2, 1, 256, 64, 256)}
WAYS = ("rows", "columns", "fp8")


def _in_a_process(root: Path, name: str, **environment: str) -> list[str]:
    """Whether kernels are interpreted is settled when triton is first imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.quality.test_fp8_rival", name],
        cwd=root, env={**os.environ, **environment, "PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\n")


def test_against_attention_over_the_same_stored_keys(root):
    lines = [line.split() for line in _in_a_process(root, "interpret", TRITON_INTERPRET="1") if line]
    assert len(lines) == len(CASES) * len(WAYS) * 2
    for way, error in lines:
        allowed = FP8_PRODUCTS if way == "fp8" else ARITHMETIC[torch.bfloat16]
        assert float(error) < allowed.relative, way


def test_the_fastest_configuration_is_taken(root):
    name, error, tried = _in_a_process(root, "tune", TRITON_INTERPRET="1")[0].rsplit(maxsplit=2)
    assert "waves" in name
    assert float(error) < STORAGE["fp8"].relative + FP8_PRODUCTS.relative
    assert int(tried) > 15


def test_every_configuration_compiles_for_hopper(root):
    lines = [line for line in _in_a_process(root, "compile", TRITON_INTERPRET="0") if line]
    assert len(lines) > 8
    for line in lines:
        assert ("wgmma" in line) == (not line.startswith("rows")), line
        assert ("e4m3.e4m3" in line) == line.startswith("fp8"), line
        assert "0 slow loads" in line, line


def interpret() -> None:
    """Print way and error of every case."""
    from _fp8_decode import Config, Decode, Stored

    torch.manual_seed(0)
    for batch, kv_heads, group, keys, dim, length in CASES.values():
        q = torch.randn(batch, kv_heads * group, 1, dim).bfloat16()
        k, v = torch.randn(2, batch, kv_heads, keys, dim)
        stored = Stored.empty(batch, kv_heads, keys, dim, "cpu")
        for b in range(batch):
            stored.fill(b, k[b], v[b])
        floats = [torch.stack(parts)[:, :, :length] for parts in zip(*map(stored.floats, range(batch)), strict=True)]
        grouped = q.float().reshape(batch, kv_heads, group, dim)
        wanted = ((grouped @ floats[0].transpose(-1, -2)) * dim**-0.5).softmax(-1) @ floats[1]
        lengths = torch.full((batch,), length)
        for way in WAYS:
            for block in (64, 128):
                decode = Decode(q, stored, lengths, Config(way, block), even=length % 128 == 0, units=2)
                out = decode(q, stored).float().reshape(wanted.shape)
                print(way, float((out - wanted).norm() / wanted.norm()))


def tune() -> None:
    """Print what was chosen for a small case, its error, and how many were tried."""
    import _rivals
    from _planes import Case, Shape, make

    inputs = make(Case(2, 256), Shape(1, 2, 64), torch.device("cpu"))
    row = _rivals.tuned_fp8([inputs, inputs.copy()], 1, _rivals.references(inputs), units=2)
    print(row["config"], row["error"], len(row["tried_ms"]))


def compile_all() -> None:
    """Print what each configuration multiplies with on sm_90, and how many loads are not vectors."""
    import re

    import _fp8_decode as kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(("k_scale", "v_scale", "out", "lse"), "*fp32") | {"q_in": "*bf16", "lengths": "*i64"}
    types |= {"k": "*fp8e4nv", "v": "*fp8e4nv", "keys": "i32", "share": "i32", "scale": "fp32"}
    for config in kernels.CONFIGS:
        kernel = kernels._split_rows if config.way == "rows" else kernels._split_columns
        constants = dict(GROUP=4, DIM=128, BLOCK=config.block, T=kernels.TILE, ROW=kernels.ROWS, G=8, EVEN=True)
        if config.way != "rows":
            constants["NATIVE"] = config.way == "fp8"
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        aligned = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if types.get(name, "fp32") != "fp32"
        }
        ptx = triton.compile(
            ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
            options=dict(num_warps=config.warps, num_stages=config.stages),
        ).asm["ptx"]  # fmt: skip
        products = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync\S*", ptx)))
        slow = len(re.findall(r"ld\.global\S*\.b8\b", ptx))
        print(config.way, *products, slow, "slow loads")


if __name__ == "__main__":
    {"interpret": interpret, "tune": tune, "compile": compile_all}[sys.argv[1]]()
