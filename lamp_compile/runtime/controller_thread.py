"""The thread that runs the controller beside a model. No torch: where readings come from and settings go is handed in.

The model never waits for it. If it dies or falls behind, the model's side (``check``, called at each step) puts the
last safe values back and says so; it can be started again.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from lamp_compile.errors import OptionError
from lamp_compile.runtime import controller
from lamp_compile.runtime.controller import State, Statistics

SHARE = 0.004
"""Of the time, at most, that the thread computes: it waits longer where a reading costs more."""
LAG = 5.0
"""Seconds beyond its interval after which a silent thread counts as behind."""
MOST_TIMES = 256
IDLE = 10.0
"""A gap so many times the median is a pause between requests, not a step."""


class StepClock:
    """Times of decode steps, from the model's side to the controller's: bounded, and what does not fit is counted.

    Attributes:
        dropped: Times that were never read, because the queue was full.
    """

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MOST_TIMES)
        self._last: float | None = None
        self.dropped = 0

    def tick(self) -> None:
        """A decode step begins."""
        now, last = time.perf_counter(), self._last
        self._last = now
        if last is not None:
            self.offer(now - last)

    def pause(self) -> None:
        """What comes next is no step that follows on the last."""
        self._last = None

    def offer(self, seconds: float) -> None:
        """One step's time; the oldest goes where the queue is full."""
        self.dropped += len(self._times) == MOST_TIMES
        self._times.append(seconds)

    def drain(self) -> float | None:
        """Mean time of a step since the last call, without pauses; None if there was none."""
        times = [self._times.popleft() for _ in range(len(self._times))]
        if not times:
            return None
        most = IDLE * statistics.median(times)
        return statistics.fmean(t for t in times if t <= most)


class ControllerThread:
    """Reads, steps, writes, waits; over and over.

    Args:
        state: Where to begin (``controller.initial``).
        read: The statistics since the last reading, or None where there is nothing to go by yet.
        write: Puts every site's tau into force.

    Attributes:
        state: What the controller knows. Replaced as a whole.
        error: What the thread died of.
        deaths: How often it died.
        lags: How often it fell behind.
    """

    def __init__(self, state: State, read: Callable[[], Statistics | None], write: Callable[[State], None]) -> None:
        self.state, self._read, self._write = state, read, write
        self.error, self.deaths, self.lags = "", 0, 0
        self._asleep = threading.Event()
        self._thread: threading.Thread | None = None
        self._beat = 0.0
        self._pause = state.target.interval
        self._behind = False

    @property
    def status(self) -> str:
        """One of "running", "behind", "died" and "stopped"."""
        if self._thread is None:
            return "stopped"
        if not self._thread.is_alive():
            return "died"
        return "behind" if self._behind else "running"

    def start(self) -> None:
        """Start it, or start it again.

        Raises:
            OptionError: It is running.
        """
        if self._thread is not None and self._thread.is_alive():
            raise OptionError("the controller is running", where="control", fix="stop() first")
        self._asleep = threading.Event()
        self._beat, self._behind = time.monotonic(), False
        self._thread = threading.Thread(
            target=self._loop, args=(self._asleep,), name="lamp-controller", daemon=True
        )  # fmt: skip
        self._thread.start()

    def signal(self) -> None:
        """Let it end, without waiting for it."""
        self._asleep.set()

    def stop(self, seconds: float = 5.0) -> None:
        """Let it end; waits for a reading at hand, so long at most. What it set stays in force."""
        thread, self._thread = self._thread, None
        self._asleep.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(seconds)

    def check(self) -> str | None:
        """For the model's side: what there is to say, once for each time that the thread died or fell behind; the last
        safe values are in force by then."""
        thread = self._thread
        if thread is None:
            return None
        if not thread.is_alive():
            self._thread = None
            self.deaths += 1
            self.fall_back()
            return (
                f"the precision controller died ({self.error or 'ended from outside'}): the model goes on with the "
                "last values known to be safe; fast.lamp.controller.start() starts it again"
            )
        late = time.monotonic() - self._beat - self._pause
        if late <= LAG:
            self._behind = False
            return None
        if self._behind:
            return None
        self._behind = True
        self.lags += 1
        self.fall_back()
        return (
            f"the precision controller is {late:.0f} s behind: the model goes on with the last values known to be safe"
        )

    def fall_back(self) -> None:
        """Put each site's last safe tau into force."""
        sites = tuple(replace(site, tau=site.safe) for site in self.state.sites)
        self.state = replace(self.state, sites=sites)
        self._write(self.state)

    def tick(self) -> bool:
        """One round: whether there was something to go by."""
        reading = self._read()
        if reading is None:
            return False
        state = controller.step(self.state, reading)
        moved = any(old.tau != new.tau for old, new in zip(self.state.sites, state.sites, strict=True))
        if self._asleep.is_set():  # stopped meanwhile: nothing is set after stop()
            return False
        self.state = state
        if moved:
            self._write(state)
        return True

    def _loop(self, asleep: threading.Event) -> None:
        try:
            while not asleep.wait(self._pause):
                began = time.thread_time()
                self.tick()
                self._pause = max(self.state.target.interval, (time.thread_time() - began) / SHARE)
                self._beat = time.monotonic()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the model's side says it
            self.error = f"{type(error).__name__}: {error}"
