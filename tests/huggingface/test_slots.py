"""Many sequences of different lengths through a whole model: each as if it were alone, and one graph for all."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import lamp_compile
from lamp_compile.errors import CacheError, InputError, LampError, ModelError, OptionError
from lamp_compile.frontends.huggingface import route
from lamp_compile.runtime import guard
from tests.huggingface import reference
from tests.huggingface.test_compiled import lowered_to_eager
from tests.tolerances import MODEL, TIPPED, TIPPED_EIGHT

pytestmark = pytest.mark.usefixtures("fresh_graphs", "one_thread")
FAMILIES = ["Llama", "Mistral", "Qwen3", "Gemma 2", "Gemma 3", "gpt-oss", "GPT-2", "Phi-3", "Mixtral"]
LENGTHS = (5, 40, 17, 90, 3, 130, 64)


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


def row(tokens: list[int]) -> Tensor:
    return torch.tensor([tokens])


def steps_alone(fast: Any, prompt: list[int], fed: Tensor) -> Tensor:
    """Logits of the prompt's last position and of every fed token, in a cache of its own."""
    cache = fast.lamp.cache()
    found = [reference.logits(fast, row(prompt), past_key_values=cache)[:, -1]]
    for token in fed.tolist():
        found.append(reference.logits(fast, row([token]), past_key_values=cache)[:, -1])
    return torch.cat(found)


def says(error: type[LampError], what: str) -> Any:
    return pytest.raises(error, match=rf"(?s){re.escape(what)}.*where: .*try: ")


def graphs() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("tile", [32, 128])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_each_sequence_alone(name: str, tile: int) -> None:
    """Lengths below and above the window of 8, with it in all layers, some, or none; sinks; soft-caps."""
    model = reference.build(name)
    fast = lamp_compile.compile(model, mode="eager", tile=tile)
    asked = prompts((5, 40, 130))
    fed = torch.randint(3, 128, (6, 3), generator=torch.Generator().manual_seed(3))
    cache = fast.lamp.slots(streams=4, tokens=1024, max_length=256)
    together = []
    for prompt in asked:
        view = cache.view(cache.admit(len(prompt)))
        together.append([reference.logits(fast, row(prompt), past_key_values=view)[:, -1]])
    for tokens in fed:
        ids = torch.cat((tokens, torch.zeros(1, dtype=torch.int64)))[:, None]
        found = reference.logits(fast, ids, past_key_values=cache)
        for slot, logits in enumerate(together):
            logits.append(found[slot : slot + 1, -1])
    assert cache.lengths.tolist() == [11, 46, 136, 0]
    assert all(site["bad_steps"] == 0 and site["refined_share"] > 0 for site in cache.guard_report())
    for slot, prompt in enumerate(asked):
        wanted = steps_alone(fast, prompt, fed[:, slot])
        assert reference.relative(torch.cat(together[slot]), wanted) < TIPPED_EIGHT.relative
        straight = reference.logits(model, row(prompt + fed[:, slot].tolist()))[0, len(prompt) - 1 :]
        fast.lamp.controls.set(floor=1)
        refined = steps_alone(fast, prompt, fed[:, slot])
        fast.lamp.controls.set(floor=0)
        assert reference.relative(refined, straight) < MODEL.relative
        assert not bool((cache.layers[0].stats[3] != 0).any()), "an empty slot is in no statistic"


def test_generate_many_gives_what_generate_gives() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    asked = prompts()
    given = [asked[0], torch.tensor(asked[1]), torch.tensor(asked[2], dtype=torch.int32), *asked[3:]]
    order, found = zip(*fast.lamp.generate_many(given, max_new_tokens=12, streams=3), strict=True)
    assert sorted(order) == list(range(len(asked)))
    for index, tokens in zip(order, found, strict=True):
        assert torch.equal(tokens, fast.generate(row(asked[index]), **reference.GREEDY)[0])


def test_finished_slots_are_refilled_in_the_order_of_the_queue() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    cache = fast.lamp.slots(streams=2, tokens=1024, max_length=256)
    most = (9, 2, 3, 1, 2)
    seen = []
    admit = cache.admit
    cache.admit = lambda tokens: seen.append(admit(tokens)) or seen[-1]  # type: ignore[method-assign]
    asked = prompts((5, 6, 7, 8, 9))
    finished = list(fast.lamp.generate_many(asked, max_new_tokens=most, cache=cache))
    assert [index for index, _ in finished] == [1, 2, 3, 4, 0]
    assert seen == [0, 1, 1, 1, 1]
    assert [len(tokens) for _, tokens in sorted(finished)] == [len(p) + n for p, n in zip(asked, most, strict=True)]
    assert (cache.taken(), cache.free_tokens) == ([], 1024)


