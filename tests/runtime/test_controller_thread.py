"""The controller's thread: it never holds the model up, and its death or delay is survived, said, and undone."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from lamp_compile.control_plan import ControlPlan
from lamp_compile.errors import OptionError
from lamp_compile.runtime import controller, controller_thread
from lamp_compile.runtime.controller import SiteSample, Statistics
from lamp_compile.runtime.controller_thread import MOST_TIMES, SHARE, ControllerThread, StepClock

TARGET = ControlPlan(error_budget=0.1, interval=0.002)
GOOD = Statistics((SiteSample(40, 0.09),))
LOW = Statistics((SiteSample(40, 0.001),))


def wait_for(what, seconds=5.0):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


class Plant:
    """Readings to give, and what was written."""

    def __init__(self, *readings: Statistics | Exception | None) -> None:
        self.readings, self.written = list(readings), []
        self.thread = ControllerThread(controller.initial(TARGET, (0.01,)), self.read, self.write)

    def read(self) -> Statistics | None:
        reading = self.readings.pop(0) if self.readings else None
        if isinstance(reading, BaseException):
            raise reading
        return reading

    def write(self, state: controller.State) -> None:
        self.written.append(state.sites[0].tau)


def test_it_reads_steps_and_writes_what_moved() -> None:
    plant = Plant(None, LOW, GOOD, GOOD)
    plant.thread.start()
    with pytest.raises(OptionError, match="is running"):
        plant.thread.start()
    wait_for(lambda: plant.thread.state.readings == 3)
    assert plant.thread.status == "running"
    assert plant.thread.check() is None
    plant.thread.stop()
    assert plant.thread.status == "stopped"
    assert plant.written == [plant.thread.state.sites[0].tau]
    assert plant.written[0] > 0.01
    assert not any(t.name == "lamp-controller" for t in threading.enumerate())


@pytest.mark.parametrize("cause", [RuntimeError("the plant burnt down"), SystemExit(3), MemoryError()])
def test_death_is_said_once_and_the_last_safe_values_come_back(cause: BaseException) -> None:
    plant = Plant(GOOD, LOW, LOW, cause)
    plant.thread.start()
    wait_for(lambda: plant.thread.status == "died")
    reached = plant.thread.state.sites[0]
    assert reached.tau > reached.safe, "it was on its way to something untested"
    said = plant.thread.check()
    assert said is not None
    assert type(cause).__name__ in said
    assert plant.written[-1] == reached.safe
    assert plant.thread.check() is None, "said once"
    assert (plant.thread.deaths, plant.thread.status) == (1, "stopped")
    plant.readings += [GOOD]
    plant.thread.start()
    before = plant.thread.state.readings
    wait_for(lambda: plant.thread.state.readings > before)
    assert plant.thread.check() is None
    plant.thread.stop()


def test_killed_from_outside() -> None:
    plant = Plant(GOOD)
    plant.thread.start()
    wait_for(lambda: plant.thread.state.readings == 1)
    (thread,) = (t for t in threading.enumerate() if t.name == "lamp-controller")
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    wait_for(lambda: not thread.is_alive())
    assert "died" in (plant.thread.check() or "")


def test_a_thread_that_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_thread, "LAG", 0.05)
    stuck, plant = threading.Event(), Plant()
    first = [LOW]

    def read() -> Statistics | None:
        if first:
            return first.pop()
        stuck.wait(10)
        return None

    plant.thread._read = read
    plant.thread.start()
    wait_for(lambda: plant.thread.state.readings == 1)
    moved = plant.thread.state.sites[0].tau
    said = []
    wait_for(lambda: said.append(plant.thread.check()) or said[-1] is not None)
    assert "behind" in said[-1]
    assert plant.thread.status == "behind"
    assert plant.written[-1] == plant.thread.state.sites[0].safe < moved
    assert plant.thread.check() is None, "said once"
    stuck.set()
    wait_for(lambda: plant.thread.check() is None and plant.thread.status == "running")
    plant.thread.stop()


def test_nothing_is_set_after_stop() -> None:
    plant = Plant()
    inside, go = threading.Event(), threading.Event()

    def read() -> Statistics:
        inside.set()
        go.wait(5)
        return LOW

    plant.thread._read = read
    plant.thread.start()
    inside.wait(5)
    plant.thread.stop(seconds=0.01)
    go.set()
    time.sleep(0.05)
    assert plant.written == []


def test_it_takes_no_more_than_its_share_of_the_time() -> None:
    """A reading that costs 4 ms: the next comes a second later."""
    plant = Plant()

    def read() -> None:
        end = time.thread_time() + 0.004
        while time.thread_time() < end:
            pass

    plant.thread._read = read
    plant.thread.start()
    wait_for(lambda: plant.thread._pause >= 0.004 / SHARE)
    plant.thread.stop()


def test_the_queue_of_times_overflows_and_says_so() -> None:
    clock = StepClock()
    for _ in range(MOST_TIMES + 7):
        clock.offer(0.01)
    assert clock.dropped == 7
    assert clock.drain() == pytest.approx(0.01)
    assert clock.drain() is None
    for seconds in (0.01, 0.02, 0.015, 30.0):
        clock.offer(seconds)
    assert clock.drain() == pytest.approx(0.015), "a pause between requests is no step"
    clock.tick()
    clock.pause()
    clock.tick()
    assert clock.drain() is None


def test_no_torch_is_needed() -> None:
    """ONNX sessions drive the same function and thread."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lamp_compile.control_plan import ControlPlan\n"
        "from lamp_compile.runtime import controller, controller_thread\n"
        "state = controller.initial(ControlPlan(quality=0.99), (0.01,))\n"
        "state = controller.step(state, controller.Statistics((controller.SiteSample(40, 0.5),)))\n"
        "assert state.sites[0].tau < 0.01"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_state_is_replaced_as_a_whole() -> None:
    plant = Plant(LOW)
    before = plant.thread.state
    assert plant.thread.tick()
    assert plant.thread.state is not before
    assert before == replace(before)
    assert before.readings == 0
