"""Prompts into an empty cache attend to their own keys and values as they came, where that is the faster way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.runtime import prompt
from tests.huggingface import reference
from tests.tolerances import ARITHMETIC, MODEL

pytestmark = pytest.mark.usefixtures("one_thread")
LOOSE = {"tau": 1e9}
"""Nothing is refined: what comes from planes is then far from what comes from floats."""


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The way is open on this device, for short prompts too; rows of each attention that took it."""
    rows: list[int] = []
    attend = prompt.attend

    def counted(q: Tensor, *args: Any, **options: Any) -> Tensor | str:
        out = attend(q, *args, **options)
        rows.extend([] if isinstance(out, str) else [q.shape[2]])
        return out

    monkeypatch.setattr(prompt, "least_rows", lambda device: 16)
    monkeypatch.setitem(prompt.DTYPES, "cpu", prompt.DTYPES["cuda"])
    monkeypatch.setattr(prompt, "attend", counted)
    return rows


@pytest.fixture
def model() -> Any:
    return reference.build("Llama", "sdpa").to(torch.bfloat16)


def compiled(model: Any) -> Any:
    return lamp_compile.compile(model, mode="eager", balance="never", **LOOSE)


def first_logits(model: Any, ids: Tensor, cache: Any = None, **given: Any) -> Tensor:
    """Logits of the first new token: ``generate`` without padding makes no mask."""
    kept = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        ids, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True, **kept, **given,
    )  # fmt: skip
    logits: Tensor = out.logits[0]
    return logits


def close(got: Tensor, wanted: Tensor) -> bool:
    return reference.relative(got, wanted) < ARITHMETIC[torch.bfloat16].relative * 2


def test_a_prompt_is_the_original_models(served: list[int], model: Any, ids: Tensor) -> None:
    fast = compiled(model)
    cache = fast.lamp.cache()
    assert close(first_logits(fast, ids, cache), first_logits(model, ids))
    assert served == [40, 40]
    assert cache.guard_report()[0]["refined_share"] == 0.0
    after = reference.logits(fast, ids[:, :1], past_key_values=cache)
    assert served == [40, 40], "one token is a step"
    assert not close(after, reference.logits(model, torch.cat((ids, ids[:, :1]), dim=1))[:, -1:])


