"""Fault injection: every fault must end a run in time, with one clear error, and lose nothing.

`python -m tests.tools.faults` injects all faults. `--seed N` draws other ranks, times, files and bits; `--only NAME`
takes one fault; `--json FILE` writes the table. A fault is a function of a `Case` that raises AssertionError. The full
disk and the full /dev/shm are small ones, mounted for the run alone, which takes root.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from recipes.checkpoint.manifest import BrokenCheckpoint, check_files, newest_first, read_manifest
from tests.cli.program import Finished, Program, Running

STALL_S, TIMEOUT_S = 3.0, 30.0  # of a step, and of a collective outside steps
LATE_S = 15.0  # extra time until a run has ended, for a busy machine
JOB = [
    "+experiment=ra_sp",
    "engine.dtype=fp32",
    "data.sequence_length=256",
    "data.validation_sequences=2",
    "logging.every_n_steps=1",
    "checkpoint.every_n_steps=5",
    "checkpoint.keep=3",
    "breakdown=false",
    f"launch.stall_s={STALL_S}",
    f"launch.timeout_s={TIMEOUT_S}",
]
SHORT = [*JOB, "launch.num_ranks=2", "num_steps=20"]
ENDLESS = [*JOB, "launch.num_ranks=3", "num_steps=100000"]
COMPUTED = (
    *("step", "train/loss", "train/grad_norm", "train/learning_rate", "train/data_epoch", "train/data_sequence"),
    "validation/loss",
)


@dataclass
class Case:
    """One try of a fault.

    Args:
        number: of the try, from 0.
        seconds: from each fault to the end of the last process.
        error: what the user saw.
    """

    random: random.Random
    program: Program
    number: int = 0
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    def failed(self, finished: Finished) -> str:
        """The one error of a run; checks that it has no traceback and that the newest checkpoint is intact."""
        self.error = finished.stderr.strip()
        assert finished.exit_code == 1, finished.exit_code
        assert self.error.count("error: ") == 1, self.error
        assert self.error.startswith("error: "), self.error
        assert "Traceback" not in self.error, self.error
        assert_newest_is_intact(finished.run_dir)
        return self.error

    def ends(self, running: Running, within_s: float) -> Finished:
        """Wait until a run that just got a reason to end has no process left."""
        started = time.monotonic()
        finished = running.finish(within_s + LATE_S)
        running.assert_nothing_is_left()
        self.seconds.append(time.monotonic() - started)
        assert self.seconds[-1] < within_s + LATE_S, self.seconds
        return finished


def assert_newest_is_intact(run_dir: Path) -> None:
    for folder in newest_first(run_dir)[:1]:
        manifest = read_manifest(folder)
        check_files(folder, manifest, manifest.files)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{name: row.get(name) for name in COMPUTED} for row in map(json.loads, lines)]


def resumes(case: Case, reference: Path, name: str = "run") -> Finished:
    """The same command ends well, with the numbers of an uninterrupted run."""
    finished = case.program.run(*SHORT, name=name)
    assert finished.exit_code == 0, finished.stderr
    assert rows(finished.run_dir) == rows(reference)
    return finished


_references: dict[str, Path] = {}


def reference(kind: str) -> Path:
    """A run dir, made once: of an uninterrupted run, or of one killed after its third checkpoint ("killed")."""
    if kind not in _references:
        program = Program(Path(tempfile.mkdtemp(dir=_folder().name)))
        with program.started(*SHORT) as running:
            if kind == "killed":
                running.until(lambda: "step 15: checkpoint" in running.stdout)
                running.family()
                running.process.kill()
                running.finish()
            else:
                assert running.finish().exit_code == 0, running.stderr
            running.assert_nothing_is_left()
        _references[kind] = running.run_dir
    return _references[kind]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """The folder of all runs; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="faults_")


def killed_copy(case: Case) -> Path:
    """A run dir to resume from, with checkpoints of steps 5, 10 and 15."""
    return Path(shutil.copytree(reference("killed"), case.program.folder / "run"))


