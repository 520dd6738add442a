"""Training: repeatable, resumable, better than both baselines; the row of the evaluation; the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lamp_compile
from lamp_compile import cli
from lamp_compile.errors import InputError, ModelError, OptionError
from lamp_compile.quality import rows, windows
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.quality.evaluate import Evaluation
from lamp_compile.quality.network import row as network_row
from lamp_compile.quality.network import score, session
from lamp_compile.quality.network.samples import BURN_IN, Sampling
from lamp_compile.quality.network.train import LEARNT, Settings, Trainer
from lamp_compile.runtime.network import files, gate
from tests import tolerances

CONTEXT = 256
SAMPLING = Sampling(blocks=2, rows=16, ahead=1)


@pytest.fixture(scope="module")
def fast(model: Any) -> Any:
    return lamp_compile.compile(model, mode="eager")


@pytest.fixture(scope="module")
def text(ids: Tensor) -> session.Text:
    return session.split(ids[0], CONTEXT, 5, "walden.txt")


def settings(**changes: Any) -> Settings:
    return dataclasses.replace(Settings(8, SAMPLING, 5, steps=4, blocks=2), **changes)


class Stopped(Exception):
    """The user pulled the plug."""


def test_an_interrupted_training_goes_on_to_the_same_numbers(fast: Any, text: session.Text, tmp_path: Path) -> None:
    whole = Trainer(fast, settings(), text.train).run(lambda what: None)
    checkpoint, seen = tmp_path / "half.safetensors", []

    def stop(what: str) -> None:
        seen.append(what)
        if len(seen) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        Trainer(fast, settings(), text.train, checkpoint).run(stop)
    again = Trainer(fast, settings(), text.train, checkpoint)
    assert again.first == 3
    resumed = again.run(lambda what: None)
    for name, made in whole.items():
        for part in LEARNT:
            assert torch.equal(getattr(made, part), getattr(resumed[name], part)), (name, part)
    other = Trainer(fast, settings(seed=1), text.train).run(lambda what: None)
    assert not torch.equal(next(iter(other.values())).query, next(iter(whole.values())).query)

    with pytest.raises(InputError, match="another settings"):
        Trainer(fast, settings(seed=1), text.train, checkpoint)
    with pytest.raises(InputError, match="another text"):
        Trainer(fast, settings(), text.train.flip(0), checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(InputError, match="no checkpoint"):
        Trainer(fast, settings(), text.train, checkpoint)
    save_file({"a": torch.zeros(1)}, str(checkpoint))
    with pytest.raises(InputError, match="no checkpoint"):
        Trainer(fast, settings(), text.train, checkpoint)


def test_the_packaged_network_beats_both_baselines_on_text_it_has_not_seen(
    fast: Any, ids: Tensor, packaged: Path
) -> None:
    network = files.load(packaged)
    assert packaged.stat().st_size < 100_000
    sampling = Sampling(blocks=4, ahead=network.about.ahead)
    samples = session._held_out(fast, windows.spread(ids[0], 1024, 2), sampling, lambda what: None)
    with torch.no_grad():
        for name, found in samples.items():
            for measured in score.measure(network.gates[name], found, sampling):
                assert measured.kl < 0.9 * min(measured.kl_copy, measured.kl_static), (name, measured)
            at_t = score.measure(network.gates[name], found, sampling)[0]
            assert at_t.recall > max(at_t.recall_copy, at_t.recall_static) + 0.01, (name, at_t)
    cost = session.costs_of(fast, network.about.trained, rank=network.about.rank, group=8, subtile=32)
    assert max(cost["network"].values()) <= session.COST_LIMIT
    assert cost["exact"]["operations"] > 5 * cost["network"]["operations"]


def test_calibration_sets_the_level_to_the_share_that_is_hot(fast: Any, text: session.Text, packaged: Path) -> None:
    network = files.load(packaged)
    samples = session._held_out(fast, text.held_out, SAMPLING, lambda what: None)
    span = slice(BURN_IN, BURN_IN + SAMPLING.rows)
    for name, made in network.gates.items():
        shifted = dataclasses.replace(made, extra=made.extra - torch.tensor([0.0, 3.0, 0.0, 0.0]))
        assert made.extra[0, 0, gate.OFFSET] - shifted.extra[0, 0, gate.OFFSET] == 3
        with torch.no_grad():
            again = score.calibrated(shifted, samples[name], SAMPLING)
        shares = []
        for g in range(2):
            guess, exact = [], []
            for s in samples[name]:
                with torch.no_grad():
                    log = score.forward(again, s, score._all(s), span, 0)[0][0]
                pair = score._flat(score._shared(log, s, span, 2)[:, g], s, span, g)
                guess.append(pair[0])
                exact.append(pair[1])
            shares.append([float((torch.cat(x) > score.TAU).float().mean()) for x in (guess, exact)])
        for predicted, true in shares:
            assert predicted == pytest.approx(true, abs=0.02)
        assert (again.limit >= 4).all()
        assert (again.margin >= 1).all()


def test_the_row_reads_as_much_and_loses_little_more(model: Any, ids: Tensor, packaged: Path) -> None:
    picked = windows.spread(ids[0], 512, 2)
    evaluation = Evaluation(model, picked, lambda m, b: CompiledEngine(lamp_compile.compile(m, mode="eager")))
    engine = CompiledEngine(lamp_compile.compile(model, mode="eager", lookahead=packaged))
    with pytest.raises(OptionError, match="measure that row first"):
        network_row.lamp_network(evaluation, engine)
    lamp = evaluation.measure(rows.LAMP)
    found = network_row.lamp_network(evaluation, engine)
    assert found.name == "lamp_network"
    assert found.refined_share == pytest.approx(lamp.refined_share, rel=tolerances.NETWORK["share"].relative)
    assert found.kl < 1.3 * lamp.kl
    assert found.kl != lamp.kl, "the network decided nothing"
    with pytest.raises(OptionError, match="serves no site"):
        network_row.lamp_network(evaluation, CompiledEngine(lamp_compile.compile(model, mode="eager")))


def test_the_command_trains_writes_and_resumes(nano: Path, root: Path, tmp_path: Path, capsys: Any) -> None:
    out, checkpoint = tmp_path / "mine.safetensors", tmp_path / "at.safetensors"
    text = root / "examples/data/walden.txt"
    command = ["train-lookahead", str(nano), "--text", str(text), "--context", "256", "--windows", "1"]
    command += ["--steps", "2", "--ahead", "1", "--out", str(out), "--resume", str(checkpoint)]
    assert cli.main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["rows"]) == 4 * 2
    assert {"kl", "kl_copy", "kl_static", "recall", "recall_copy", "recall_static", "missed"} <= set(data["rows"][0])
    assert max(data["costs"]["network"].values()) <= 0.02
    assert files.load(out, data["sha256"]).about.trained == 256
    assert checkpoint.exists()
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "cost at 256 tokens, network look-ahead:" in printed
    assert f"wrote {out}" in printed
    assert cli.main([*command[:-4], "--out", str(tmp_path / "none" / "x.safetensors")]) == 1
    assert "the folder is not there" in capsys.readouterr().err
    assert cli.main([*command, "--context", "64"]) == 1
    assert "a context of 64 tokens" in capsys.readouterr().err
    assert cli.main([*command, "--context", "4096"]) == 1
    assert "the model has 1024" in capsys.readouterr().err


def test_what_cannot_be_trained_is_said_first(fast: Any) -> None:
    with pytest.raises(InputError, match="too few to learn from"):
        session.split(torch.arange(300), CONTEXT, 4, "short")
    with pytest.raises(ModelError, match="costs less than"):
        session.largest_rank(fast, 1 << 20, 8, 32)


def test_eval_has_a_row_for_the_network(nano: Path, root: Path, packaged: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["eval", str(nano), "--text", str(root / "examples/data/walden.txt"), "--context", "160"]
    command += ["--max-tokens", "160", "--no-twin", "--json", "--lookahead"]
    assert cli.main([*command, str(packaged)]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert names[-1] == "lamp_network"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(packaged.read_bytes()[:3000])
    assert cli.main([*command, str(broken)]) == 1
    assert "truncated or no safetensors" in capsys.readouterr().err
