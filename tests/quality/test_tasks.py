"""Hard tasks: what they are made of, and that a worse cache does worse at them."""

from __future__ import annotations

import pytest
import torch

import lamp_compile
from lamp_compile.errors import InputError, OptionError
from lamp_compile.quality import hard, load, rows, tasks, windows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.tasks._base import Material

CONTEXT = 512


@pytest.fixture(scope="module")
def material(nano, root):
    encode = load.encoder(nano)
    ids = windows.token_ids(root / "examples/data/walden.txt", encode)
    return Material(load.load_model(nano), ids, encode, CONTEXT, 1)


@pytest.fixture(scope="module")
def engine(material):
    return CompiledEngine(lamp_compile.compile(material.model, mode="eager"))


@pytest.mark.parametrize("name", tasks.all_tasks())
def test_samples_repeat_and_their_places_are_in_them(material, name):
    if name == "dialogue":  # its own test: there the model writes
        material = Material(material.model, material.ids, None, 32, 1)
    first, again = (next(iter(tasks.get(name).build(material))) for _ in range(2))
    assert torch.equal(first.ids, again.ids)
    assert first.parts or first.choices
    for positions in (*first.parts.values(), *(c.positions for c in first.choices.values())):
        assert int(positions.min()) >= 0
        assert int(positions.max()) < first.ids.numel() - 1


def test_every_fact_is_planted_once_and_asked_for_once(material):
    sample = next(iter(tasks.get("retrieval").build(material)))
    assert sample.ids.numel() == CONTEXT
    asked = 0
    for choices in sample.choices.values():
        for position, answer in zip(choices.positions.tolist(), choices.answers.tolist(), strict=True):
            fact = sample.ids[position - 7 : position + 2]  # the key and the value behind it
            assert int(fact[-1]) == int(choices.candidates[answer])
            found = (sample.ids.unfold(0, 9, 1) == fact).all(-1)
            assert int(found.sum()) == 2
            asked += 1
    assert asked == 16


def test_facts_lie_at_the_depth_of_their_label(material):
    sample = next(iter(tasks.get("retrieval").build(material)))
    body = CONTEXT - 16 * 9
    for quarter, choices in enumerate(sample.choices.values()):
        for position in choices.positions.tolist():
            fact = sample.ids[position - 7 : position + 2]
            place = int((sample.ids.unfold(0, 9, 1) == fact).all(-1).nonzero()[0])
            assert quarter / 4 - 0.05 <= place / body <= (quarter + 1) / 4 + 0.05


def test_calculations_are_right(material):
    assert material.encode is not None
    tokenizer = load.load_tokenizer(material.model.config.name_or_path)
    text = tokenizer.decode(next(iter(tasks.get("arithmetic").build(material))).ids)
    lines = text.split("\n")[:-1]
    assert len(lines) > 20
    signs = set()
    for line in lines:
        a, sign, b, _, result = line.split()
        expected = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert int(result) == expected
        signs.add(sign)
    assert signs == {"+", "-", "*"}


def test_turns_hold_what_the_model_wrote(material):
    small = Material(material.model, material.ids, None, 64, 1)
    sample = next(iter(tasks.get("dialogue").build(small)))
    assert list(sample.parts) == [f"turn {n}" for n in range(1, 9)]
    for turn, positions in enumerate(sample.parts.values()):
        assert positions.tolist() == list(range(8 * turn + 3, 8 * turn + 7))
    with torch.no_grad():
        logits = material.model(sample.ids[None]).logits[0]
    at = torch.cat(list(sample.parts.values()))
    likely = logits.softmax(-1)[at].gather(-1, sample.ids[at + 1][:, None])
    assert float(likely.min()) > 1e-5  # drawn from the head of what the model expects


def test_a_worse_cache_does_worse(material, engine):
    found = hard.measure(tasks.get("retrieval"), material, engine, (rows.BF16, rows.FP8, rows.LAMP, rows.ALL_LOW))
    kl = {row.name: row.kl for row in found if row.part == hard.ALL}
    assert kl["bf16"] < kl["lamp"] < kl["fp8_kv"] < kl["all_low"]
    per_part = [row for row in found if row.name == "lamp" and row.part != hard.ALL]
    assert len(per_part) == 4
    assert sum(row.kl for row in per_part) / 4 == pytest.approx(kl["lamp"], rel=1e-6)
    lamp = next(row for row in found if row.name == "lamp")
    assert 0 < lamp.refined_share < 1
    assert lamp.accuracy is not None
    assert lamp.reference_accuracy is not None


def test_accuracy_counts_right_answers(material):
    """A model that answers as told: one question in four right."""
    sample = next(iter(tasks.get("retrieval").build(material)))
    counted = hard._Counted()
    vocabulary = material.model.config.vocab_size
    perfect = torch.zeros(CONTEXT, vocabulary)
    for choices in sample.choices.values():
        perfect[choices.positions, choices.candidates[choices.answers]] = 10.0
    test = perfect.clone()
    for choices in list(sample.choices.values())[1:]:
        test[choices.positions, choices.candidates[choices.answers]] = -10.0
    counted.add(sample, perfect, test, None)
    whole = next(counted.rows("retrieval", "test"))
    assert whole.accuracy == 0.25
    assert whole.reference_accuracy == 1.0
    assert whole.agreement == 0.25


def test_errors_build_up_over_layers(material, engine):
    cut = windows.spread(material.ids, 128, 1)
    found = hard.layers(cut, material.model, engine, (rows.FP8,))
    assert [row.first for row in found] == [1, 2, 3, 4]
    assert found[0].kl == pytest.approx(found[0].kl_alone, rel=1e-6)
    assert found[0].kl < found[-1].kl


def test_bad_input(material):
    with pytest.raises(OptionError, match="retrieval"):
        tasks.get("nonsense")
    short = Material(material.model, material.ids, None, 64, 1)
    with pytest.raises(InputError, match="too short"):
        next(iter(tasks.get("retrieval").build(short)))
    with pytest.raises(InputError, match="longer text"):
        next(iter(tasks.get("beyond").build(Material(material.model, material.ids[:100], None, 64, 1))))
