"""The compiled decode step: one graph, no breaks, no recompiles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.errors import CacheError
from lamp_compile.frontends.huggingface import route
from tests.huggingface import reference

pytestmark = pytest.mark.usefixtures("fresh_graphs")


class Recorder:
    """A backend that lowers to eager and remembers the graphs it got."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.fixture
def greedy() -> dict[str, Any]:
    """Few tokens: these tests are about how many graphs there are."""
    return {**reference.GREEDY, "max_new_tokens": 4}


def lowered_to_eager(model: Any, **options: Any) -> Any:
    """Compiled with the real passes, without the cost of Inductor."""
    fast = lamp_compile.compile(model, mode="eager", **options)
    fast.lamp.mode = "default"
    backend = lamp_compile.backend(plan=route.decode_plan(fast), controls=fast.lamp.controls, lower="eager")
    route.compile_decoding(fast, backend)
    return fast


def graphs() -> tuple[int, int]:
    """Graphs compiled so far, and graph breaks."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "gpt-oss"])
def test_one_graph_and_the_eager_tokens(name: str, ids: Tensor, greedy: dict[str, Any]) -> None:
    model = reference.build(name)
    fast = lowered_to_eager(model)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    wanted = lamp_compile.compile(model, mode="eager").generate(ids, attention_mask=mask, **greedy)
    for _ in range(2):
        assert torch.equal(fast.generate(ids, attention_mask=mask, **greedy), wanted)
        assert graphs() == (1, 0)
    (report,) = fast.lamp.backend.reports
    assert report.rewritten == fast.lamp.report().rewritten != ()


def test_nothing_that_changes_between_calls_recompiles(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lowered_to_eager(model)
    fast.generate(ids, **greedy)
    cache = fast.lamp.cache()
    cache_user = fast.generate(ids, past_key_values=cache, **greedy)
    for settings in ({"tau": 0.5, "floor": 1}, {"floor": [0, 1], "tau": [0.1, 0.2], "budget": 0.01}):
        fast.lamp.controls.set(**settings)
        fast.generate(ids[:, :9], **{**greedy, "do_sample": True})
    fast.generate(cache_user, past_key_values=cache, **greedy)
    assert graphs() == (1, 0)
    fast.generate(torch.cat((ids, ids, ids, ids), dim=1), **greedy)
    assert graphs() == (2, 0), "another capacity is another graph"


def test_controls_act_on_the_compiled_step(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lowered_to_eager(model)
    shares = []
    for settings in ({"tau": 1e9}, {"tau": 0.0}):
        fast.lamp.controls.set(**settings)
        cache = fast.lamp.cache()
        fast.generate(ids, past_key_values=cache, **greedy)
        shares.append([site["refined_share"] for site in cache.guard_report()])
    assert shares == [[0.0, 0.0], [1.0, 1.0]]
    assert graphs() == (1, 0)


@pytest.mark.parametrize(("where", "store"), [("cpu_kernels", "append"), ("reference_only", "quantize")])
def test_the_graph_holds_the_planes_and_no_floats(
    where: str, store: str, model: Any, ids: Tensor, greedy: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(where)
    fast = lamp_compile.compile(model, mode="eager")
    recorder = Recorder()
    fast.lamp.mode = "default"
    route.compile_decoding(fast, recorder)
    fast.generate(ids, **greedy)
    (graph,) = recorder.graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum(target == "lamp.attention.cached" for target in targets) == 2
    assert {target for target in targets if "lamp." in target} == {"lamp.attention.cached", f"lamp.{store}"}
    assert sum(target == f"lamp.{store}" for target in targets) == 2
    values = [node.meta.get("example_value") for node in graph.graph.nodes]
    floats = [
        v for v in values if isinstance(v, Tensor) and v.dtype == torch.float32 and 128 in v.shape and v.dim() == 4
    ]
    assert not floats, "nothing as long as the cache in float32"


def test_refused_layers_compile_too(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    wanted = lamp_compile.compile(model, mode="eager", fuel=1).generate(ids, **greedy)
    fast = lowered_to_eager(model, fuel=1)
    assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert graphs() == (1, 0)
    assert fast.lamp.backend.reports[0].rewritten == ("model.layers.0.self_attn",)


def test_inductor(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lamp_compile.compile(model, mode="default")
    wanted = lamp_compile.compile(model, mode="eager").generate(ids, **greedy)
    assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert graphs() == (1, 0)
    assert len(fast.lamp.backend.reports[0].rewritten) == 2


def test_beyond_capacity_grows_between_compiled_steps(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lowered_to_eager(model)
    prompt = torch.cat((ids, ids, ids), dim=1)[:, :118]
    cache = fast.lamp.cache()
    out = fast.generate(prompt, past_key_values=cache, **{**greedy, "max_new_tokens": 10})
    assert cache.capacity == 128
    longer = fast.generate(out, past_key_values=cache, **greedy)
    assert cache.capacity == 256
    assert torch.equal(longer[:, -4:], fast.generate(out, **greedy)[:, -4:])


@pytest.mark.usefixtures("reference_only")
def test_own_compiled_call_beyond_capacity_is_an_error_and_overwrites_nothing(fast: Any, ids: Tensor) -> None:
    cache = fast.lamp.cache()
    prompt = torch.cat((ids, ids, ids, ids), dim=1)[:, :128]
    reference.logits(fast, prompt, past_key_values=cache)
    before = [getattr(cache.layers[0], name).clone() for name in cache.layers[0].per_sequence]
    step = torch.compile(fast.forward, backend="aot_eager", fullgraph=True)
    with pytest.raises((RuntimeError, IndexError), match=r"out of (range|bounds)"), torch.no_grad():
        step(ids[:, :1], past_key_values=cache)
    after = [getattr(cache.layers[0], name) for name in cache.layers[0].per_sequence]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.usefixtures("cpu_kernels")
def test_own_compiled_call_beyond_capacity_is_an_error_of_kernels_too(fast: Any, ids: Tensor) -> None:
    cache = fast.lamp.cache()
    prompt = torch.cat((ids, ids, ids, ids), dim=1)[:, :128]
    reference.logits(fast, prompt, past_key_values=cache)
    names = [name for name in cache.layers[0].per_sequence if name.startswith(("k_", "v_"))]
    assert len(names) == 6
    before = [getattr(cache.layers[0], name).clone() for name in names]
    step = torch.compile(fast.forward, backend="aot_eager", fullgraph=True)
    with pytest.raises(CacheError, match="do not fit into planes for 128 keys"), torch.no_grad():
        step(ids[:, :1], past_key_values=cache)
    after = [getattr(cache.layers[0], name) for name in names]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_eager_call_after_own_compiled_steps_grows_in_time(fast: Any, ids: Tensor) -> None:
    cache = fast.lamp.cache(128)
    step = torch.compile(fast.forward, backend="eager", fullgraph=True)
    tokens = ids[:, torch.arange(130) % ids.shape[1]]
    reference.logits(fast, tokens[:, :9], past_key_values=cache)
    for position in range(9, 110):
        with torch.no_grad():
            step(tokens[:, position : position + 1], past_key_values=cache)
    assert graphs() == (1, 0)
    got = reference.logits(fast, tokens[:, 110:], past_key_values=cache)
    assert (cache.capacity, int(cache.get_seq_length())) == (256, 130)
    assert torch.equal(got[:, -1].argmax(-1), reference.logits(fast, tokens)[:, -1].argmax(-1))


def test_deep_copy_decodes_with_its_own_weights(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lowered_to_eager(model)
    wanted = fast.generate(ids, **greedy)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.lm_head.weight.copy_(fast.lm_head.weight.flip(0))
    got = copied.generate(ids, **greedy)
    out = copied(ids)
    for position in range(ids.shape[1], got.shape[1]):
        token = out.logits[:, -1:].argmax(-1)
        assert torch.equal(token, got[:, position : position + 1])
        out = copied(token, past_key_values=out.past_key_values)
    assert torch.equal(fast.generate(ids, **greedy), wanted)


def test_disabled_generate_compiles_nothing(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast = lowered_to_eager(model)
    with lamp_compile.disable():
        assert torch.equal(fast.generate(ids, **greedy), model.generate(ids, **greedy))
    assert graphs() == (0, 0)


def test_own_compiled_call_without_a_cache_is_never_silent(fast: Any, ids: Tensor) -> None:
    wanted = reference.logits(fast, ids)
    with pytest.raises(Exception, match="a compiled call without a cache"), torch.no_grad():
        torch.compile(fast.forward, backend="eager", fullgraph=True)(ids)
    with torch.no_grad():
        out = torch.compile(fast, backend="eager")(ids)
    assert isinstance(out.past_key_values, lamp_compile.NestedCache), "with a graph break the cache is made outside"
    assert torch.equal(out.logits, wanted)


def test_a_long_generation_on_a_given_cache_grows_it_once_and_before_it_starts(model: Any, ids: Tensor) -> None:
    fast = lowered_to_eager(model)
    cache = fast.lamp.cache(40)
    assert cache.capacity == 128
    fast.generate(ids, past_key_values=cache, **{**reference.GREEDY, "max_new_tokens": 100})
    assert cache.capacity > 128
    assert graphs() == (1, 0)
