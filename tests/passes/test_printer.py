"""A site before and after, as ``explain`` shows it. Accept a change with EXPECTTEST_ACCEPT=1."""

from __future__ import annotations

import torch
from expecttest import TestCase

from lamp_compile.driver import rewrite
from tests.backends.modules import stack, tokens


class TestPrinter(TestCase):
    """Golden text of one exported site."""

    maxDiff = None

    def report(self):
        program = torch.export.export(stack(kv_heads=2), (tokens(40),), strict=True)
        return rewrite(program).graph_module.meta["lamp_report"]

    def test_before(self) -> None:
        self.assertExpectedInline(
            self.report().before,
            """\
scaled_dot_product_attention: float32[2, 4, 40, 16] =
    sdpa(transpose, select, select_1, None, 0.0, True, enable_gqa=True)""",
        )

    def test_after(self) -> None:
        self.assertExpectedInline(
            self.report().after,
            """\
planes: (uint8[2, 2, 2, 32, 8], uint8[2, 2, 2, 32, 8], float16[2, 2, 64], uint8[2, 2, 2, 8, 32], uint8[2, 2,
    2, 8, 32], float16[2, 2, 64]) =
    lamp.quantize(k=select, v=select_1)
    k_format=nested8 v_format=nested8 rotation=hadamard tile=32
importance: float32[2, 2, 40, 2] =
    lamp.look_ahead(q=transpose, k_high=planes.0, k_scale=planes.2)
    causal=top_left keys=40 k_format=nested8 rotation=hadamard rule=energy query_bits=8 subtile=32
levels: uint8[2, 2, 40, 2] =
    lamp.select(importance=importance, tau=b_lamp_layers_0_tau, floor=b_lamp_layers_0_floor,
        state=b_lamp_layers_0_state)
    exact=True
attended: (float32[2, 4, 40, 16], float32[2, 4, 40], float32[2, 4, 40, 3]) =
    lamp.attend(q=transpose, k_high=planes.0, k_residual=planes.1, k_scale=planes.2, v_high=planes.3,
        v_residual=planes.4, v_scale=planes.5, levels=levels, k_exact=select, v_exact=select_1)
    causal=top_left keys=40 k_format=nested8 v_format=nested8 rotation=hadamard query_bits=8 subtile=32
guarded: (float32[1, 2, 4], int64[1, 2, 7]) =
    lamp.guard(out=attended.0, lse=attended.1, certificate=attended.2, levels=levels,
        state=b_lamp_layers_0_state, stats=b_lamp_layers_0_stats, floor=b_lamp_layers_0_floor,
        budget=b_lamp_layers_0_budget)
    window=16 hold=64 hysteresis=0.5 exact=True
copy__default: float32[1, 2, 4] = copy_(b_lamp_layers_0_state, guarded.0)
copy__default_1: int64[1, 2, 7] = copy_(b_lamp_layers_0_stats, guarded.1)""",
        )
