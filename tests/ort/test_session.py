"""OrtSession: planes stay in place, sequences can be grown, cropped, reordered; what is asked for is what runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lamp_compile
from lamp_compile.errors import CacheError, InputError, OptionError
from lamp_compile.runtime import guard
from lamp_compile.runtime.ort import _library, statistics
from lamp_compile.runtime.ort import artifact as artifacts
from lamp_compile.runtime.ort.session import OrtSession
from tests.ort.toy import Toy, metadata, write
from tests.tolerances import ORT_TOY

TOY = Toy()
SITES = [TOY.site(i) for i in range(TOY.layers)]


def error_of(got: np.ndarray, rows: list[int]) -> float:
    wanted = TOY.logits(rows)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def addresses(session: OrtSession) -> dict[str, int]:
    return {f"{site} {name}": v.data_ptr() for site in SITES for name, v in session.planes(site).items()}


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, TOY.vocab, count).tolist()


def test_it_decodes(session: OrtSession) -> None:
    """Prefill in pieces, then steps, each against float attention."""
    rows = words(1, 40)
    session.start(1)
    assert error_of(session.prefill([rows], rows=16)[0], rows) < ORT_TOY.relative
    for token in (3, 4, 5):
        rows.append(token)
        assert error_of(session.step([[token]])[0], rows) < ORT_TOY.relative
    (first, *_) = session.statistics().values()
    assert first.steps.tolist() == [[6, 6]]
    assert first.live.min() > 0
    assert 0 < first.error.max() < 0.1


def test_native_and_portable_agree(artifact: Path, native_operators: None) -> None:
    """To the statistics: the same tiles are refined."""
    sides = [OrtSession(artifact, native=native, threads=1) for native in (True, False)]
    for side in sides:
        side.controls.set(tau=0.3)
        side.start(2)
        side.prefill([words(1, 150), words(2, 90)])
    first, second = ([s.step([[1], [2]]) for _ in range(3)][-1] for s in sides)
    assert np.linalg.norm(first - second) / np.linalg.norm(second) < ORT_TOY.relative / 4
    for site in SITES:
        one, two = (side.statistics()[site] for side in sides)
        assert 0 < one.refined.sum() < one.live.sum()
        for field in statistics.STATS:
            if field != "refined":  # a sub-tile at the threshold may fall on either side
                assert np.array_equal(getattr(one, field), getattr(two, field)), field
        assert abs(one.refined - two.refined).max() <= 1
    assert [side.placement()["CPUExecutionProvider"].get("ai.lamp.Append", 0) for side in sides] == [TOY.layers, 0]


def test_planes_stay_in_place(session: OrtSession) -> None:
    """The buffers bound as inputs are the outputs, at one address over all steps; nothing behind the rows changes."""
    session.start(1, capacity=128)
    session.prefill([words(1, 40)])
    before, binding = addresses(session), None
    held = {name: value.numpy().copy() for name, value in session.planes(SITES[0]).items()}
    for token in words(2, 5):
        session.step([[token]])
        binding = binding or session._bound.binding
    assert addresses(session) == before
    assert session._bound.binding is binding
    assert set(before.values()) <= {v.data_ptr() for v in binding.get_outputs()}
    after = {name: value.numpy() for name, value in session.planes(SITES[0]).items()}
    old, new = held["k_high"].reshape(1, 2, 128, -1), after["k_high"].reshape(1, 2, 128, -1)
    assert np.array_equal(old[:, :, :40], new[:, :, :40])
    assert (new[:, :, 40:45] != 0).any((1, 3)).all()
    assert not new[:, :, 45:].any()


def test_steps_of_fixed_shapes(session: OrtSession) -> None:
    """What a CUDA graph is recorded from, here on the CPU: the same logits, and recording is no step of the guard."""
    rows, logits, seen = words(1, 70), [], []
    for graph in (False, True):
        session.start(2, capacity=96)
        session.graph = graph
        session.prefill([rows, rows[:50]])
        for token in (3, 4):
            last = session.step([[token], [token]])
        for token in range(40):  # it grows
            last = session.step([[token], [token]])
        session.reorder([1, 0])
        session.controls.set(tau=1e9)
        last = session.step([[5], [6]])
        session.reorder([0])
        logits.append(np.concatenate([last.ravel(), session.step([[7]]).ravel()]))
        seen.append(session.statistics()[SITES[0]])
        assert (session._captured is not None) == graph
        session.controls.set(tau=session.artifact.planes[0].plan["tau"][0])
    session.graph = False
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * np.abs(logits[0]).max()
    assert all(np.array_equal(getattr(seen[0], field), getattr(seen[1], field)) for field in statistics.STATS)


def test_dlpack(session: OrtSession) -> None:
    session.start(1)
    session.step([words(1, 9)])
    value = session.planes(SITES[1])["k_high"]
    tensor = torch.from_dlpack(value)
    assert tensor.data_ptr() == value.data_ptr()
    count = int(tensor.ne(0).sum())
    session.step([[1]])
    assert int(tensor.ne(0).sum()) > count  # it is the very memory


def test_growth_keeps_what_is_held(session: OrtSession) -> None:
    rows = words(3, 30)
    session.start(3)  # another batch: new planes
    session.start(1)
    session.prefill([rows])
    small = session.capacity
    for token in words(4, 70):
        rows.append(token)
        last = session.step([[token]])
    assert small < 100 <= session.capacity
    assert error_of(last[0], rows) < ORT_TOY.relative
    assert int(session.statistics()[SITES[0]].steps.max()) == 71


def test_memory_is_that_of_planes(session: OrtSession) -> None:
    """Two nibbles a value and a half-precision scale a row, of K and V: at most 30 % of float32."""
    session.start(2, capacity=256)
    values = 2 * TOY.layers * 2 * TOY.kv_heads * session.capacity * TOY.dim
    assert session.nbytes == values + 2 * values // TOY.dim
    assert session.nbytes < 0.3 * 4 * values


def test_crop_reset_and_reorder(session: OrtSession) -> None:
    rows = [words(5, 20), words(6, 20)]
    session.start(2)
    session.prefill(rows)
    before = addresses(session)
    session.reorder([1, 0])
    got = session.step([[7], [8]])
    assert error_of(got[0], [*rows[1], 7]) < ORT_TOY.relative
    assert error_of(got[1], [*rows[0], 8]) < ORT_TOY.relative
    session.crop(20)
    got = session.step([[9], [9]])
    assert error_of(got[0], [*rows[1], 9]) < ORT_TOY.relative
    session.reset()
    assert session.lengths == [0, 0]
    assert not session.statistics()[SITES[0]].steps.any()
    assert error_of(session.step([[1, 2], [3, 4]])[1], [3, 4]) < ORT_TOY.relative
    assert addresses(session) == before
    session.reorder([1, 1, 0])
    assert session.batch == 3
    assert error_of(session.step([[5]] * 3)[1], [3, 4, 5]) < ORT_TOY.relative


def test_sequences_of_different_lengths(session: OrtSession) -> None:
    """Each gives what it gives alone, bit for bit, and its guard has seen no more."""
    rows = [words(7, 12), words(8, 40)]
    session.start(2)
    session.prefill(rows)
    assert session.lengths == [12, 40]
    got = session.step([[1], [2]])
    seen = session.statistics()[SITES[0]]
    for index, token in ((0, 1), (1, 2)):
        assert error_of(got[index], [*rows[index], token]) < ORT_TOY.relative
        session.start(1)
        session.prefill([rows[index]])
        alone = session.step([[token]])
        assert np.abs(alone[0] - got[index]).max() < 1e-4 * np.abs(alone).max()
        assert session.statistics()[SITES[0]].live.tolist() == [seen.live[index].tolist()]


def test_one_sequence_moves_alone(session: OrtSession) -> None:
    session.start(2)
    session.prefill([[1, 2], [3]])
    before = session.planes(SITES[0])["k_high"].numpy()[1].copy()
    assert error_of(session.step([[4, 5]], sequence=0)[0], [1, 2, 4, 5]) < ORT_TOY.relative
    assert np.array_equal(session.planes(SITES[0])["k_high"].numpy()[1], before)
    assert session.lengths == [4, 1]
    session.crop([3, 1])
    assert error_of(session.step([[6], [7]])[0], [1, 2, 4, 6]) < ORT_TOY.relative


def test_controls_act_on_the_next_step(session: OrtSession) -> None:
    session.start(1)
    session.prefill([words(1, 200)])
    site = SITES[1]

    def refined() -> tuple[int, int]:
        before = session.statistics()[site]
        session.step([[1]])
        after = session.statistics()[site]
        return int((after.refined - before.refined).sum()), int((after.live - before.live).sum())

    session.controls.set(tau=1e9)
    assert refined()[0] == 0
    session.controls.set(tau=0.0, sites=site)
    share, live = refined()
    assert share == live > 0
    session.controls.set(tau=1e9)
    session.controls.set(floor=1, sites=[site])
    share, live = refined()
    assert share == live
    session.controls.set(floor=0, budget=1e-6)
    raised = session.statistics()[site].raised.sum()
    session.step([[1]])
    session.step([[1]])
    assert session.statistics()[site].raised.sum() > raised
    assert "flags" in session.guard_report()[0]


def test_controls_refuse_what_is_impossible(session: OrtSession) -> None:
    before = session.controls[SITES[0]].tau.copy()
    for wrong in ({"tau": -1.0}, {"tau": [0.1]}, {"floor": 3}, {"budget": 0.0}, {"tau": 0.1, "sites": "nothing"}):
        with pytest.raises(OptionError):
            session.controls.set(**{"tau": 0.5, **wrong})
    assert np.array_equal(session.controls[SITES[0]].tau, before)
    assert len(session.controls) == TOY.layers
    assert list(session.controls) == SITES


def test_shared_inputs_of_controls(tmp_path: Path) -> None:
    """One input for all sites: each site has its row."""
    session = OrtSession(write(tmp_path, Toy(shared_controls=True)), native=False, threads=1)
    session.start(1)
    session.controls.set(tau=1e9)
    session.controls.set(tau=0.0, sites=SITES[1])
    session.prefill([words(1, 64)])
    shares = [session.statistics()[site].refined_share for site in SITES]
    assert shares == [0.0, 1.0]


def test_statistics_are_those_of_the_guard() -> None:
    """Columns by the names that the torch runtime has for them."""
    for index, name in enumerate(statistics.STATE):
        assert getattr(guard, name.upper()) == index
    for index, name in enumerate(statistics.STATS):
        assert getattr(guard, name.upper()) == index
    for bit, text in statistics.FLAGS.items():
        assert guard.flag_names(bit) == [text]
    assert (artifacts.STATE_FIELDS, artifacts.STATS_FIELDS) == (guard.STATE_FIELDS, guard.STATS_FIELDS)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.step([[1, 2]] * 3),
        lambda s: s.step([[0.5]]),
        lambda s: s.step([[TOY.vocab]]),
        lambda s: s.step([]),
        lambda s: s.start(0),
        lambda s: s.step([[1]], sequence=1),
        lambda s: s.prefill([[1], [2]]),
        lambda s: s.prefill([[]]),
        lambda s: s.prefill([[[1]]]),
        lambda s: s.reorder([5]),
        lambda s: s.planes("nothing"),
        lambda s: s.run({}),
    ],
)
def test_bad_input_is_found_first(session: OrtSession, call: Any) -> None:
    session.start(1)
    session.step([[1]])
    with pytest.raises(InputError):
        call(session)
    assert error_of(session.step([[2]])[0], [1, 2]) < ORT_TOY.relative


def test_crop_beyond(session: OrtSession) -> None:
    session.start(1)
    with pytest.raises(CacheError):
        session.crop(1)


def test_no_memory_leaves_the_session_as_it_was(session: OrtSession) -> None:
    session.start(1)
    session.step([[1]])
    before = addresses(session)
    with pytest.raises(CacheError, match="memory"):
        session.ensure_capacity(1 << 45)
    assert addresses(session) == before
    assert error_of(session.step([[2]])[0], [1, 2]) < ORT_TOY.relative


# What is asked for is what runs


def test_a_node_that_the_kernel_refuses(tmp_path: Path, native_operators: None) -> None:
    from tests.ort.toy import model

    made = model(TOY)
    for node in made.graph.node:
        for attribute in node.attribute:
            if attribute.name == "query_bits":
                attribute.i = 16
    file = tmp_path / "other.onnx"
    file.write_bytes(made.SerializeToString())
    with pytest.raises(OptionError, match="queries of 8 bits"):
        OrtSession(file, native=True)
    with pytest.warns(UserWarning, match="queries of 8 bits"):
        assert not OrtSession(file).native


def _changed(**fields: Any) -> dict[str, Any]:
    return {**metadata(TOY), **fields}


@pytest.mark.parametrize(
    "about",
    [
        {},
        _changed(version=2),
        _changed(kind="other"),
        _changed(inputs={"tokens": "ids"}),
        _changed(inputs={"tokens": "nothing", "slots": "slots"}),
        _changed(logits="nothing"),
        _changed(max_length="long"),
        _changed(sites=[{**metadata(TOY)["sites"][0], "kv_heads": 3}]),
        _changed(sites=[{**metadata(TOY)["sites"][0], "tile": 1 << 40}]),
        _changed(sites=[{**metadata(TOY)["sites"][0], "plan": {"tau": "x", "floor": 0, "budget": 1}}]),
        _changed(sites=[{**metadata(TOY)["sites"][0], "past": {}}]),
        _changed(sites=7),
        [],
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, about: Any) -> None:
    with pytest.raises(InputError):
        OrtSession(write(tmp_path, TOY, about), native=False)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        OrtSession(tmp_path / "nothing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x07nonsense")
    with pytest.raises(InputError, match="does not load"):
        OrtSession(tmp_path / "broken.onnx", native=False)


def test_it_needs_no_torch(artifact: Path) -> None:
    """In an interpreter where torch cannot be imported."""
    code = f"""
import sys
sys.modules["torch"] = None
import lamp_compile
session = lamp_compile.OrtSession({str(artifact)!r}, threads=1)
session.start(1)
print(session.native, session.step([[1, 2, 3]]).argmax())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(_library.why_not() is None), str(TOY.logits([1, 2, 3]).argmax())]


def test_public() -> None:
    assert lamp_compile.OrtSession is OrtSession
