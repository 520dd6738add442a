"""The argument stays what it was; the result shares its weights, and can be switched off, copied and saved."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaForCausalLM, StaticCache

import lamp_compile
from lamp_compile.plan import Plan
from tests.huggingface import reference
from tests.tolerances import ARITHMETIC, TIPPED


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_argument_is_untouched_and_shares_its_weights(model: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    wanted, config, attributes = model.generate(ids, **greedy), model.config.to_dict(), set(vars(model))
    generation = model.generation_config.to_dict()
    fast = lamp_compile.compile(model, mode="eager")
    fast.generate(ids, **greedy)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert model.config._attn_implementation == "eager"
    assert set(vars(model)) == attributes
    assert all(tensor is tensors(fast)[name] for name, tensor in tensors(model).items())
    assert fast.lamp.original is model
    assert torch.equal(model.generate(ids, **greedy), wanted)


def test_no_class_is_patched(fast: Any) -> None:
    assert LlamaForCausalLM.forward is fast.forward.__func__.__wrapped__
    other = reference.build("Llama")
    assert not {"forward", "generate", "lamp"} & set(vars(other))
    assert inspect.signature(fast.forward) == inspect.signature(other.forward)


def test_inplace(model: Any, ids: Tensor) -> None:
    before = reference.logits(model, ids)
    fast = lamp_compile.compile(model, mode="eager", inplace=True)
    assert fast is model
    assert isinstance(fast(ids).past_key_values, lamp_compile.NestedCache)
    with lamp_compile.disable():
        assert torch.equal(reference.logits(fast, ids), before)
    assert all(tensor is tensors(fast.lamp.original)[name] for name, tensor in tensors(fast).items())


def test_disable_is_for_the_block_and_the_thread(model: Any, fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    elsewhere: list[Any] = []
    with lamp_compile.disable():
        assert torch.equal(reference.logits(fast, ids), reference.logits(model, ids))
        assert torch.equal(fast.generate(ids, **greedy), model.generate(ids, **greedy))
        thread = threading.Thread(target=lambda: elsewhere.append(fast(ids).past_key_values))
        thread.start()
        thread.join()
    assert isinstance(elsewhere[0], lamp_compile.NestedCache)
    assert isinstance(fast(ids).past_key_values, lamp_compile.NestedCache)


def test_deep_copy_and_save(fast: Any, ids: Tensor, greedy: dict[str, Any], tmp_path: Any) -> None:
    wanted = fast.generate(ids, **greedy)
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert torch.equal(fast.generate(ids, **greedy), wanted)
    assert not reference.logits(copied, ids).any(), "the copy runs its own weights"
    fast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, fast.lm_head.weight)
    assert loaded.config._attn_implementation != "lamp"


def test_cache_implementation_is_the_users_choice(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="cache_implementation is 'static': LAMP is off"):
        out = fast.generate(ids, cache_implementation="static", return_dict_in_generate=True, **greedy)
    assert isinstance(out.past_key_values, StaticCache)


def test_generate_returns_the_cache(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    out = fast.generate(ids, return_dict_in_generate=True, **greedy)
    assert isinstance(out.past_key_values, lamp_compile.NestedCache)
    assert int(out.past_key_values.get_seq_length()) == 51


def test_plan_round_trip(model: Any, ids: Tensor, greedy: dict[str, Any], tmp_path: Any) -> None:
    first = lamp_compile.compile(model, mode="eager", balance="always", tau=0.02)
    first.lamp.plan.save(tmp_path / "plan.json")
    again = lamp_compile.compile(model, mode="eager", plan=tmp_path / "plan.json")
    assert again.lamp.plan == Plan.load(tmp_path / "plan.json") == first.lamp.plan
    assert torch.equal(again.generate(ids, **greedy), first.generate(ids, **greedy))


def test_forward_takes_the_cache_by_position(fast: Any, ids: Tensor) -> None:
    wanted = reference.logits(fast, ids)
    with torch.no_grad():
        assert torch.equal(fast(ids, None, None, None).logits, wanted)
        cache = fast.lamp.cache()
        assert fast(ids, None, None, cache).past_key_values is cache
        embeds = fast.get_input_embeddings()(ids)
        assert torch.equal(fast(inputs_embeds=embeds).logits, wanted)


def test_attention_names_are_registered() -> None:
    assert "lamp" in AttentionInterface().valid_keys()


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def test_any_module_goes_through_the_graph() -> None:
    torch._dynamo.reset()
    model, x = _Encoder().eval(), torch.randn(2, 20, 64)
    fast = lamp_compile.compile(model, mode="eager", floor=2)
    assert all(tensor is tensors(fast)[name] for name, tensor in tensors(model).items())
    with torch.no_grad():
        wanted = model(x)
        assert reference.relative(fast(x), wanted) < ARITHMETIC[torch.float32].relative
        fast.lamp.controls.set(floor=0, tau=1e9)
        assert reference.relative(fast(x), wanted) > 10 * TIPPED[torch.float32].relative, "the graph must be ours"
        with lamp_compile.disable():
            assert torch.equal(fast(x), wanted)
    assert len(fast.lamp.report().rewritten) == 1
    assert any("quantised at every call" in note for note in fast.lamp.report().notes)


def test_encoder_decoder_generates_through_the_graph() -> None:
    torch._dynamo.reset()
    model = reference.build("T5")
    x = torch.randint(3, 128, (1, 9))
    fast = lamp_compile.compile(model, mode="eager", floor=2)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))
    assert len(fast.lamp.report().rewritten) == 4, (
        "decoder self and cross attention; generate runs the encoder by itself"
    )
    assert any("encoder by itself" in note for note in fast.lamp.report().notes)


def test_planes_are_lent_again_once_nobody_holds_them(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    """A captured CUDA graph is bound to addresses."""
    fast.lamp.mode = "reduce-overhead"
    wanted = fast.generate(ids, **greedy)
    first = fast.generate(ids, return_dict_in_generate=True, **greedy)
    layer = first.past_key_values.layers[0]
    held, stats = fast.generate(ids, return_dict_in_generate=True, **greedy), layer.stats.clone()
    assert held.past_key_values.layers[0] is not layer, "somebody still holds it"
    assert torch.equal(layer.stats, stats)
    del first, held
    again = fast.generate(ids, return_dict_in_generate=True, **greedy)
    assert torch.equal(again.sequences, wanted)
    assert again.past_key_values.guard_report()[0]["steps"] == 12, "its state starts anew"
    where = [layer.k_high.data_ptr() for layer in again.past_key_values.layers]
    del again, layer
    same = fast.generate(ids, return_dict_in_generate=True, **greedy)
    assert [layer.k_high.data_ptr() for layer in same.past_key_values.layers] == where
    del same
    other = fast.generate(ids[:1], return_dict_in_generate=True, **greedy)
    assert other.past_key_values.batch_size == 1
    del other
    fast.lamp.release()
    assert fast.lamp.borrow(40, 1).layers[0].batch_size == -1


def test_without_cuda_graphs_nothing_is_kept(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    fast.generate(ids, **greedy)
    assert not fast.lamp._idle


def test_disabled_copy_runs_its_own_weights(fast: Any, ids: Tensor) -> None:
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.get_output_embeddings().weight.mul_(-1)
        with lamp_compile.disable():
            ours, theirs = copied(ids).logits, fast(ids).logits
    torch.testing.assert_close(ours, -theirs)
