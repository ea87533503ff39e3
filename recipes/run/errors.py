"""How a run ends early."""

from __future__ import annotations

import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send one of them some time before they kill


class RunFailed(RuntimeError):
    """A rank failed. The message names the rank, shows its error and says where its log is.

    With `of_all_ranks` every rank raises it; rank 0 alone reports it, and all can wait for that.
    """

    def __init__(self, message: str, of_all_ranks: bool = False) -> None:
        super().__init__(message)
        self.of_all_ranks = of_all_ranks


class Preempted(SystemExit):
    """SIGTERM or SIGUSR1 stopped the run; the same command with its run dir resumes. `of_all_ranks` as for `RunFailed`.

    The exit code is that of SIGTERM for both signals. RUN_DIR/logs/preempted exists if the run saved a checkpoint.
    `number` is the signal's, for the run's parent.
    """

    EXIT_CODE = 128 + signal.SIGTERM

    def __init__(self, of_all_ranks: bool = False, number: int = signal.SIGTERM) -> None:
        super().__init__(self.EXIT_CODE)
        self.of_all_ranks = of_all_ranks
        self.number = number
