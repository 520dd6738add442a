"""CUDA graphs: the appended tensors stay static inputs, are read at every replay, and the guard's state is written."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.runtime import guard
from tests.backends.modules import stack, tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_reduce_overhead_is_captured_and_hot_tensors_stay_hot():
    torch._dynamo.reset()
    counters.clear()
    model, x = stack(kv_heads=2).cuda(), tokens(300).cuda()
    wanted = model(x)
    backend = lamp_compile.backend(floor=2, query_bits=0, tau=1e9, mode="reduce-overhead")
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(4):
        out = fast(x)
    assert len(backend.reports[0].rewritten) == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(out, wanted, atol=2e-4, rtol=0)
    backend.controls.set(floor=0)
    coarse = (fast(x) - wanted).abs().max()
    assert coarse > 1e-3
    backend.controls.set(floor=2)
    torch.testing.assert_close(fast(x), wanted, atol=2e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert backend.guard_state("layers.0")[1][0, :, guard.STEPS].tolist() == [6, 6]
