"""Why a run of several ranks failed, in one error: the rank that failed first, where it was, and its log."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.run.heartbeat import LOGS_DIR, STALL_FILE, describe_ranks, position

TIMED_OUT = "Timed out waiting"  # in gloo's error
_OOM_KILLER_HINT = "\nprobably the OOM killer, if nobody killed it: see dmesg and explain=true"


@dataclass(frozen=True)
class Outcome:
    """What a rank sends its parent: the recipe's result, or an error for people.

    Args:
        refused: whether the configuration is at fault, not this rank.
        reported: when, by the host's clock.
    """

    rank: int
    result: float = float("nan")
    error: str = ""
    refused: bool = False
    reported: float = field(default_factory=time.monotonic)


def explain_failure(exit_codes: Sequence[int], first_seen: int, outcomes: Sequence[Outcome], run_dir: Path) -> str:
    """The error of a run: of a rank that a signal ended, else of the first rank that reported one.

    Args:
        exit_codes: by rank, when the first failure was seen; 0 for ranks that still ran.
        first_seen: the rank whose failure was seen first.
        outcomes: in any order.
    """
    with contextlib.suppress(FileNotFoundError):  # the watchdog has ended the run
        return (run_dir / LOGS_DIR / STALL_FILE).read_text(encoding="utf-8").rstrip()
    reported = sorted((outcome for outcome in outcomes if outcome.error), key=lambda outcome: outcome.reported)
    # survivors of a reported failure may abort, as NCCL's watchdog makes them do
    consequences = {-signal.SIGABRT} if reported else set()
    signalled = [rank for rank, code in enumerate(exit_codes) if code < 0 and code not in consequences]
    transfers: list[str] = []
    if signalled:
        rank = signalled[0]
        names = {-number: number.name for number in signal.Signals}  # real-time signals have none
        name = names.get(exit_codes[rank], f"signal {-exit_codes[rank]}")
        what = f"rank {rank} was ended by {name}{position(run_dir, rank)}"
        transfers = _overdue_transfers(run_dir)
    elif reported:
        rank, what = reported[0].rank, reported[0].error.rstrip()
        if reported[0].refused:
            return what
    else:
        rank, what = first_seen, f"rank {first_seen} exited with code {exit_codes[first_seen]}"
    timed_out = TIMED_OUT in what
    if timed_out:  # the traceback is in the log
        what = f"rank {rank} failed: {what.splitlines()[-1]}"
    ranks = describe_ranks(run_dir, len(exit_codes), time.time()) if timed_out or transfers else []
    hint = _OOM_KILLER_HINT if exit_codes[rank] == -signal.SIGKILL else ""
    log = run_dir / LOGS_DIR / f"rank_{rank}.log"
    return "\n".join([what, *transfers, *ranks, f"the other ranks were ended; its log: {log}{hint}"])


def _overdue_transfers(run_dir: Path) -> list[str]:
    """What ranks on NCCL logged before they aborted themselves: see `ring_attention.transport`."""
    logs = sorted((run_dir / LOGS_DIR).glob("rank_*.log"))
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if line.startswith("TransferError: ")]
