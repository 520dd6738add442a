"""Kernels for CPUs: C++ in ``core/``, called through a plain C interface. They compute what ``runtime/reference.py``
defines: the look-ahead from the high plane, decisions with its log-sum-exp, refinement of what is worth it.

Tensors are handed over as addresses; the callers have checked shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamp_compile.errors import CacheError
from lamp_compile.runtime import layout, rotation
from lamp_compile.runtime.kernels.cpu import _library
from lamp_compile.runtime.kernels.cpu._library import (
    instruction_set,
    instruction_sets,
    join_torch,
    refuse,
    served,
    threads,
    without_torch,
)
from lamp_compile.runtime.kernels.result import Result

__all__ = [
    "append",
    "attend",
    "by_lanes",
    "instruction_set",
    "instruction_sets",
    "join_torch",
    "refuse",
    "served",
    "summarize",
    "threads",
    "why_not",
    "without_torch",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"energy": 0, "lamp_strict": 1, "lamp_relaxed": 2}
CAUSAL = {"": 0, "top_left": 1, "bottom_right": 2}
MOST_GROUP = 64
"""Query heads that share a kv head, at most (``MOST_ROWS`` of ``core/rows.h``)."""
MOST_RANK = 64
"""Numbers per summary of a look-ahead network, at most (``core/predict.h``)."""
GROUPS = (1, 2, 4, 8, 16, 32)
"""Keys per summary."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not() -> str | None:
    """Why the core does not run here, or None."""
    return _library.why_not()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def by_lanes() -> bool:
    """Whether planes of new caches had better lie by lanes (``runtime/layout.py``): AVX-512 reads them so."""
    return instruction_set() == "avx512"


def append(
    k: Tensor, v: Tensor, planes: tuple[Tensor, ...], balance: Tensor | None, positions: Tensor,
    table: Tensor | None, kind: str,
) -> None:  # fmt: skip
    """Store rows k ``[B, G, n, D]`` and v ``[B, G, n, Dv]`` in six planes, in place.

    Raises:
        CacheError: They do not fit; nothing was written.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    if v.dtype != k.dtype:
        v = v.to(k.dtype)
    balance = _dense(balance)
    batch, _, rows, _ = k.shape
    table = _table(table)
    call = _library.Append(
        *_planes(planes, table), *_rotation(k.shape[3], kind), *_rotation(v.shape[3], kind),
        k.data_ptr(), v.data_ptr(), DTYPES[k.dtype], batch, rows, *k.stride()[:3], *v.stride()[:3],
        _address(balance), _sequence_step(balance, 3), *_integers(positions), torch.get_num_threads(),
    )  # fmt: skip
    if _library.load().lamp_append(_library.pointer(call)):
        room = planes[0].shape[2] * layout.tile_of(planes[0])
        raise CacheError(
            f"{rows} rows from {positions.tolist()} on do not fit into planes for {room} keys",
            where="lamp::append",
            fix="a larger cache, fast.lamp.cache(tokens); nothing was written",
        )


def attend(
    q: Tensor, planes: tuple[Tensor, ...], hot: tuple[Tensor, ...], balance: Tensor | None,
    seen: tuple[Tensor | None, ...], options: Mapping[str, Any], details: bool = False,
    predicted: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None,
) -> Result:  # fmt: skip
    """Fused attention of q ``[B, H, S, D]`` over six planes; the guard's state and statistics are written in place.

    Args:
        q: Any strides.
        planes: As of ``lamp::attend``.
        hot: tau, floor, budget, state, stats.
        balance: ``[G, D]``, ``[B, G, D]`` or None.
        seen: mask, bias, sinks, start, lengths, block table.
        options: The settings of ``lamp::fused_attention`` by name, in its order.
        details: Also write log-sum-exp and certificate; without, they are empty.
        predicted: Of a look-ahead network, which decides then: summaries, history and trust (the latter two are written
            in place); and query, query_bias, age, extra, limit, margin.

    Raises:
        MemoryError: None is left for scores; nothing was written.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    tau, floor, budget = (_dense(x) for x in hot[:3])
    state, stats = hot[3:]
    mask, bias, sinks, start, lengths, table = seen
    sinks = None if sinks is None else sinks.expand(q.shape[1])
    balance, bias, sinks, table = _dense(balance), None if bias is None else bias.float(), _dense(sinks), _table(table)
    batch, heads, queries, dim = q.shape
    value_dim = 2 * layout.value_width(planes[3])
    out = q.new_empty(batch, heads, queries, value_dim)
    lse, certificate = _details(batch, heads, queries) if details else (_NOTHING, _NOTHING)
    scale = options["scale"]
    call = _library.Attend(
        *_planes(planes, table), *_rotation(dim, options["rotation"]), *_rotation(value_dim, options["rotation"]),
        q.data_ptr(), DTYPES[q.dtype], batch, heads, queries, *q.stride()[:3],
        _address(balance), _sequence_step(balance, 3),
        _address(tau), _address(floor), _address(budget), *(_sequence_step(x, 2) for x in (tau, floor, budget)),
        state.data_ptr(), stats.data_ptr(), *_broadcast(mask), *_broadcast(bias), _address(sinks),
        *_integers(start), *_integers(lengths), int(options["keys"]), CAUSAL[options["causal"]], options["window"],
        dim**-0.5 if scale is None else scale, options["softcap"], RULES[options["rule"]], options["subtile"],
        options["guard_window"], options["guard_hold"], options["hysteresis"],
        out.data_ptr(), lse.data_ptr() if details else None, certificate.data_ptr() if details else None,
        torch.get_num_threads(),
    )  # fmt: skip
    if predicted is None:
        failed = _library.load().lamp_attend(_library.pointer(call))
    else:
        # What is made of other dtypes must live as long as the call.
        gate, _alive = _gate(*predicted, int(layout.tile_of(planes[0])), options)
        failed = _library.load().lamp_attend_predicted(_library.pointer(call), _library.pointer(gate))
    if failed:
        raise MemoryError(f"no memory for the scores of {heads // planes[0].shape[1]} x {options['keys']} keys")
    return Result(out, lse, certificate)


