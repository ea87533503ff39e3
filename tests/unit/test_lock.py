"""One run at a time in a run dir."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema import ConfigError
from recipes.run.lock import LOCK_FILE, locked

HOLDS = """
import sys, time, pathlib, recipes.run.lock
with recipes.run.lock.locked(pathlib.Path(sys.argv[1])):
    print('held', flush=True)
    """


def holder(folder: Path, then: str) -> subprocess.Popen[str]:
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS + then, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_which_process_holds_the_folder_and_a_killed_one_does_not_hold_it(tmp_path):
    folder = tmp_path / "runs" / "same"
    with holder(folder, "time.sleep(100)") as first:
        before = (folder / LOCK_FILE).read_text()
        with pytest.raises(ConfigError) as caught, locked(folder, "hydra.sweep.dir"):
            pass
        host = re.escape(socket.gethostname())
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        named = rf"{re.escape(str(folder))} is used by process {first.pid} on {host} since {since} "
        assert re.match(named, str(caught.value))
        assert "hydra.sweep.dir" in str(caught.value)
        assert "delete" not in str(caught.value)
        assert (folder / LOCK_FILE).read_text() == before
        first.send_signal(signal.SIGKILL)
    assert (folder / LOCK_FILE).read_text() == before
    with locked(folder):
        assert f"process {os.getpid()} on " in (folder / LOCK_FILE).read_text()
    assert list(folder.iterdir()) == []


def test_a_program_that_the_holder_has_started_does_not_hold_the_folder(tmp_path):
    """Such as wandb's service, which may outlive a killed run."""
    with holder(
        tmp_path, "import subprocess; print(subprocess.Popen(['sleep', '100'], close_fds=False).pid, flush=True)"
    ) as first:
        assert first.stdout is not None
        started = int(first.stdout.readline())
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(started, signal.SIGKILL)


def test_of_many_that_start_at_once_one_holds_the_folder_at_a_time(tmp_path):
    code = HOLDS + "p = pathlib.Path(sys.argv[1], 'alone'); p.touch(exist_ok=False); time.sleep(0.01); p.unlink()"
    loop = f"import conf.schema\nfor _ in range(50):\n  try: exec({code!r})\n  except conf.schema.ConfigError: pass"
    processes = [
        subprocess.Popen([sys.executable, "-c", loop, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert "".join(outputs).count("held\n") >= 4


def test_a_holder_on_another_host_may_be_gone(tmp_path, monkeypatch):
    with locked(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(ConfigError, match=rf"delete {re.escape(str(tmp_path / LOCK_FILE))}$"), locked(tmp_path):
            pass


def test_without_locks_the_run_goes_on_with_a_line(tmp_path, monkeypatch, capsys):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path):
        pass
    assert "No locks available" in capsys.readouterr().err
