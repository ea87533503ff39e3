"""A mistake under an external launcher is told by one rank, before any of them exits."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from recipes.launch import refusals
from recipes.launch.environment import RENDEZVOUS
from recipes.launch.refusals import say_once, was_said

LINE = "error: that does not fit"


def _rank(rank: int, late_s: float, said: Path) -> None:
    """What a refused rank does. Then it is a rank that has exited."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    with said.open("a") as file:
        sys.stderr = file
        time.sleep(late_s)
        say_once(LINE)
    with said.open("a") as file:
        print("exited", file=file)
    if rendezvous := os.environ.get(RENDEZVOUS):  # as train.py
        shutil.rmtree(rendezvous, ignore_errors=True)


@pytest.fixture(params=["torchrun", "deepspeed", "srun"])
def said_by(request, tmp_path, monkeypatch) -> Iterator[Callable[[dict[int, float]], list[str]]]:
    """The lines that ranks print and their exits, in order, given how late each refused rank is."""
    monkeypatch.setattr(refusals, "RANK_0_FIRST_S", 1.0)
    monkeypatch.setattr(refusals, "STAY_S", 2.0)
    # a port that is free: only torchrun has a store there before ranks start
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "WORLD_SIZE": "2"}
    if request.param == "torchrun":
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    elif request.param == "srun":
        environment[RENDEZVOUS] = str(tmp_path / "rendezvous")
    if request.param != "torchrun":
        agent = None  # rank 0 opens its own
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(late_s: dict[int, float]) -> list[str]:
        said = tmp_path / "said"
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=_rank, args=(rank, late, said)) for rank, late in late_s.items()]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(20)
            assert process.exitcode == 0
        return said.read_text().splitlines()

    yield run
    del agent  # not before


@pytest.mark.parametrize("late_s", [{0: 0, 1: 0}, {0: 0.3, 1: 0}, {0: 1.5, 1: 0}, {0: 0, 1: 0.5}], ids=str)
def test_ranks_that_are_all_refused_say_it_once_before_any_exits(said_by, late_s):
    assert said_by(late_s) == [LINE, "exited", "exited"]


def test_a_rank_that_alone_is_refused_says_it(said_by, monkeypatch):
    """Also if rank 0 has not come yet to open the store, as it does under deepspeed."""
    monkeypatch.setattr(refusals, "CONNECT_S", 1.0)
    assert said_by({1: 0}) == [LINE, "exited"]


@pytest.mark.parametrize("said_by", ["torchrun"], indirect=True)
def test_under_torchrun_a_rank_that_was_not_refused_knows_why_it_loses_others(said_by, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    assert not was_said()
    said_by({1: 0})
    assert was_said()
