"""Ends a run whose step hangs. Each rank has a thread that watches the clock and needs no other rank.

A step hangs if it takes `launch.stall_factor` times the median of the steps before it, and longer than
`launch.stall_s`. The first rank to see that writes the position of every rank to a file. The parent shows it, or that
rank prints it if a launcher has started the ranks. Each rank's log gets its Python stacks and torch's flight recorder
of collectives.
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
from ring_attention.transport.collectives import flight_record

NUM_STEPS_OF_MEDIAN = 50
MIN_STEPS = 5  # for a median; the first step, which compiles and allocates, does not count
_CHECK_INTERVAL_S = 0.5
_LOG_GRACE_S = 2.0  # for the other ranks to write their logs
_MAX_REPORT_S = 15.0


class StallDetector:
    """Knows how long steps take, and since when the current one runs."""

    def __init__(self, config: LaunchConfig) -> None:
        self._config = config
        self._durations_s: collections.deque[float] = collections.deque(maxlen=1 + NUM_STEPS_OF_MEDIAN)
        self._step = ""
        self._started: float | None = None

    def update(self, step: str, now: float) -> None:
        """This step starts; an empty text ends the current one."""
        if self._started is not None:
            self._durations_s.append(now - self._started)
        self._step, self._started = step, now if step else None

    def restart(self) -> None:
        """Steps take another time from here on."""
        self._durations_s.clear()

    def discount(self, seconds: float) -> None:
        """Do not count this time towards the current step."""
        if self._started is not None:
            self._started += seconds

    def stall_message(self, now: float) -> str | None:
        """What is wrong with the current step; None if nothing is."""
        durations_s, started = list(self._durations_s)[1:], self._started
        if started is None or not self._config.stall_factor or len(durations_s) < MIN_STEPS:
            return None
        median_s = statistics.median(durations_s)
        if now - started <= max(self._config.stall_s, self._config.stall_factor * median_s):
            return None
        return (
            f"step {self._step} is not done after {now - started:.1f} s, {(now - started) / median_s:,.0f} times the "
            f"median of the {len(durations_s)} steps before it ({median_s:.3f} s)"
        )


@contextlib.contextmanager
def watched(config: LaunchConfig, run_dir: Path, rank: int, num_ranks: int, console: TextIO | None) -> Iterator[None]:
    """Inside, this rank's position is recorded, and a step that hangs ends the process.

    Args:
        console: where to print the error; None if the parent prints it.

    Raises:
        OSError: if the disk has no room for the record.
    """
    heartbeat, detector, ended = Heartbeat(run_dir, rank), StallDetector(config), threading.Event()

    def record(kind: str, text: str) -> None:
        if kind == "stage":  # no place in the run
            detector.restart()
            return
        if kind == "step":
            detector.update(text, time.monotonic())
        heartbeat.update(kind, text)

    def watch() -> None:
        checked = time.monotonic()
        while not ended.wait(_CHECK_INTERVAL_S):
            now = time.monotonic()
            if now - checked > 4 * _CHECK_INTERVAL_S:  # this process was stopped itself, by Ctrl-Z for example
                detector.discount(now - checked)
            checked = now
            if message := detector.stall_message(now):
                _end(message, run_dir, rank, num_ranks, console)

    thread = threading.Thread(target=watch, daemon=True, name="watchdog")
    thread.start()
    trace.set_status_listener(record)
    try:
        yield
    finally:
        trace.set_status_listener(None)
        ended.set()
        thread.join()  # a thread that outlives Python could abort the process
    record_path(run_dir, rank).unlink()  # the block succeeded: nothing to explain


def _end(message: str, run_dir: Path, rank: int, num_ranks: int, console: TextIO | None) -> None:
    """Report and exit; the main thread is stuck in a collective and cannot raise."""
    threading.Timer(_MAX_REPORT_S, os._exit, (1,)).start()  # the disk with the logs may be what hangs
    try:
        logs = run_dir / LOGS_DIR
        where = f"stacks of all threads and pending collectives are in {logs}/rank_*.log"
        text = "\n".join([message, *describe_ranks(run_dir, num_ranks, time.time()), where])
        is_first = False
        with contextlib.suppress(FileExistsError), (logs / STALL_FILE).open("x", encoding="utf-8") as file:
            file.write(text + "\n")
            is_first = True
        print(text, file=sys.stderr, flush=True)  # this rank's log
        faulthandler.dump_traceback(sys.stderr.fileno())
        pickled, pending = flight_record()
        (logs / f"flight_recorder_{rank}").write_bytes(pickled)
        print(*(f"pending: {line}" for line in pending), sep="\n", file=sys.stderr, flush=True)
        if is_first and console:
            print(f"error: {text}", file=console, flush=True)
        time.sleep(_LOG_GRACE_S if is_first else 2 * _LOG_GRACE_S)  # the first rank to exit makes the launcher end all
    finally:
        os._exit(1)
