"""`python -m launch.agent`: torchrun on one machine, with the run's own exit code and time to stop.

torchrun itself ends with 1 and a report of many lines whatever its processes say, and kills them 30 seconds after a
SIGTERM, in the middle of a round. `python -m launch local` and `sweep` start this in its place; it takes torchrun's
arguments.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedsim.stopping import LAUNCHER_STOP_FILE_VARIABLE, SAME_REQUEST_S

HANDLED_HERE = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str]) -> int:
    """Run torchrun's arguments; the exit code of the process that failed first, 128 + n for one that signal n ended."""
    with tempfile.TemporaryDirectory(prefix="fedsim-launch-") as folder:
        stop_file = Path(folder) / "stop"
        os.environ[LAUNCHER_STOP_FILE_VARIABLE] = str(stop_file)
        return _run(arguments, _Stops(stop_file))


class _Stops:
    """Signals to this process: the first asks the run to stop after its round, another one ends it."""

    def __init__(self, stop_file: Path) -> None:
        self._stop_file = stop_file
        self._first_s: float | None = None

    def got(self, number: int, frame: object) -> None:  # noqa: ARG002
        """A handler of `signal.signal`."""
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self._first_s is not None and time.monotonic() - self._first_s >= SAME_REQUEST_S:
            raise SignalException("ended at once", signal.Signals(number))
        if self._first_s is None:
            self._first_s = time.monotonic()
            self._stop_file.touch()


def _run(arguments: Sequence[str], stops: _Stops) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # its report of what is said below
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = run.parse_args(list(arguments))  # type: ignore[no-untyped-call]
    if hasattr(options, "signals_to_handle"):  # an older torchrun takes all of them for itself, after us
        options.signals_to_handle = "SIGHUP,SIGQUIT"
    for number in HANDLED_HERE:
        signal.signal(number, stops.got)
    try:
        run.run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        return _code(rank, int(first.exitcode))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _code(rank: int, code: int) -> int:
    """An exit code as a shell says it; tells of a signal, of which the process could not."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    remedy = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
    sys.stderr.write(f"launch: rank {rank} was ended by {name}{remedy}\n")
    return 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
