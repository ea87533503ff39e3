"""Ends a run whose step does not: every rank has a thread that looks at the clock, and needs no other rank for that.

`trace.report_status` says where the rank is; the watchdog keeps that in `heartbeat`, and takes the time of "step", from when a
number is told until an empty text is. A step that takes `launch.stall_factor` times the median of those before, and
`launch.stall_s`, is one too many. The rank that sees it first writes down where all of them are, which `launch` shows,
or prints it itself in ranks of a launcher's. In every rank's own log are then the Python stacks of its threads and
what torch's flight recorder says of its collectives.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from conf.schema import LaunchConfig
from recipes.run.heartbeat import LOGS_DIR, STALL_FILE, Heartbeat, describe_ranks, record_path
from ring_attention import trace
from ring_attention.transport import flight_record

NUM_STEPS_OF_MEDIAN = 50
MIN_STEPS = 5  # before a median says anything; the first step, which compiles and allocates, is not among them
_LOOK_INTERVAL_S = 0.5
_LAST_WORDS_S = 2.0  # for the other ranks to write their own logs
_MOST_WORDS_S = 15.0


class StallDetector:
    """How long steps take, and since when the one that is under way does."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self._durations_s: collections.deque[float] = collections.deque(maxlen=NUM_STEPS_OF_MEDIAN)
        self._had_first = False
        self.step = ""
        self._started: float | None = None

    def update(self, step: str, now: float) -> None:
        """The step of this number starts, or with an empty text ends."""
        if self._started is not None:
            if self._had_first:
                self._durations_s.append(now - self._started)
            self._had_first = True
        self.step, self._started = step, now if step else None

    def discount(self, seconds: float) -> None:
        """So much of the step that is under way is not its own."""
        if self._started is not None:
            self._started += seconds

    def stall_message(self, now: float) -> str | None:
        """What there is to say of the step that is under way; None as long as it may go on."""
        durations_s, started = list(self._durations_s), self._started
        if started is None or not self._config.stall_factor or len(durations_s) < MIN_STEPS:
            return None
        median_s = statistics.median(durations_s)
        if now - started <= max(self._config.stall_s, self._config.stall_factor * median_s):
            return None
        return (
            f"step {self.step} was not done after {now - started:.1f} s, which is {(now - started) / median_s:,.0f} "
            f"times the median of {len(durations_s)} steps before ({median_s:.3f} s)"
        )


@contextlib.contextmanager
def watched(config: LaunchConfig, run_dir: Path, rank: int, num_ranks: int, console: TextIO | None) -> Iterator[None]:
    """Within, this rank's place is on record, and a step that does not end ends the process.

    Args:
        console: where people read it, if no parent of ours tells them.

    Raises:
        OSError: if the disk has no room for the record.
    """
    heartbeat, timer, ended = Heartbeat(run_dir, rank), StallDetector(config), threading.Event()

    def follow(kind: str, text: str) -> None:
        if kind == "step":
            timer.update(text, time.monotonic())
        heartbeat.update(kind, text)

    def look() -> None:
        looked = time.monotonic()
        while not ended.wait(_LOOK_INTERVAL_S):
            now = time.monotonic()
            if now - looked > 4 * _LOOK_INTERVAL_S:  # this process was stopped itself, Ctrl-Z say, and goes on now
                timer.discount(now - looked)
            looked = now
            stall_message = timer.stall_message(now)
            if stall_message:
                _end(stall_message, run_dir, rank, num_ranks, console)

    thread = threading.Thread(target=look, daemon=True, name="watchdog")
    thread.start()
    trace.set_status_listener(follow)
    try:
        yield
    finally:
        trace.set_status_listener(None)
        ended.set()
        thread.join()  # one that lived on while Python ends could abort the process
    record_path(run_dir, rank).unlink()  # there is nothing to explain


def _end(stall_message: str, run_dir: Path, rank: int, num_ranks: int, console: TextIO | None) -> None:
    """Write down what is known, and leave: a thread that is stuck in a collective can raise nothing."""
    # also if the disk that the words go to is what stands still
    last_resort = threading.Timer(_MOST_WORDS_S, os._exit, (1,))
    last_resort.daemon = True
    last_resort.start()
    try:
        _say(stall_message, run_dir, rank, num_ranks, console)
    finally:
        os._exit(1)


def _say(stall_message: str, run_dir: Path, rank: int, num_ranks: int, console: TextIO | None) -> None:
    lines = [stall_message, *describe_ranks(run_dir, num_ranks, time.time())]
    text = "\n".join([*lines, f"stacks of all threads and pending collectives are in {run_dir / LOGS_DIR}/rank_*.log"])
    try:
        with (run_dir / LOGS_DIR / STALL_FILE).open("x", encoding="utf-8") as file:
            file.write(text + "\n")
        is_first = True
    except FileExistsError:  # another rank has said it
        is_first = False
    print(text, file=sys.stderr, flush=True)  # the rank's log
    faulthandler.dump_traceback(sys.stderr.fileno())
    pickled, pending = flight_record()
    (run_dir / LOGS_DIR / f"flight_recorder_{rank}").write_bytes(pickled)
    print(*(f"pending: {line}" for line in pending), sep="\n", file=sys.stderr, flush=True)
    if is_first and console:
        print(f"error: {text}", file=console, flush=True)
    time.sleep(_LAST_WORDS_S if is_first else 2 * _LAST_WORDS_S)  # who leaves makes the launcher end all