def kill(case: Case, running: Running, ranks: list[psutil.Process]) -> Finished:
    rank = case.random.randrange(len(ranks))
    ranks[rank].kill()
    finished = case.ends(running, 0)
    assert re.match(rf"error: rank {rank} was ended by SIGKILL( \(.*\))?\n", case.failed(finished)), case.error
    return finished


def kills(case: Case, tries: int) -> None:
    """Kill one run again and again; at last its numbers are those of an uninterrupted run."""
    for number in range(tries):
        with case.program.started(*ENDLESS, wandb=True) as running:
            if case.random.random() < 0.25:  # while it starts
                running.until(lambda: len(running.ranks()) == 3)
                ranks = running.ranks()
                running.family()
                time.sleep(case.random.uniform(0, 5))
            else:
                running.until(lambda: re.search(r"^step ", running.stdout, re.MULTILINE))
                running.family()
                ranks = running.ranks()
                time.sleep(case.random.uniform(0, 1.5))
            kill(case, running, ranks)
        gone = f"all gone after {case.seconds[-1]:.2f} s"
        print(f"    kill {number + 1} of {tries}: {gone}; {_first_line(case.error)}", flush=True)
    with case.program.started(*ENDLESS, wandb=True) as running:
        running.until(lambda: re.search(r"^step ", running.stdout, re.MULTILINE))
        running.family()
        running.process.terminate()
        assert running.finish().exit_code == 143
        running.assert_nothing_is_left()
    reached = rows(running.run_dir)
    with case.program.started(*ENDLESS, name="uninterrupted") as uninterrupted:
        path = uninterrupted.run_dir / "metrics.jsonl"
        uninterrupted.until(lambda: path.exists() and len(path.read_text().splitlines()) > len(reached))
        uninterrupted.family()
    uninterrupted.assert_nothing_is_left()
    assert [row["step"] for row in reached] == list(range(1, len(reached) + 1))
    assert rows(uninterrupted.run_dir)[: len(reached)] == reached


def stall(case: Case) -> None:
    """SIGSTOP of a rank."""
    with case.program.started(*ENDLESS, wandb=True) as running:
        ranks = running.until_it_trains()
        running.until(lambda: re.search(r"step +9/", running.stdout))
        time.sleep(case.random.uniform(0, 1))
        rank = case.random.randrange(len(ranks))
        ranks[rank].send_signal(signal.SIGSTOP)
        error = case.failed(case.ends(running, TIMEOUT_S))
    lines = error.splitlines()
    in_step = r"error: step \d+ is not done after [3-6]\.\d s, "
    assert re.match(rf"{in_step}|error: rank \d failed: .*Timed out waiting {TIMEOUT_S * 1e3:.0f}ms ", lines[0]), error
    assert [bool(re.match(rf"rank {number} \(", line)) for number, line in enumerate(lines[1:4])] == [True] * 3, error
    stopped = [number for number, line in enumerate(lines[1:4]) if line.endswith("its process is stopped by a signal")]
    assert stopped == [rank], error


def disk_full(case: Case) -> None:
    """Another program fills the disk; once there is room the same command resumes."""
    with mounted(case.program.folder / "run", "40m") as disk:  # holds the run dir, but not what we see of it
        filler = disk / "filler"
        with case.program.started(*SHORT, wandb=True) as running:
            running.until(lambda: "step 5: checkpoint" in running.stdout)
            running.family()
            filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - case.random.randrange(2**20, 4 * 2**20))))
            error = case.failed(case.ends(running, 10))
        assert re.match(
            r"error: rank \d could not write \(checkpoint of step \d+\): No space left on device: .*\n"
            r"the same command resumes from step_000000\d\d: first free space",
            error,
        ), error
        filler.unlink()
        finished = case.program.run(*SHORT, wandb=True)
        assert finished.exit_code == 0, finished.stderr
        assert "resuming after step 5\n" in finished.stdout or "resuming after step 10\n" in finished.stdout


