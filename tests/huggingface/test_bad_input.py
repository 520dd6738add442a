"""What goes wrong says what, where and what to try; what cannot be seen in advance is flagged, not hidden."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamp_compile
from lamp_compile.errors import CacheError, InputError, LampError, ModelError, OptionError, PlanError
from lamp_compile.runtime import guard
from tests.huggingface import reference

FLAG = guard.flag_names(guard.NONFINITE)[0]


def says(error: type[LampError], what: str) -> Any:
    """Expect an error whose first line holds ``what`` and which names a place and a way out."""
    return pytest.raises(error, match=rf"(?s){re.escape(what)}.*where: .*try: ")


def test_cache_of_another_model(model: Any, fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    foreign = lamp_compile.compile(model, mode="eager").lamp.cache()
    with says(CacheError, "another compiled model"):
        fast.generate(ids, past_key_values=foreign, **greedy)
    with says(CacheError, "another compiled model"):
        fast(ids, past_key_values=foreign)


def test_attention_weights_are_refused_not_left_out(ids: Tensor, greedy: dict[str, Any]) -> None:
    model = reference.build("Llama")  # eager: without LAMP it gives them
    fast = lamp_compile.compile(model, mode="eager")
    with says(InputError, "output_attentions=True"):
        fast(ids, output_attentions=True)
    with says(InputError, "output_attentions=True"):
        fast.generate(ids, output_attentions=True, return_dict_in_generate=True, **greedy)
    with lamp_compile.disable(), torch.no_grad():
        assert len(fast(ids, output_attentions=True).attentions) == 2


def test_plan_with_an_empty_balance(model: Any, fast: Any) -> None:
    rows = (replace(fast.lamp.plan.sites[0], balance=()), *fast.lamp.plan.sites[1:])
    with says(PlanError, "balance is 0 x 0"):
        lamp_compile.compile(model, plan=replace(fast.lamp.plan, sites=rows), mode="eager")


def test_batch_changed_midway(fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    cache = fast.lamp.cache()
    out = fast.generate(ids, past_key_values=cache, **greedy)
    with says(CacheError, "holds 2 sequences and 1 came"):
        fast(out[:1, -1:], past_key_values=cache)
    with says(CacheError, "holds 2 sequences and 6 came"):
        fast.generate(out, past_key_values=cache, num_beams=3, **greedy)
    layer = cache.layers[0]
    before = layer.k_high.clone()
    with says(CacheError, "holds 2 sequences and 3 came"):
        layer.update(torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 16))
    assert torch.equal(layer.k_high, before)


def test_other_heads_and_other_device(fast: Any) -> None:
    with says(CacheError, "a layer with 4 kv heads"):
        fast.lamp.cache().layers[0].update(torch.randn(1, 4, 1, 16), torch.randn(1, 4, 1, 16))
    with says(CacheError, "keys on meta"):
        fast.lamp.cache().layers[0].update(*(torch.randn(1, 2, 1, 16, device="meta") for _ in "kv"))


def test_integer_keys(fast: Any) -> None:
    with says(InputError, "int64"):
        fast.lamp.cache().layers[0].update(*(torch.ones(1, 2, 1, 16, dtype=torch.int64) for _ in "kv"))


def test_mask_of_odd_rank(fast: Any, ids: Tensor) -> None:
    k, v = fast.lamp.cache().layers[0].update(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16))
    from lamp_compile.frontends.huggingface.attention import lamp_attention

    with says(InputError, "a mask of shape (1, 4)"):
        lamp_attention(nn.Identity(), torch.randn(1, 4, 4, 16), k, v, torch.ones(1, 4, dtype=torch.bool))


def test_row_that_sees_nothing_is_zero(fast: Any) -> None:
    layer = fast.lamp.cache().layers[0]
    layer.update(torch.randn(1, 2, 4, 16), torch.randn(1, 2, 4, 16))
    mask = torch.zeros(1, 1, 2, 128, dtype=torch.bool)
    mask[..., 1, :4] = True
    out = layer.attend(torch.randn(1, 4, 2, 16), mask, None, None, causal="", window=0, scale=0.25, softcap=0.0)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 4, 16))
    assert out[:, :, 1].abs().min() > 0
    assert int(layer.stats[..., guard.BAD].sum()) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_nonfinite_input_is_flagged(fast: Any, bad: float, where: str) -> None:
    cache = fast.lamp.cache()
    layer = cache.layers[0]
    k, v = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    (k if where == "key" else v)[0, 1, 4, 3] = bad
    layer.update(k, v)
    q = torch.randn(2, 4, 1, 16)
    out = layer.attend(q, None, None, None, causal="bottom_right", window=0, scale=0.25, softcap=0.0)
    assert not out[0, 2:].isfinite().any(), "the two query heads of the planted kv head"
    assert out[0, :2].isfinite().all()
    assert out[1].isfinite().all(), "the other sequence"
    flags = layer.state[..., guard.FLAGS].long() & guard.NONFINITE
    assert flags.tolist() == [[0, 1], [0, 0]]
    assert FLAG in cache.guard_report()[0]["flags"]
    cache.crop(-5)
    layer.update(k[:, :, :1], v[:, :, :1])
    layer.attend(q, None, None, None, causal="bottom_right", window=0, scale=0.25, softcap=0.0)
    assert FLAG in cache.guard_report()[0]["flags"], "sticky"


def test_training_mode(model: Any, fast: Any, ids: Tensor, greedy: dict[str, Any]) -> None:
    with says(ModelError, "training mode"):
        lamp_compile.compile(model.train())
    fast.train()
    with says(ModelError, "training mode"):
        fast(ids)
    with says(ModelError, "training mode"):
        fast.generate(ids, **greedy)


def test_what_is_no_model() -> None:
    with says(ModelError, "str is not a torch.nn.Module"):
        lamp_compile.compile("meta-llama/Llama-3.1-8B")  # type: ignore[arg-type]
    with says(ModelError, "no attention"):
        lamp_compile.compile(nn.Sequential(nn.Linear(4, 4)).eval())


class _Plain(nn.Module):
    """Not built of torch's own layers alone, so that only running it tells."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_without_attention_on_the_first_call() -> None:
    fast = lamp_compile.compile(_Plain().eval(), mode="eager")
    with says(ModelError, "nothing was compiled yet"):
        fast.lamp.report()
    with says(ModelError, "no attention"):
        fast(torch.ones(3))


