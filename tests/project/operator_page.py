"""docs/operators.md, from the schemas: ``python -m tests.project.operator_page --write``."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from lamp_compile.runtime import fused_ops, linear, ops
from lamp_compile.runtime.network import ops as network_ops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operators.md"

HEAD = """\
# Operators

Generated from `lamp_compile/runtime/ops.py`, `fused_ops.py`, `network/ops.py` and `linear.py` (`make golden`). What
each operator of attention computes is defined by `lamp_compile/runtime/reference.py` and explained in
[concepts](concepts.md). Importing `lamp_compile.runtime.fused_ops` registers those of attention,
`lamp_compile.runtime.network.ops` those of look-ahead networks, `lamp_compile.runtime.linear` the last two; a saved
program that contains them needs these imports before it is loaded.

Shapes: B batch, H query heads, G kv heads, S queries, N keys, D head size, Dv value size; storage tiles of
`tile` keys (P of them), sub-tiles of `subtile` keys (T of them). Planes: `k_*` `[B, G, P, tile, width]`, `v_*`
`[B, G, P, width, tile]`, scales `[B, G, P * tile]`; or, on CPUs, by lanes
([concepts](concepts.md#nested8-byte-by-byte)): `k_*` `[B, G, P, width / 4, 32, 4]` and `v_*`
`[B, G, P, 8, width, 4]`, with a width of `v_*` that is a multiple of 16.

Arguments that mean the same everywhere:

| argument | shape | meaning |
|---|---|---|
| `balance` | `[G, D]` or `[B, G, D]` | divisor of the keys, factor of the query |
| `mask` | boolean, broadcast to `[B, H, S, N]` | True = attend |
| `bias` | float, broadcast to `[B, H, S, N]` | added to the scores after scale and soft-cap |
| `sinks` | `[H]` | logits that join the softmax's denominator only |
| `start`, `lengths` | `[B]` or `[1]` | first live key and number of keys of each sequence |
| `block_table` | int32 `[B, P]` | storage tiles of each sequence in a shared pool `[1, G, P_pool, ...]` |
| `tau`, `floor`, `budget` | `[G]` or `[B, G]` | hot settings |
| `state`, `stats` | `[B, G, 4]`, `[B, G, 7]`, or batch 1 | the guard's memory ([concepts](concepts.md#guard)) |
| `causal` | | `''`, `'top_left'` (query i at position i), `'bottom_right'` (at length - S + i) |
| `window` | | keys each query looks back; 0 = all; needs `causal` |
| `scale` | | factor on q.k; None = 1 / sqrt(D) |
| `keys` | | number of stored rows that may be live |
| `site` | | name of the attention, for reports |
"""

ABOUT = {
    "attention": """The meeting point: one attention, whatever its spelling was. Called as it stands it runs the
        reference under the default settings, without a guard. Gives the output `[B, H, S, Dv]`.""",
    "attention.cached": """The same over the planes of a cache. Gives the output and the guard's new state and
        statistics.""",
    "quantize": """Keys and values into planes: `k_high`, `k_residual`, `k_scale`, `v_high`, `v_residual`, `v_scale`.
        `tile` 0 leaves rows `[B, G, N, width]` for appending to a cache.""",
    "look_ahead": """Importance of each sub-tile, float `[B, G, S, T]`, from the high plane of K; -1 where no key is
        live.""",
    "select": """Precision of each sub-tile, uint8 `[B, G, S, T]`. `skip_below` is an opt-in: sub-tiles at or below
        it are not read.""",
    "attend": """Attention at these precisions: output `[B, H, S, Dv]`, natural log-sum-exp `[B, H, S]`, certificate
        `[B, H, S, 3]`.""",
    "guard": "Certificate against budget: new state and statistics.",
    "append": """New rows `k` `[B, G, n, D]`, `v` `[B, G, n, Dv]` into the planes, in place: row i of sequence b goes
        to position `positions[b] + i`. `positions` is int64 `[B]` or `[1]`; a sequence with a position below 0 takes
        nothing. One launch where [kernels](kernels.md) apply.""",
    "fused_attention": """`look_ahead`, `select`, `attend` and `guard` over a cache in one; gives the output and writes
        the guard's state and statistics in place. It stands in rewritten graphs where [kernels](kernels.md) apply;
        called anywhere else it runs the reference.""",
    "summarize": """Summaries, in place, of the groups that `rows` new keys fell into, the first of them at
        `positions`; `group` keys share one ([look-ahead networks](lookahead.md)).""",
    "predict": """Importance of each sub-tile from queries, summaries and what was important before, float
        `[B, G, S, T]`; -1 where no key is live. `seen` is the exact importance, for several rows at a time.""",
    "arbitrate": """Whom to believe, before a key is read: the importance to act on `[B, G, 1, T]`, and the importance
        at which sub-tiles are skipped `[B, G]`.""",
    "audit": """What the softmax weights of a step, at the precisions `levels`, say of its prediction: the new history
        and trust. `state` is that before the step.""",
    "attention.predicted": """The meeting point over a cache where a network has predicted. Gives the output, the
        guard's new state and statistics, the new history and trust.""",
    "fused_predicted": """`predict` and all that follows over a cache in one, for one new token of each sequence; gives
        the output and writes the guard's state and statistics, history and trust in place. It stands in rewritten
        graphs where [kernels](kernels.md) apply; called anywhere else it runs the reference.""",
    "linear_int8": """x `[..., K]` times INT8 weights `[N, K]` with scales `[N, groups]` over groups of inputs, plus
        bias `[N]`: `[..., N]` ([linears](linears.md)). With `dynamic` each row of x is rounded to 8 bits by a scale of
        its own, and there is one group.""",
    "in_memory": """A contiguous copy of x: where it stands, a compiler writes x down instead of computing it again
        inside the loop that follows.""",
}


def page() -> str:
    """The page as it should be."""
    parts = [HEAD]
    for name, schema in {**ops.SCHEMAS, **fused_ops.SCHEMAS, **network_ops.SCHEMAS, **linear.SCHEMAS}.items():
        inner, result = re.fullmatch(r"\((.*)\) -> (.*)", schema, re.DOTALL).groups()  # type: ignore[union-attr]
        about = textwrap.fill(" ".join(ABOUT[name].split()), 116)
        whole = re.sub(r"(?<=\w)(\??) (?=\w)", "\\1\N{NO-BREAK SPACE}", inner)  # lines break at commas only
        body = textwrap.fill(whole, 108, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        body = body.replace("\N{NO-BREAK SPACE}", " ")
        parts.append(f"\n## lamp::{name}\n\n{about}\n\n```text\nlamp::{name}(\n{body}\n) -> {result}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
