"""A user's mistake in one line, under an external launcher: from one rank, and before any rank exits.

Ranks find a mistake each on its own, often before they are connected, and the launcher ends all others once one exits.
So the first that tells it claims it in a store that all ranks can reach. The others wait until it is said.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import ConfigError
from recipes.launch.environment import RENDEZVOUS, make_private_folder

if TYPE_CHECKING:
    from torch.distributed import Store

CLAIMS, SAID, LEFT = (f"ring_attention/refusal/{name}" for name in ("claims", "said", "left"))
CONNECT_S = 30.0  # for rank 0 to open the store, unless the launcher has
RANK_0_FIRST_S = 5.0  # launchers can hide what the other ranks print
STAY_S = 10.0  # for the others to learn that it was said; those that are not refused never ask
_POLL_S = 0.05


def say_once(line: str) -> None:
    """Print the line to stderr, unless another rank has. Each refused rank calls it once, as the last thing it does.

    If ranks cannot reach each other, all of them print it.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks == 1:
        return _say(line)
    try:
        store = _shared_store(rank, num_ranks, CONNECT_S)
        if rank:
            _wait(lambda: store.check([SAID]), RANK_0_FIRST_S)
        is_first = store.add(CLAIMS, 1) == 1
    except (RuntimeError, OSError, ConfigError):
        # the folder of a file rendezvous is refused on all ranks of this host alike
        return _say(line) if RENDEZVOUS not in os.environ or os.environ["LOCAL_RANK"] == "0" else None
    try:
        if is_first or not _wait(lambda: store.check([SAID]), STAY_S):
            _say(line)
            store.set(SAID, "yes")
        store.add(LEFT, 1)
        if not _is_launchers_store():  # which goes with rank 0, or with the folder
            _wait(lambda: store.add(LEFT, 0) >= num_ranks, STAY_S)
    except RuntimeError:
        pass  # the store is gone with rank 0, which has said it
    return None


def was_said() -> bool:
    """Whether a rank has told a mistake, so that others lose it. Only torchrun's store is there when a rank is not."""
    if not _is_launchers_store():
        return False
    try:
        return _shared_store(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s=1).check([SAID])
    except RuntimeError:
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _wait(is_done: Callable[[], bool], at_most_s: float) -> bool:
    """Whether it was done in time. By asking: the store's own wait prints warnings when it ends."""
    deadline = time.monotonic() + at_most_s
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _is_launchers_store() -> bool:
    """Whether torchrun's agent keeps the store at MASTER_PORT, and outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _shared_store(rank: int, num_ranks: int, timeout_s: float) -> Store:
    """Where the process group meets, or will meet. Imports torch, which takes seconds."""
    from torch.distributed import FileStore, TCPStore

    if rendezvous := os.environ.get(RENDEZVOUS):
        make_private_folder(Path(rendezvous))
        store = FileStore(str(Path(rendezvous, "refusals")), num_ranks)
        store.set_timeout(timedelta(seconds=1))  # it waits so long for a file that the first to exit has removed
        return store
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        num_ranks,
        is_master=rank == 0 and not _is_launchers_store(),
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,  # shares the port with rank 0's process group
    )