def test_eos_ends_a_sequence_and_is_part_of_it() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    asked = prompts()
    endless = dict(fast.lamp.generate_many(asked, max_new_tokens=12))
    eos = int(endless[1][len(asked[1]) + 4])
    for setting in ({"eos_token_id": eos}, {"eos_token_id": [eos, 999]}, {}):
        fast.generation_config.eos_token_id = None if setting else eos
        found = dict(fast.lamp.generate_many(asked, max_new_tokens=12, streams=3, **setting))
        assert len(found[1]) <= len(asked[1]) + 5
        for index, tokens in found.items():
            new = endless[index][len(asked[index]) :].tolist()
            stop = new.index(eos) + 1 if eos in new else 12
            assert tokens.tolist() == asked[index] + new[:stop]
    assert len(dict(fast.lamp.generate_many(asked[:2], max_new_tokens=12, eos_token_id=None))[1]) == len(asked[1]) + 12


def test_the_step_after_the_end_of_a_sequence_gives_nothing() -> None:
    """It was launched before the end was read: the last one that its length allows."""
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    asked = prompts((5, 40, 17))
    endless = dict(fast.lamp.generate_many(asked, max_new_tokens=12))
    new = endless[1][40:].tolist()
    at = max(index for index, token in enumerate(new[:11]) if token not in new[:index])
    assert at > 0
    cache = fast.lamp.slots(streams=2, tokens=512, max_length=256)
    found = list(fast.lamp.generate_many(asked, max_new_tokens=at + 2, cache=cache, eos_token_id=new[at]))
    assert sorted(index for index, _ in found) == [0, 1, 2]
    assert torch.equal(dict(found)[1], endless[1][: 40 + at + 1])
    assert cache.taken() == []


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "gpt-oss"])
def test_one_graph_while_sequences_come_and_go(name: str) -> None:
    model = reference.build(name)
    fast = lowered_to_eager(model)
    eager = lamp_compile.compile(model, mode="eager")
    cache = fast.lamp.slots(streams=3, tokens=600, max_length=256)
    where = [getattr(layer, name).data_ptr() for layer in cache.layers for name in layer.per_sequence]
    for run in range(2):
        asked = prompts(seed=run)
        found = dict(fast.lamp.generate_many(asked, max_new_tokens=8, cache=cache))
        wanted = dict(eager.lamp.generate_many(asked, max_new_tokens=8, streams=2))
        assert all(torch.equal(found[index], wanted[index]) for index in range(len(asked)))
        assert graphs() == (1, 0)
    fast.lamp.controls.set(tau=0.5, floor=1)
    list(fast.lamp.generate_many(prompts(), max_new_tokens=4, cache=cache, temperature=1.0))
    assert graphs() == (1, 0)
    assert [getattr(layer, name).data_ptr() for layer in cache.layers for name in layer.per_sequence] == where
    (report,) = fast.lamp.backend.reports
    assert report.rewritten == fast.lamp.report().rewritten != ()


def test_inductor_and_generate_keep_a_graph_each() -> None:
    model = reference.build("Llama")
    fast = lamp_compile.compile(model, mode="default")
    asked = prompts()
    eager = dict(lamp_compile.compile(model, mode="eager").lamp.generate_many(asked, max_new_tokens=6))
    for _ in range(2):
        found = dict(fast.lamp.generate_many(asked, max_new_tokens=6))
        assert all(torch.equal(found[index], tokens) for index, tokens in eager.items())
    assert graphs() == (1, 0)