def damaged_checkpoint(case: Case) -> None:
    """A file of the newest checkpoint is truncated, missing, or has a flipped bit: the one before it is used."""
    run_dir = killed_copy(case)
    newest = newest_first(run_dir)[0]
    path = case.random.choice(sorted(newest.iterdir()))
    content = bytearray(path.read_bytes())
    offset = case.random.randrange(len(content))
    what = ("truncated", "flipped", "missing")[case.number % 3]
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(content[:offset])
    else:
        content[offset] ^= 1 << case.random.randrange(8)
        path.write_bytes(content)
    finished = resumes(case, reference("uninterrupted"))
    said = re.search(r"^checkpoint .* is broken, so the one before it is tried: .*$", finished.stdout, re.MULTILINE)
    assert said is not None, finished.stdout
    case.error = said[0]


def all_checkpoints_damaged(case: Case) -> None:
    run_dir = killed_copy(case)
    for folder in newest_first(run_dir):
        (folder / "manifest.json").write_text("{}")
    finished = case.program.run(*SHORT)
    case.error = finished.stderr
    assert finished.exit_code == 1
    assert re.match(r"error: every checkpoint in .* is broken: .*rename that folder to start", finished.stderr)
    assert "\ncheckpoint step_00000005 is broken: " in finished.stdout, finished.stdout


def another_model(case: Case) -> None:
    """Refused before ranks start."""
    killed_copy(case)
    finished = case.program.run(*SHORT, "model.num_layers=3")
    error = case.failed(finished)
    assert "belongs to another run: model.num_layers was 2 and is 3" in error, error
    assert "starting" not in finished.stdout
    resumes(case, reference("uninterrupted"))


