"""A log file for each process: what only rank 0 shows on the console, of every rank, with what it was doing."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOGS = "logs"

logger = logging.getLogger(__name__)


@contextmanager
def rank_log(run_folder: Path, rank: int, place: Callable[[], str]) -> Iterator[None]:
    """Within the block, what fedsim logs goes to `logs/rank_NNNN.log` of the run folder too, appended.

    A process that does not see the run folder, because its node does not share that disk, has no log file; nor has one
    that cannot write it. What a full disk does not take is not logged.

    Args:
        run_folder: made by rank 0.
        rank: of this process.
        place: what the process is doing, in words.
    """
    if not run_folder.is_dir():
        logger.info("no log file: %s is not visible here", run_folder)
        yield
        return
    folder = run_folder / LOGS
    try:
        folder.mkdir(exist_ok=True)
        handler = _Log(folder / f"rank_{rank:04d}.log", encoding="utf-8")
    except OSError as error:
        logger.warning("no log file: %s cannot be written (%s)", folder, error.strerror or error)
        yield
        return
    formatter = logging.Formatter("%(asctime)s rank %(rank)d %(levelname)s [%(place)s] %(message)s")
    formatter.converter = time.gmtime  # as in run.json
    formatter.default_msec_format = "%s.%03dZ"
    handler.setFormatter(formatter)
    handler.addFilter(lambda record: _add_place(record, rank, place()))
    root = logging.getLogger("fedsim")
    root.addHandler(handler)
    try:
        yield
    except Exception as error:
        logger.info("ends by %s: %s", type(error).__name__, error)
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


class _Log(logging.FileHandler):
    """A log file that says nothing on the console when it cannot be written; the error line of the run does."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Drop what cannot be written."""


def _add_place(record: logging.LogRecord, rank: int, place: str) -> bool:
    record.rank, record.place = rank, place
    return True