@pytest.mark.parametrize("name", ["avx512", "avx2", "neon", "portable", ""])
def test_cpus_whose_kernels_are_slower_go_this_way(
    name: str, model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "" the reference runs. float32, too: a CPU's flash attention takes it."""
    taken: list[Any] = []
    attend = prompt.attend
    monkeypatch.setattr(prompt.cpu, "instruction_set", lambda: name)
    monkeypatch.setattr(prompt, "attend", lambda *given: taken.append(attend(*given)) or taken[-1])
    model = model.float()
    fast = compiled(model)
    long = ids[:, : prompt.LEAST_ROWS["cpu"]]
    wanted = first_logits(model, long)
    got = first_logits(fast, long)
    slower = name != "avx512"
    assert [type(out) for out in taken] == [Tensor, Tensor] * slower
    assert (reference.relative(got, wanted) < ARITHMETIC[torch.float32].relative * 2) == slower
    notes = "\n".join(fast.lamp.report().notes)
    assert ("attends to its keys and values as they came" in notes) == slower
    first_logits(fast, long[:, :-1])
    assert len(taken) == 2 * slower, "short ones read the planes"


def test_planes_are_written_all_the_same(
    served: list[int], model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []
    for least in (16, math.inf):
        monkeypatch.setattr(prompt, "least_rows", lambda device, least=least: least)
        fast = compiled(model)
        caches.append(fast.lamp.cache())
        first_logits(fast, ids, caches[-1])
    assert served == [40, 40]
    one, two = (cache.layers[0] for cache in caches)  # what the second layer stores depends on the first's output
    assert all(map(torch.equal, one.planes, two.planes))
    assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length()) == 40


@pytest.mark.parametrize("case", ["second part", "short", "float32", "measured by the reference"])
def test_what_reads_the_planes_as_ever(served: list[int], model: Any, ids: Tensor, case: str) -> None:
    if case == "float32":
        model = model.float()
    fast = compiled(model)
    cache = fast.lamp.cache()
    if case == "second part":
        first_logits(fast, ids[:, :20], cache)
        assert served == [20, 20]
        served.clear()
    if case == "measured by the reference":
        for layer in cache.layers:
            layer.reference_only = True
    first_logits(fast, ids[:, :10] if case == "short" else ids, cache)
    assert not served
    notes = "\n".join(fast.lamp.report().notes)
    assert ("float32, and flash attention takes" in notes) == (case == "float32")
    assert ("attends to its keys and values as they came" in notes) == (case != "float32")


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_padding_and_windows_as_a_mask(served: list[int], name: str, ids: Tensor) -> None:
    """Rows of padding see nothing, and give 0: what follows is as if they were not there."""
    model = reference.build(name, "sdpa").to(torch.bfloat16)
    fast = compiled(model)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = fast.lamp.cache()
    got = first_logits(fast, ids, cache, attention_mask=mask)
    assert close(got, first_logits(model, ids, attention_mask=mask))
    assert served == [40, 40]
    assert close(got[1:], first_logits(model, ids[1:, 5:]))
    assert all(layer.v_scale.isfinite().all() for layer in cache.layers)
    served.clear()
    assert close(reference.logits(fast, ids), reference.logits(model, ids)), "a forward of one's own makes masks"
    assert served == [40, 40]


def test_reset_empties(served: list[int], model: Any, ids: Tensor) -> None:
    fast = compiled(model)
    cache = fast.lamp.cache()
    for _ in range(2):
        first_logits(fast, ids, cache)
        cache.reset()
    assert served == [40, 40] * 2


def test_slots_that_are_refilled(served: list[int], model: Any, ids: Tensor) -> None:
    fast = compiled(model)
    prompts = [ids[0, :20].tolist(), ids[1, :33].tolist(), ids[0, :18].tolist(), ids[1, :9].tolist()]
    dict(fast.lamp.generate_many(prompts, max_new_tokens=[6, 3, 4, 2], streams=2, eos_token_id=None))
    assert sorted(served) == sorted([20, 20, 33, 33, 18, 18])
    cache = fast.lamp.slots(1, 128)
    served.clear()
    view = cache.view(cache.admit(64))
    reference.logits(fast, ids[:1], past_key_values=view)
    reference.logits(fast, ids[:1, :20], past_key_values=view)
    assert served == [40, 40], "the second part of a prompt is not alone"


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "gpt-oss"])
def test_windows_softcaps_and_sinks(served: list[int], name: str, ids: Tensor) -> None:
    """A window becomes a mask; of soft-caps and sinks torch's attention knows nothing, and planes are read."""
    model = reference.build(name, "eager").to(torch.bfloat16)
    fast = lamp_compile.compile(model, mode="eager", floor=1)
    got, wanted = first_logits(fast, ids), first_logits(model, ids)
    assert reference.relative(got, wanted) < MODEL.relative
    assert served == ([40, 40] if name == "Mistral" else [])
    slow = [note for note in fast.lamp.report().notes if prompt.SLOWLY in note]
    reason = {"Mistral": [], "Gemma 2": ["a soft-cap"], "gpt-oss": ["sinks"]}[name]
    assert slow == [f"2 {prompt.SLOWLY}{why}" for why in reason], "a slow way that nobody asked for is said"


def test_what_is_generated_does_not_depend_on_shadow_steps(served: list[int], model: Any, ids: Tensor) -> None:
    """Nor does it count a prompt's way as an error: nothing of it is approximated."""
    prompts, made = [ids[0, :20].tolist(), ids[1, :33].tolist(), ids[0, :18].tolist()], []
    for share in (0.0, 1.0):
        fast = lamp_compile.compile(model, mode="eager", balance="never", shadow=share, **LOOSE)
        made.append(dict(fast.lamp.generate_many(prompts, max_new_tokens=5, streams=2, eos_token_id=None)))
        fast = lamp_compile.compile(model, mode="eager", balance="never", shadow=share, **LOOSE)
        first_logits(fast, ids)
    assert all(torch.equal(made[0][i], made[1][i]) for i in range(3))
    assert not fast.lamp.statistics().shadow["sites"]
    assert fast.lamp.statistics().shadow["kl"] in (None, 0.0)


def test_a_slot_that_a_graph_filled_is_not_empty(served: list[int], model: Any, ids: Tensor) -> None:
    fast = lamp_compile.compile(model, mode="eager", balance="never", floor=1)
    cache = fast.lamp.slots(2, 256)
    step: Any = torch.compile(fast.forward, backend="eager", fullgraph=True)
    logits = []
    for forward in (fast, step):
        torch._dynamo.reset()
        slot = cache.admit(100)
        view = cache.view(slot, upto=100)
        with torch.no_grad():
            forward(ids[:1, :20], past_key_values=view, use_cache=True)
            served.clear()
            logits.append(fast(ids[:1, 20:], past_key_values=view, use_cache=True).logits)
        assert not served
        assert cache.length(slot) == 40
    assert reference.relative(*logits) < MODEL.relative
