"""Requests to stop a run between two rounds: signals, files, and a limit on its wall time.

Each process notes what it is asked; at the end of a round the processes tell each other, so that all of them stop
there or none does. A handler of Python's runs only when the main thread comes back to the interpreter, which it does
not while it waits for a peer; so signals are read by a thread of their own.
"""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""Stopped on request and to be started again: EX_TEMPFAIL of sysexits.h."""

STOP_FILE = "stop"
"""File in the run folder by which a person stops the run."""

STOP_FILE_VARIABLE = "FEDSIM_STOP_FILE"
"""Environment variable with the path of a file by which a batch script stops the run."""

LAUNCHER_STOP_FILE_VARIABLE = "FEDSIM_LAUNCHER_STOP_FILE"
"""The same for `launch local`, which sets it for its own processes."""

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
ENDING = (signal.SIGTERM, signal.SIGINT)
"""Signals that end the process at once when they come again."""

SAME_REQUEST_S = 3.0
"""A signal within this time of the first is the same request: a launcher passes on what it gets, and the terminal or
Slurm has sent it to every process already."""


class Preempted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop; every process raises it after the same round. The same command goes on."""


class StopRequests:
    """What this process was asked by signals.

    Attributes:
        began_s: when it was made, on `clock`.

    Args:
        end: ends the process at once with an exit code.
        clock: seconds.
    """

    def __init__(
        self, end: Callable[[int], object] = os._exit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._end = end
        self._clock = clock
        self._reason: str | None = None
        self._first_ending_s: float | None = None
        self._failing = False
        self.began_s = clock()

    @property
    def reason(self) -> str | None:
        """Name of the first signal; None before."""
        return self._reason

    @property
    def asked_to_end(self) -> bool:
        """Whether one of `ENDING` has come."""
        return self._first_ending_s is not None

    def failing(self) -> None:
        """The run has failed and is being closed: from now on a signal ends the process at once."""
        self._failing = True

    def got(self, number: int) -> None:
        """A signal has come. Called in a thread of its own."""
        name, now_s = signal.Signals(number).name, self._clock()
        is_again = False
        if number in ENDING:
            is_again = self._first_ending_s is not None and now_s - self._first_ending_s >= SAME_REQUEST_S
            if self._first_ending_s is None:
                self._first_ending_s = now_s
        if self._failing or is_again:
            logger.warning("%s: ending at once", name)
            self._end(128 + number)
        elif self._reason is None:
            more = f"; once more, after {SAME_REQUEST_S:.0f} seconds, ends it at once"
            logger.info("%s: stopping when this round is done%s", name, more if number in ENDING else "")
            self._reason = name


@contextlib.contextmanager
def signals_noted(requests: StopRequests) -> Iterator[None]:
    """Within the block, `SIGNALS` are handed to `requests`; does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, handlers_end = socket.socketpair()
    handlers_end.setblocking(False)
    before = {number: signal.signal(number, _note_only) for number in SIGNALS}
    for number in SIGNALS:
        signal.siginterrupt(number, False)  # the libraries' system calls go on
    wakeup_before = signal.set_wakeup_fd(handlers_end.fileno(), warn_on_full_buffer=False)
    reader = threading.Thread(target=_read, args=(ours, requests), name="signals", daemon=True)
    reader.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        handlers_end.close()
        reader.join()
        ours.close()


def _note_only(number: int, frame: object) -> None:
    """The signal's number is written to the socket before Python calls this, whatever the main thread does."""


def _forget_in_child() -> None:
    """A forked process shares the socket: a signal to it must not look like one to its parent."""
    if signal.getsignal(signal.SIGTERM) is _note_only:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


def _read(numbers: socket.socket, requests: StopRequests) -> None:
    while data := numbers.recv(64):
        for number in data:
            if number in SIGNALS:  # others have handlers of their own
                requests.got(number)


class TimeBudget:
    """Wall time of this start of a run.

    Args:
        max_s: seconds; None for no limit.
        began_s: when this start began, on `clock`.
        clock: seconds.
    """

    def __init__(
        self, max_s: float | None, began_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_s = max_s
        self._began_s = began_s
        self._clock = clock
        self._last_s = clock()
        self._longest_s = 0.0

    def rounds_begin(self) -> None:
        """The first round of this start begins now."""
        self._last_s = self._clock()

    def round_over(self) -> None:
        """A round is over now, and the next begins."""
        now_s = self._clock()
        self._longest_s = max(self._longest_s, now_s - self._last_s)
        self._last_s = now_s

    def reason(self) -> str | None:
        """Why there is no time for another round as long as the longest so far; None if there is."""
        if self._max_s is None:
            return None
        spent_s = self._clock() - self._began_s
        if spent_s + self._longest_s <= self._max_s:
            return None
        return (
            f"run.max_minutes={self._max_s / 60:g}: {spent_s / 60:.3g} are spent, and the longest round took "
            f"{self._longest_s / 60:.3g}"
        )


class StopWatch:
    """All reasons for this process to ask for a stop.

    Args:
        requests: by signals.
        run_stop_file: see `STOP_FILE`; taken away when it was obeyed.
        other_stop_files: belong to others, and stay.
        budget: of wall time.
    """

    def __init__(
        self,
        requests: StopRequests,
        run_stop_file: Path,
        other_stop_files: Sequence[Path],
        budget: TimeBudget,
    ) -> None:
        self._requests = requests
        self._run_stop_file = run_stop_file
        self._other_stop_files = other_stop_files
        self.budget = budget

    def reason(self) -> str | None:
        """Why this process asks for a stop now, in a few words; None if it does not."""
        if self._requests.reason is not None:
            return self._requests.reason
        for path in (self._run_stop_file, *self._other_stop_files):
            if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a folder may not be read
                return f"the stop file {path}"
        return self.budget.reason()

    def ends(self, error: BaseException) -> None:
        """The run ends by `error`: unless it was asked to, a signal ends the process at once from now on."""
        if not isinstance(error, Preempted):
            self._requests.failing()

    def obeyed(self) -> None:
        """The run has stopped; for one process."""
        with contextlib.suppress(OSError):
            self._run_stop_file.unlink(missing_ok=True)