def summarize(
    keys: tuple[Tensor, ...], summary: Tensor, key: Tensor, key_bias: Tensor, positions: Tensor,
    table: Tensor | None, group: int,
) -> None:  # fmt: skip
    """``lamp::summarize`` of one new key of each sequence; ``keys`` are ``k_high``, ``k_residual`` and ``k_scale``."""
    key, key_bias, table = _weights(key), _dense(key_bias), _table(table)
    batch = keys[0].shape[0] if table is None else table.shape[0]
    call = _library.Summarize(
        *_planes((*keys, *keys), table), summary.data_ptr(), key.data_ptr(), DTYPES[key.dtype], key_bias.data_ptr(),
        batch, summary.shape[-1], group, *_integers(positions), torch.get_num_threads(),
    )  # fmt: skip
    _library.load().lamp_summarize(_library.pointer(call))


def _gate(
    kept: tuple[Tensor, ...], weights: tuple[Tensor, ...], tile: int, options: Mapping[str, Any]
) -> tuple[_library.Predict, tuple[Tensor, ...]]:
    summary, history, trust = kept
    query = _weights(weights[0])
    dense = tuple(_dense(x) for x in weights[1:])
    call = _library.Predict(
        summary.data_ptr(), history.data_ptr(), trust.data_ptr(), query.data_ptr(), DTYPES[query.dtype],
        *(x.data_ptr() for x in dense), query.shape[-1], tile * options["pages"] // summary.shape[2],
        history.shape[2], options["trained"], options["skip"],
    )  # fmt: skip
    return call, (query, *dense)


def _weights(x: Tensor) -> Tensor:
    return (x if x.dtype in DTYPES else x.float()).contiguous()


def _planes(planes: tuple[Tensor, ...], table: Tensor | None) -> tuple[int | None, ...]:
    k_high, v_high = planes[0], planes[3]
    pages = k_high.shape[2] if table is None else table.shape[1]
    return (
        *(plane.data_ptr() for plane in planes), _address(table), 0 if table is None else table.stride(0), pages,
        k_high.shape[2], layout.tile_of(k_high), layout.key_width(k_high), layout.value_width(v_high),
        k_high.shape[1], layout.by_lanes(k_high),
    )  # fmt: skip


_NOTHING = torch.empty(0, dtype=torch.float32)


def _details(batch: int, heads: int, queries: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and certificate, not written yet."""
    lse, certificate = (batch, heads, queries), (batch, heads, queries, 3)
    return torch.empty(lse, dtype=torch.float32), torch.empty(certificate, dtype=torch.float32)


@cache
def _signs(dim: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """The base matrix of the rotation: the upper left corner of all doublings."""
    base = rotation.base_order(dim)
    return np.ascontiguousarray(rotation.sign_matrix(dim)[:base, :base])


@cache
def _rotation(dim: int, kind: str) -> tuple[int | None, int]:
    """Address and order of the base matrix, which ``_signs`` keeps."""
    if kind == "none":
        return None, 0
    signs = _signs(dim)
    return signs.ctypes.data, signs.shape[0]


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor | None) -> Any:
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.to(torch.int32).contiguous()


def _sequence_step(x: Tensor | None, axes: int) -> int:
    """Step from one sequence to the next of a dense setting whose first of ``axes`` axes may be missing or shared."""
    return 0 if x is None or x.dim() < axes or x.shape[0] == 1 else x.stride(0)


def _integers(x: Tensor | None) -> tuple[int | None, int, int]:
    """One integer per sequence, or one for all."""
    return (None, 0, 0) if x is None else (x.data_ptr(), x.element_size(), 0 if x.numel() == 1 else x.stride(-1))


def _broadcast(x: Tensor | None) -> tuple[int | None, ...]:
    """A mask or bias that broadcasts to ``[B, H, S, N]``: address, steps, keys."""
    if x is None:
        return None, 0, 0, 0, 0, 0
    shape, steps = (1,) * (4 - x.dim()) + tuple(x.shape), (0,) * (4 - x.dim()) + x.stride()
    return x.data_ptr(), *(0 if n == 1 else step for n, step in zip(shape, steps, strict=True)), shape[3]