def test_weights_that_cannot_run(model: Any) -> None:
    with says(ModelError, "meta device"):
        lamp_compile.compile(model.to("meta"))
    whole = reference.build("Llama")
    whole.lm_head.weight = nn.Parameter(torch.ones(128, 64, dtype=torch.int8), requires_grad=False)
    with says(ModelError, "lm_head.weight is torch.int8"):
        lamp_compile.compile(whole)


def test_compiled_twice(fast: Any) -> None:
    with says(ModelError, "compiled already"):
        lamp_compile.compile(fast)
    with says(ModelError, "torch.compile already"):
        lamp_compile.compile(torch.compile(_Plain().eval()))


def test_refused_family() -> None:
    with says(ModelError, "latent cache"):
        lamp_compile.compile(reference.build("DeepSeek-V3"))


def test_failed_compile_leaves_the_model_alone() -> None:
    model = reference.build("DeepSeek-V3")
    with pytest.raises(ModelError):
        lamp_compile.compile(model, inplace=True)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mode": "max"}, "mode is 'max'"),
        ({"preset": "best"}, "unknown preset 'best'"),
        ({"tua": 0.1}, "unknown option 'tua'"),
        ({"balance": "maybe"}, "balance is 'maybe'"),
        ({"inplace": 1}, "inplace is 1"),
        ({"fuel": -1}, "fuel is -1"),
        ({"plan": 3}, "plan is a int"),
    ],
)
def test_options(model: Any, options: dict[str, Any], what: str) -> None:
    with says(OptionError, what):
        lamp_compile.compile(model, **options)


def test_options_beside_a_plan(model: Any, fast: Any) -> None:
    for options in ({"tau": 0.1}, {"preset": "aggressive"}, {"balance": "never"}):
        with says(OptionError, f"'{next(iter(options))}' next to a plan"):
            lamp_compile.compile(model, plan=fast.lamp.plan, **options)


def test_plan_for_another_model(model: Any, fast: Any, tmp_path: Any) -> None:
    other = lamp_compile.compile(reference.build("GPT-2"), mode="eager").lamp.plan
    with says(PlanError, "this plan was made for GPT2LMHeadModel"):
        lamp_compile.compile(model, plan=other, mode="eager")
    with says(PlanError, "no site 'transformer.h.0.attn'"):
        lamp_compile.compile(model, plan=replace(other, fingerprint=""), mode="eager")
    missing = replace(fast.lamp.plan, sites=fast.lamp.plan.sites[:1])
    with says(PlanError, "no site 'model.layers.1.self_attn'"):
        lamp_compile.compile(model, plan=missing, mode="eager")
    with says(PlanError, "cannot read the plan"):
        lamp_compile.compile(model, plan=tmp_path / "none.json", mode="eager")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tau": (0.1, 0.1, 0.1)}, "tau has 3 numbers"),
        ({"balance": ((1.0,) * 16,)}, "balance is 1 x 16"),
        ({"tile": 96}, "tile is 96"),
        ({"k_format": "int3"}, "k_format is 'int3'"),
    ],
)
def test_plan_edited_to_nonsense(model: Any, fast: Any, change: dict[str, Any], what: str) -> None:
    first, *rest = fast.lamp.plan.sites
    plan = replace(fast.lamp.plan, sites=(replace(first, **change), *rest))
    with says(PlanError, what):
        lamp_compile.compile(model, plan=plan, mode="eager")


def test_explain_needs_inputs_for_a_plain_module() -> None:
    with says(OptionError, "example_inputs is NoneType"):
        lamp_compile.explain(nn.MultiheadAttention(32, 2).eval())
    with says(OptionError, "'mode' has no meaning here"):
        lamp_compile.explain(nn.MultiheadAttention(32, 2).eval(), mode="eager")


def test_own_mask_covers_the_tokens_held_or_is_refused(fast: Any, ids: Tensor) -> None:
    step = torch.full((2, 1), 7)
    seen: dict[int, Tensor] = {}
    for width in (41, 128):
        cache = fast.lamp.cache(64)
        with torch.no_grad():
            fast(ids, past_key_values=cache)
            mask = torch.ones(2, 1, 1, width, dtype=torch.bool)
            mask[..., 41:] = False
            mask[..., 5] = False
            seen[width] = fast(step, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(seen[41], seen[128])
    for width in (20, 200):
        cache = fast.lamp.cache(64)
        mask = torch.ones(2, 1, 1, width, dtype=torch.bool)
        with torch.no_grad():
            fast(ids, past_key_values=cache)
            with pytest.raises(InputError, match=f"mask over {width} keys"):
                fast(step, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("capacity", [0, -1, 1.5, "5", True])
def test_a_capacity_that_is_no_number_of_tokens(fast: Any, capacity: Any) -> None:
    with says(OptionError, f"capacity={capacity!r}"):
        fast.lamp.cache(capacity)