def corrupt_data(case: Case) -> None:
    """A truncated compressed file before the run, or a file that disappears during it."""
    import gzip

    texts = case.program.folder / "texts"
    texts.mkdir()
    letters = case.random.choices("abcdefgh \n", k=20_000)
    for number in range(3):
        (texts / f"{number}.txt").write_text("".join(letters))
    arguments = [*ENDLESS, "data=text_files", f"data.files={texts}/*"]
    if case.random.random() < 0.5:
        compressed = gzip.compress("".join(letters).encode())
        (texts / "3.gz").write_bytes(compressed[: len(compressed) // 2])
        finished = case.program.run(*arguments, "data.validation_sequences=300")
        assert "starting" not in finished.stdout
    else:
        with case.program.started(*arguments) as running:
            running.until_it_trains()
            shutil.rmtree(texts)
            finished = case.ends(running, 60)
    assert "cannot be read" in case.failed(finished), case.error


def bad_loss(case: Case) -> None:
    """NaN on one rank in one step: the run stops, or with the other policy skips the step."""
    bad_step = case.random.randrange(7, 14)
    launcher = ["tests/tools/bad_loss.py", str(bad_step)]  # forked
    with case.program.started(*SHORT, launcher=launcher, name="run") as running:
        error = case.failed(running.finish())
        running.assert_nothing_is_left()
    assert error.startswith(
        f"error: step {bad_step}: the loss is nan on the tokens of rank 1; batch: 1 sequence up to number "
        f"{bad_step - 1} of epoch 0, which has SHA-256 "
    ), error
    assert newest_first(running.run_dir)[0].name == f"step_{(bad_step - 1) // 5 * 5:08d}"
    finished = case.program.run(*SHORT, "engine.on_bad_step=skip", launcher=launcher)
    assert finished.exit_code == 0, finished.stderr
    assert re.search(rf"^step {bad_step}: the loss is nan .*: skipped$", finished.stdout, re.MULTILINE)
    bad = [row["step"] for row in rows(finished.run_dir) if row["train/loss"] is None]
    assert bad == [bad_step], bad


def full_shared_memory(case: Case) -> None:
    """Ranks on the CPU need no shared memory."""
    script = (
        "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/filler && "
        f'exec {sys.executable} "$@"'
    )
    finished = case.program.run(*SHORT, launcher=["unshare", "--mount", "bash", "-c", script, "--"])
    assert finished.exit_code == 0, finished.stderr


def taken_port(case: Case) -> None:
    """The port of a launcher's ranks; our own ranks need no known port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launcher = ["env", "RANK=0", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1"]
        finished = case.program.run(*SHORT, launcher=[*launcher, f"MASTER_PORT={port}", sys.executable])
    assert f"MASTER_PORT={port} is taken on 127.0.0.1" in case.failed(finished), case.error


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small disk."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, timeout=20)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=20)


@dataclass(frozen=True)
class Fault:
    what: str
    do: Callable[[Case], None]
    tries: int = 1
    times: int = 1  # injections per try
    needs_root: bool = False


FAULTS = {
    "kill": Fault("kill -9 of a rank", lambda case: kills(case, 20), times=20),
    "stall": Fault("SIGSTOP of a rank", stall, tries=3),
    "disk": Fault("disk full while saving", disk_full, tries=2, needs_root=True),
    "damage": Fault("file of a checkpoint damaged", damaged_checkpoint, tries=6),
    "all_damaged": Fault("all checkpoints damaged", all_checkpoints_damaged),
    "model": Fault("checkpoint of another model", another_model),
    "data": Fault("data file damaged or gone", corrupt_data, tries=2),
    "loss": Fault("loss is NaN, stop and skip", bad_loss, tries=2),
    "shm": Fault("/dev/shm full", full_shared_memory, needs_root=True),
    "port": Fault("port taken", taken_port),
}


def run_fault(name: str, seed: int, tries: int | None = None) -> dict[str, Any]:
    """A row of the table. `tries` defaults to the fault's own."""
    fault = FAULTS[name]
    tries = tries or fault.tries
    row: dict[str, Any] = {"fault": fault.what, "tried": 0, "survived": 0, "lost": 0, "end_s": [], "errors": []}
    if fault.needs_root and os.geteuid():
        return {**row, "errors": ["not tried: needs root"]}
    for number in range(tries):
        with tempfile.TemporaryDirectory(dir=_folder().name) as folder:
            case = Case(random.Random(f"{seed} {name} {number}"), Program(Path(folder)), number)
            row["tried"] += fault.times
            try:
                fault.do(case)
                row["survived"] += fault.times
            except (AssertionError, BrokenCheckpoint, subprocess.TimeoutExpired):
                row["lost"] += fault.times
                case.error = f"LOST: {traceback.format_exc()}\n{case.error}"
                print(case.error, flush=True)
        row["end_s"] += [round(seconds, 2) for seconds in case.seconds]
        row["errors"].append(case.error.replace(folder, "FOLDER").strip())
        print(f"  {fault.what}, {number + 1} of {tries}: {_first_line(row['errors'][-1])}", flush=True)
    return row


def _first_line(text: str) -> str:
    return text.split("\n")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject every fault into a run.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, help="one fault")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args()
    started, table = time.monotonic(), []
    for name in [options.only] if options.only else FAULTS:
        print(f"{time.monotonic() - started:5.0f} s: {FAULTS[name].what}", flush=True)
        table.append(run_fault(name, options.seed))
    print(f"\n{'fault':32} tried survived lost  seconds to the end: median, longest")
    for row in table:
        ends = row["end_s"]
        seconds = f"{statistics.median(ends):6.2f} {max(ends):6.2f}" if ends else ""
        print(f"{row['fault']:32} {row['tried']:5} {row['survived']:8} {row['lost']:4}  {seconds}")
    if options.json:
        summary = {
            "seed": options.seed,
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "seconds": round(time.monotonic() - started),
            "faults": table,
        }
        options.json.write_text(json.dumps(summary, indent=1) + "\n")
    return any(row["lost"] for row in table)


if __name__ == "__main__":
    sys.exit(main())