def test_the_graph_writes_pages_in_place_and_masks_nothing() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    fast.lamp.mode = "default"
    seen: list[torch.fx.GraphModule] = []

    def recorder(graph: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    route.compile_decoding(fast, recorder)
    cache = fast.lamp.slots(streams=3, tokens=600, max_length=256)
    list(fast.lamp.generate_many(prompts(), max_new_tokens=4, cache=cache))
    (graph,) = seen
    targets = [str(node.target) for node in graph.graph.nodes]
    assert sum("lamp.append" in target for target in targets) == 2
    assert sum(target == "lamp.attention.cached" for target in targets) == 2
    values = [node.meta.get("example_value") for node in graph.graph.nodes]
    assert not [v for v in values if isinstance(v, Tensor) and v.dtype == torch.bool and v.shape[-1:] == (256,)]


def test_draws_depend_on_seed_and_index_only() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager", floor=1)
    asked = prompts()
    how = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    alone = dict(fast.lamp.generate_many(asked, streams=1, seed=7, **how))
    together = dict(fast.lamp.generate_many(asked, streams=4, seed=7, **how))
    assert all(torch.equal(alone[index], together[index]) for index in alone)
    other = dict(fast.lamp.generate_many(asked, seed=8, **how))
    assert not all(torch.equal(alone[index], other[index]) for index in alone)
    twins = dict(fast.lamp.generate_many([asked[0]] * 4, seed=7, **how))
    assert len({tuple(tokens.tolist()) for tokens in twins.values()}) > 1
    greedy = dict(fast.lamp.generate_many(asked, max_new_tokens=8))
    narrow = dict(fast.lamp.generate_many(asked, max_new_tokens=8, temperature=1.0, top_p=1e-9))
    assert all(torch.equal(greedy[index], narrow[index]) for index in greedy)
    global_seed = []
    for _ in range(2):
        torch.manual_seed(3)
        global_seed.append(dict(fast.lamp.generate_many(asked, **how)))
    assert all(torch.equal(global_seed[0][index], global_seed[1][index]) for index in alone)


def test_a_nan_in_one_slot_changes_no_bit_of_the_others() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    found = []
    for planted in (False, True):
        cache = fast.lamp.slots(streams=3, tokens=1024, max_length=256)
        for prompt in prompts((20, 30, 40)):
            reference.logits(fast, row(prompt), past_key_values=cache.view(cache.admit(60)))
        if planted:
            layer, page = cache.layers[0], int(cache.rows.block_table[1, 0])
            layer.k_scale[0, 1, page * layer.plan.tile + 4] = torch.nan
        logits = [reference.logits(fast, torch.tensor([[5], [6], [7]]), past_key_values=cache) for _ in range(2)]
        found.append((torch.cat(logits, dim=1), cache.guard_report(), cache))
    (clean, quiet, _), (spoilt, report, cache) = found
    for slot in (0, 2):
        assert torch.equal(spoilt[slot], clean[slot])
        assert not cache.view(slot).guard_report()[0]["flags"]
    assert spoilt[1].isnan().any()
    assert not quiet[0]["flags"]
    assert guard.flag_names(guard.NONFINITE)[0] in report[0]["flags"]
    assert cache.view(1).guard_report()[0]["flags"] == report[0]["flags"]


def test_prefill_in_chunks_while_others_decode() -> None:
    fast = lamp_compile.compile(reference.build("Mistral"), mode="eager", floor=1)
    first, second = prompts((30, 60))
    cache = fast.lamp.slots(streams=2, tokens=1024, max_length=256)
    one = cache.admit(64)
    reference.logits(fast, row(first), past_key_values=cache.view(one))
    two = cache.admit(96)
    cache.pause(two)
    for chunk in (second[:25], second[25:]):
        last = reference.logits(fast, row(chunk), past_key_values=cache.view(two))[:, -1]
        decoded = reference.logits(fast, torch.tensor([[9], [0]]), past_key_values=cache)
    assert cache.lengths.tolist() == [32, 60]
    cache.resume(two)
    both = reference.logits(fast, torch.tensor([[9], [11]]), past_key_values=cache)
    wanted = steps_alone(fast, second, torch.tensor([11]))
    assert reference.relative(torch.cat((last, both[1])), wanted) < TIPPED[torch.float32].relative
    wanted = steps_alone(fast, first, torch.tensor([9, 9, 9]))
    assert reference.relative(torch.cat((decoded[0], both[0])), wanted[2:]) < TIPPED[torch.float32].relative


def test_several_new_tokens_at_once_and_given_positions() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager", floor=1)
    asked, new = prompts((30, 7)), torch.tensor([[9, 10, 11], [12, 13, 14]])
    logits = []
    for given in (False, True):
        cache = fast.lamp.slots(streams=2, tokens=1024, max_length=256)
        for prompt in asked:
            reference.logits(fast, row(prompt), past_key_values=cache.view(cache.admit(len(prompt))))
        how = {"position_ids": torch.tensor([[30, 31, 32], [7, 8, 9]])} if given else {}
        logits.append(reference.logits(fast, new, past_key_values=cache, **how))
    assert torch.equal(*logits)
    for slot, prompt in enumerate(asked):
        wanted = reference.logits(fast, row(prompt + new[slot].tolist()))[0, -3:]
        assert reference.relative(logits[0][slot], wanted) < TIPPED[torch.float32].relative


def test_small_pool_waits_for_pages_instead_of_failing() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager", tile=32)
    asked = prompts()
    cache = fast.lamp.slots(streams=4, tokens=160, max_length=160)
    found = dict(fast.lamp.generate_many(asked, max_new_tokens=12, cache=cache))
    wide = dict(fast.lamp.generate_many(asked, max_new_tokens=12))
    assert all(torch.equal(found[index], tokens) for index, tokens in wide.items())
    assert cache.free_tokens == 160


def test_stopping_early_frees_the_slots() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    cache = fast.lamp.slots(streams=3, tokens=1024, max_length=256)
    first, second = (fast.lamp.generate_many(prompts((5, 6)), max_new_tokens=(2, 5), cache=cache) for _ in range(2))
    next(first)
    assert cache.taken() == [1]
    for call in (lambda: next(second), lambda: fast.lamp.generate_many(prompts(), max_new_tokens=5, cache=cache)):
        with says(CacheError, "slots 1 are taken, and a step would add tokens to them"):
            call()
    assert torch.is_grad_enabled(), "nothing of the loop's settings is left on between results"
    first.close()
    assert cache.taken() == []
    assert list(fast.lamp.generate_many([], max_new_tokens=5)) == []


def test_a_deep_copy_generates_with_its_own_weights() -> None:
    fast = lowered_to_eager(reference.build("Llama"))
    asked = prompts((5, 9))
    before = dict(fast.lamp.generate_many(asked, max_new_tokens=6))
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.lm_head.weight.copy_(fast.lm_head.weight.flip(0))
    other = dict(copied.lamp.generate_many(asked, max_new_tokens=6))
    flipped = [int(127 - token) for token in before[0][5:6]]
    assert other[0][5:6].tolist() == flipped
    assert all(torch.equal(dict(fast.lamp.generate_many(asked, max_new_tokens=6))[i], before[i]) for i in before)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([[]], "prompt 0 has shape (0,)"),
        ([[3, 4], [[5, 6]]], "prompt 1 has shape (1, 2)"),
        ([[0.5]], "prompt 0 has shape (1,), float32"),
        (["text"], "prompt 0 is a str"),
    ],
)
def test_prompts_are_checked_at_once(given: Any, what: str) -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    with says(InputError, what):
        fast.lamp.generate_many(given, max_new_tokens=4)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": [4]}, "max_new_tokens is [4] for 7 prompts"),
        ({"streams": 0}, "streams is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"eos_token_id": "end"}, "eos_token_id is 'end'"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], what: str) -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    with says(OptionError, what):
        fast.lamp.generate_many(prompts(), **{"max_new_tokens": 4, **options})


def test_what_does_not_fit_or_belong_is_refused_before_anything_runs() -> None:
    model = reference.build("Llama")
    fast = lamp_compile.compile(model, mode="eager")
    cache = fast.lamp.slots(streams=2, tokens=1024, max_length=128)
    with says(CacheError, "prompt 5 needs 133 tokens"):
        fast.lamp.generate_many(prompts(), max_new_tokens=4, cache=cache)
    other = lamp_compile.compile(model, mode="eager")
    with says(CacheError, "another compiled model"):
        other.lamp.generate_many(prompts(), max_new_tokens=4, cache=cache)
    with says(CacheError, "1 sequences came to 2 slots"):
        fast(row([5]), past_key_values=cache)
    with says(CacheError, "generate or ensure_capacity does not work on a slot cache"):
        fast.generate(torch.tensor([[5], [6]]), past_key_values=cache, **reference.GREEDY)
    slot = cache.admit(9)
    mask = torch.tensor([[0, 1, 1]])
    with says(InputError, "a padding mask came with a cache that takes none"):
        fast(row([5, 6, 7]), attention_mask=mask, past_key_values=cache.view(slot))
    with says(CacheError, "a mask came with a slot cache"):
        fast(row([5]), attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool), past_key_values=cache.view(slot))
    with lamp_compile.disable(), says(CacheError, "asked for as floats"):
        fast(row([5, 6, 7]), past_key_values=cache.view(slot))
    assert cache.length(slot) == 0
    fast(row([5, 6, 7]), attention_mask=torch.ones(1, 3), past_key_values=cache.view(slot))
    assert cache.length(slot) == 3
    with says(ModelError, "training mode"):
        fast.train().lamp.generate_many(prompts(), max_new_tokens=4)


def test_models_that_need_more_than_lengths_are_refused() -> None:
    with says(CacheError, "layer 1 keeps float keys and values"):
        lamp_compile.compile(reference.build("Llama"), mode="eager", fuel=1).lamp.slots()
    fast = lamp_compile.compile(reference.build("Mistral"), mode="eager")
    fast.lamp.original.config.sliding_window = None
    with says(CacheError, "its mask is not causality and a window alone"):
        fast.lamp.slots()
    fast = lamp_compile.compile(reference.build("Gemma 3"), mode="eager")
    fast.lamp.original.config.layer_types = ["chunked_attention", "full_attention"]
    with says(CacheError, "chunked_attention is not causality"):
        fast.lamp.slots()


def test_default_sizes_are_the_models() -> None:
    fast = lamp_compile.compile(reference.build("Llama"), mode="eager")
    cache = fast.lamp.slots()
    assert (cache.streams, cache.capacity, cache.max_length) == (16, 65536, 256)
