"""``compile(model, join_linears="always")``: q, k and v, gate and up, each one product in the compiled decode step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.errors import OptionError
from lamp_compile.frontends.huggingface import route
from tests.huggingface import reference
from tests.passes.joining import joined as lie_together
from tests.tolerances import ARITHMETIC

pytestmark = pytest.mark.usefixtures("fresh_graphs", "one_thread")
NOTE = "linear layers joined: 4 products instead of 10"


@pytest.fixture
def greedy() -> dict[str, Any]:
    return {**reference.GREEDY, "max_new_tokens": 4}


def joined(model: Any, **options: Any) -> Any:
    """Compiled with the real passes, without the cost of Inductor."""
    fast = lamp_compile.compile(model, mode="eager", **options)
    fast.lamp.mode = "default"
    plan = route.decode_plan(fast)
    backend = lamp_compile.backend(plan=plan, controls=fast.lamp.controls, lower="eager", join_linears="always")
    route.compile_decoding(fast, backend)
    return fast


def in_one_place(model: Any) -> bool:
    """Whether every group of its decoder layers lies together."""
    return all(
        lie_together(a.q_proj, a.k_proj, a.v_proj) and lie_together(m.gate_proj, m.up_proj)
        for a, m in ((layer.self_attn, layer.mlp) for layer in model.model.layers)
    )


@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_generate_gives_the_same_tokens_from_one_graph(name: str, ids: Tensor, greedy: dict[str, Any]) -> None:
    model = reference.build(name)
    wanted = lamp_compile.compile(model, mode="eager").generate(ids, **greedy)
    plain, logits = model.generate(ids, **greedy), reference.logits(model, ids)
    fast = joined(model)
    for _ in range(2):
        assert torch.equal(fast.generate(ids, **greedy), wanted)
        assert counters["stats"]["unique_graphs"] == 1
    assert NOTE in fast.lamp.report().text()
    assert in_one_place(fast)
    assert in_one_place(model), "the weights are shared"
    assert torch.equal(model.generate(ids, **greedy), plain)
    assert reference.relative(reference.logits(model, ids), logits) < ARITHMETIC[torch.float32].relative
    with lamp_compile.disable():
        assert torch.equal(fast.generate(ids, **greedy), plain)


def test_the_option_reaches_the_decode_step(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    wanted = lamp_compile.compile(model, mode="eager").generate(ids, **greedy)
    fast = lamp_compile.compile(model, mode="default", join_linears="always")
    assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert NOTE in fast.lamp.report().text()
    assert counters["stats"]["unique_graphs"] == 1
    places = [p.data_ptr() for p in fast.parameters()]
    other = lamp_compile.compile(model, mode="default")
    assert torch.equal(other.generate(ids, **greedy), wanted)
    assert NOTE not in other.lamp.report().text(), "auto does not on a CPU"
    assert [p.data_ptr() for p in model.parameters()] == places


def test_explain_counts_and_moves_nothing(model: Any) -> None:
    places = [p.data_ptr() for p in model.parameters()]
    assert NOTE in lamp_compile.explain(model, join_linears="always").text()
    assert "linear layers" not in lamp_compile.explain(model).text()
    assert [p.data_ptr() for p in model.parameters()] == places


def test_int8_layers_stay_as_they_are(model: Any) -> None:
    report = lamp_compile.explain(model, linears="int8", join_linears="always")
    assert "15 of 15 linear layers in INT8" in report.text()
    assert not [note for note in report.notes if "joined" in note]


def test_always_without_a_compiled_step_is_refused(model: Any) -> None:
    with pytest.raises(OptionError, match="compiles nothing"):
        lamp_compile.compile(model, mode="eager", join_linears="always")
    with pytest.warns(UserWarning, match="no layers are joined"):
        lamp_compile.compile(model, join_linears="always", exact_tier="host")


def test_what_is_saved_holds_every_weight_once(model: Any, ids: Tensor, greedy: dict[str, Any], tmp_path: Path) -> None:
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    fast = joined(model)
    fast.generate(ids, **greedy)
    assert in_one_place(model)
    for saved, folder in ((model, tmp_path / "model"), (fast, tmp_path / "fast")):
        saved.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(wanted)
            assert all(torch.equal(file.get_tensor(name), t) for name, t in wanted.items())
        loaded = type(model).from_pretrained(folder)
        assert all(torch.equal(t, wanted[name]) for name, t in loaded.state_dict().items())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    size, once = (tmp_path / "weights.pt").stat().st_size, sum(t.nbytes for t in wanted.values())
    assert size < 1.5 * once
    weight = model.model.layers[0].self_attn.k_proj.weight
    torch.save(weight, tmp_path / "weight.pt")
    assert (tmp_path / "weight.pt").stat().st_size < weight.nbytes + 4096, "its own rows alone"
    save_model(model, str(tmp_path / "again.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_change_and_copies_keep_their_own(tied: bool, ids: Tensor, greedy: dict[str, Any]) -> None:
    model = reference.build("Llama")
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    fast = joined(model)
    fast.generate(ids, **greedy)
    twin = copy.deepcopy(fast)
    before = twin.generate(ids, **greedy)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data = torch.randn_like(layer.self_attn.v_proj.weight)
        layer.mlp.up_proj.weight.data.mul_(-1)
    wanted = lamp_compile.compile(model, mode="eager").generate(ids, **greedy)
    assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert not torch.equal(wanted, before), "the change shows"
    assert torch.equal(twin.generate(ids, **greedy), before)
    assert in_one_place(model)
    assert in_one_place(twin)


def test_a_model_without_lamp_can_be_joined(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    wanted = model.generate(ids, **greedy)
    backend = lamp_compile.backend(fuel=0, lower="eager", join_linears="always")
    step = torch.compile(model.forward, backend=backend, fullgraph=True)
    with torch.no_grad():
        logits = step(ids, use_cache=False).logits
    assert torch.equal(logits[:, -1].argmax(-1), wanted[:, ids.shape[1]])
    (report,) = backend.reports
    assert NOTE in report.text()
    assert not report.rewritten
