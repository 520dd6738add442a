"""Steps that a second session of the same file records: what happens where that file changed, or nothing is recorded.
On the CPU, where the second session runs like the first."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lamp_compile.errors import CacheError, InputError, OptionError
from lamp_compile.runtime.ort import session as sessions
from lamp_compile.runtime.ort.session import OrtSession
from tests.ort.toy import Toy, write
from tests.tolerances import ORT_TOY

ROWS = [1, 2, 3]


def recording(path: str | Path) -> OrtSession:
    """A session that records steps, with a prompt in it."""
    session = OrtSession(path, native=False, threads=1)
    session.graph = True
    session.start(1)
    session.prefill([ROWS])
    return session


def held(session: OrtSession) -> tuple[list[int], list[np.ndarray]]:
    return session.lengths, [seen.steps for seen in session.statistics().values()]


def goes_on(session: OrtSession, before: tuple[list[int], list[np.ndarray]]) -> None:
    """It holds what it held, and the next step is right."""
    lengths, steps = held(session)
    assert lengths == before[0]
    assert all(np.array_equal(*pair) for pair in zip(steps, before[1], strict=True))
    wanted = Toy().logits([*ROWS, *[4] * (lengths[0] - len(ROWS)), 4])
    assert np.linalg.norm(session.step([[4]])[0] - wanted) / np.linalg.norm(wanted) < ORT_TOY.relative


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: write(file.parent, Toy(seed=1)), r"toy\.onnx' changed since this session was opened"),
        (lambda file: file.write_bytes(b"nothing"), r"toy\.onnx' changed"),
        (Path.unlink, r"toy\.onnx' is gone"),
        (lambda file: file.with_name("toy.onnx.data").write_bytes(b"weights"), r"toy\.onnx\.data' changed"),
    ],
    ids=["other weights", "another size", "gone", "data"],
)
def test_a_file_that_changed_is_not_recorded(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    """Steps would have other weights than prompts. What was recorded before goes on."""
    file = write(tmp_path)
    session = recording(file)
    session.step([[4]])
    change(file)
    session.step([[4]])
    session.ensure_capacity(session.capacity + 1)
    before = held(session)
    with pytest.raises(InputError, match=message):
        session.step([[4]])
    session.graph = False
    goes_on(session, before)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    session, read = recording(file), sessions.opening.open_session

    def late(*given: object) -> object:
        os.utime(file, ns=(1, 1))
        return read(*given)

    monkeypatch.setattr(sessions.opening, "open_session", late)
    with pytest.raises(InputError, match="changed since"):
        session.step([[4]])


def test_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file of the same name lies."""
    write(tmp_path)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", Toy(seed=1))
    monkeypatch.chdir(tmp_path)
    session = recording("toy.onnx")
    monkeypatch.chdir(tmp_path / "other")
    goes_on(session, held(session))
    assert session._captured is not None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("opening.open_session", RuntimeError("out of memory\nand much more")),
        ("opening.open_session", OptionError("out of memory", where="the model")),
        ("captured", RuntimeError("out of memory")),
    ],
)
def test_what_cannot_be_recorded(artifact: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    session = recording(artifact)
    before = held(session)

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(f"{sessions.__name__}.{name}", fails)
        with pytest.raises(CacheError, match=r"no CUDA graph of steps for 1 sequences.*out of memory") as found:
            session.step([[4]])
    assert "much more" not in str(found.value)
    goes_on(session, before)
    assert session._captured is not None


def test_a_step_that_cannot_be_bound(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = recording(artifact)
    session.graph = False
    before = held(session)

    def fails(*_: object) -> None:
        raise RuntimeError("no binding")

    with monkeypatch.context() as patched:
        patched.setattr(sessions, "BoundStep", fails)
        with pytest.raises(InputError, match="no binding"):
            session.step([[4]])
    goes_on(session, before)
