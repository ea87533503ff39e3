"""How a run ends early. Imports nothing slow."""

from __future__ import annotations

import signal


class RunFailed(RuntimeError):
    """A rank failed; the message names it, shows its error and says where its log is.

    Args:
        of_all_ranks: whether all of them raise it, so that rank 0 is enough to tell, and all can wait for that.
    """

    def __init__(self, message: str, of_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.of_all_ranks = of_all_ranks


class Preempted(SystemExit):
    """The run was told to end, by SIGTERM or SIGUSR1, and has: the same command with its run dir goes on.

    The exit code is that of SIGTERM for both, which is no failure; `logs/preempted` says whether it has saved.

    Args:
        of_all_ranks: as `RunFailed`'s.
    """

    EXIT_CODE = 128 + signal.SIGTERM

    def __init__(self, of_all_ranks: bool = False) -> None:
        super().__init__(self.EXIT_CODE)
        self.of_all_ranks = of_all_ranks
