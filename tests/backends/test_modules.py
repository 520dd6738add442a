"""Modules that ``lamp_compile.compile`` takes as graphs."""

from __future__ import annotations

import copy

import torch

import lamp_compile
from tests.backends.modules import stack, tokens
from tests.passes.test_patterns import EXACT, close


def test_deep_copy_of_a_compiled_module_runs_its_own_weights():
    model, x = stack(), tokens(40)
    fast = lamp_compile.compile(model, mode="eager", **EXACT)
    with torch.no_grad():
        close(fast(x), model(x))
        copied, plain = copy.deepcopy(fast), copy.deepcopy(model)
        for module in (copied, plain):
            module.layers[0].out.weight.mul_(-2)
        close(copied(x), plain(x))
        close(fast(x), model(x))
        with lamp_compile.disable():
            assert torch.equal(copied(x), plain(x))
            assert torch.equal(fast(x), model(x))


def test_plan_of_a_module_of_several_graphs_can_be_used_again():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = stack(1), stack(1, kv_heads=2)

        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    model, x = Broken().eval(), tokens(40)
    with torch.no_grad():
        fast = lamp_compile.compile(model, mode="eager", **EXACT)
        fast(x)
        plan = fast.lamp.plan
        assert [row.name for row in plan.sites] == ["first.layers.0", "second.layers.0"]
        again = lamp_compile.compile(model, mode="eager", plan=plan)
        close(again(x), model(x))
    assert len(again.lamp.report().rewritten) == 2
