"""Where each process is, so that an error can say who is missing and what it was doing.

Each process writes a mark to the store at which the processes met: a count that grows as long as the process lives, the
number of exchanges it has entered, and what it does. A thread of its own writes it twice a second, so that an exchange
costs nothing more. The marks are read only when something is wrong.
"""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
SILENT_AFTER = 6
"""Periods without a new mark after which a process counts as ended or stopped."""

GIVEN_UP_AFTER = 3 * SILENT_AFTER
"""The same where this alone ends another process: one that is busy may be late with its mark."""

SHOWN = 8
"""Ranks that a message names one by one."""


class MarkStore(Protocol):
    """What is used of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value; waits for one."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have a value."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a process says about itself.

    Attributes:
        beat: grows with each mark.
        exchanges: how many it has entered.
        what: it does.
        ended: the process has left after an error.
    """

    beat: int
    exchanges: int
    what: str
    ended: bool = False

    def to_text(self) -> str:
        """As it is stored."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: bytes) -> "Mark":
        """From what `to_text` made."""
        return cls(**json.loads(text))


class Marks:
    """The mark of this process, and those of the others.

    Args:
        connect: makes a connection to the store that nobody else uses, and whose waits are short.
        rank: of this process.
        world_size: number of processes.
        period_s: between two marks.
    """

    def __init__(
        self,
        connect: Callable[[], MarkStore],
        rank: int,
        world_size: int,
        period_s: float = PERIOD_S,
    ) -> None:
        self._connect = connect
        self._rank = rank
        self._world_size = world_size
        self._period_s = period_s
        self._what = "starting"
        self._part = ""
        self._beat = 0
        self._exchanges = 0
        self._waiting_since_s: float | None = None
        self._stopped = threading.Event()
        self._each_beat: Callable[[], None] | None = None
        self._store: MarkStore | None = None
        self._reading: MarkStore | None = None
        self._seen: dict[int, tuple[Mark, int]] = {}
        self._thread = threading.Thread(target=self._write_marks, name="marks", daemon=True)
        self._thread.start()

    def note(self, what: str) -> None:
        """What this process does from now on."""
        self._what, self._part = what, ""

    def note_part(self, part: str) -> None:
        """Which part of it."""
        self._part = part

    @property
    def place(self) -> str:
        """What this process does."""
        return f"{self._what} ({self._part})" if self._part else self._what

    @contextlib.contextmanager
    def exchange(self, *, counts: bool = True) -> Iterator[None]:
        """Around an exchange with the other processes; one of some of them does not count, or they would differ."""
        self._exchanges += counts
        self._waiting_since_s = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since_s = None

    @property
    def waited_s(self) -> float:
        """How long the exchange that goes on has taken so far, in seconds; 0 between two."""
        since_s = self._waiting_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def each_beat(self, function: Callable[[], None]) -> None:
        """Call `function` with each mark, in the thread that writes them."""
        self._each_beat = function

    def stop(self, *, failed: bool) -> None:
        """Write no more marks; a process that failed says so."""
        self._stopped.set()
        self._thread.join(2 * self._period_s)
        if failed and not self._thread.is_alive():
            with contextlib.suppress(RuntimeError, OSError):
                self._write(ended=True)

    def silent(self) -> list[int]:
        """Ranks that write no marks any more: ended, or stopped. To be called with each beat; does not wait."""
        try:
            store = self._connect() if self._reading is None else self._reading
            self._reading = store
            now = self._read(store)
        except (RuntimeError, OSError):
            self._reading = None  # the store is gone, which says nothing about the ranks
            return []
        for rank, mark in now.items():
            seen = self._seen.get(rank)
            if mark is not None and (seen is None or seen[0] != mark):
                self._seen[rank] = (mark, self._beat)
        return [
            rank
            for rank, (mark, beat) in self._seen.items()
            if not mark.ended and self._beat - beat >= GIVEN_UP_AFTER
        ]

    def explain(self, timeout_s: float) -> str:
        """In words, why an exchange failed: where, and which ranks did not take part."""
        place, exchanges = self.place, self._exchanges
        looked = self._look_twice()
        if looked is None:
            met = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            return (
                f"{place}: the other ranks no longer answer, nor does the place where they met ({met}), which rank 0 "
                "or its launcher holds: that process or its node is gone or hangs, or the network; the first error in "
                "the output of the other ranks says why"
            )
        first, second = looked
        silent = [rank for rank in second if _is_silent(first, second, rank)]
        ended = [rank for rank, mark in second.items() if mark is not None and mark.ended]
        behind = [
            rank
            for rank, mark in second.items()
            if mark is not None and rank not in (*silent, *ended) and mark.exchanges < exchanges
        ]
        remedy = "look there for the reason; the same command resumes from the last checkpoint"
        if silent:
            missing = f"{_name(silent, second)} ended or stopped"
        elif behind:
            missing = f"{_name(behind, second)} alive, and not there after comm.timeout_s={timeout_s:g}"
            remedy = "if this is no error, set a longer one"
        elif ended:
            missing = f"{_name(ended, second)} left after an error"
        else:
            missing = "all other ranks are alive, and the connection to one of them has failed"
            remedy = (
                "check the network and which interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); the same "
                "command resumes from the last checkpoint"
            )
        return f"{place}: {missing}; {remedy}"

    def _read(self, store: MarkStore) -> dict[int, Mark | None]:
        """The marks of the other ranks; None for one that has written none."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        return {
            rank: Mark.from_text(store.get(_key(rank))) if store.check([_key(rank)]) else None
            for rank in others
        }

    def _look_twice(self) -> tuple[dict[int, Mark | None], dict[int, Mark | None]] | None:
        """The others' marks at two times, between which the living have written new ones; None without the store.

        In a thread of its own: where the process that holds the store is stopped, a look never ends.
        """
        looks: list[dict[int, Mark | None]] = []

        def look() -> None:
            with contextlib.suppress(RuntimeError, OSError):
                store = self._connect()
                looks.append(self._read(store))
                time.sleep(SILENT_AFTER * self._period_s)
                looks.append(self._read(store))

        thread = threading.Thread(target=look, name="look at marks", daemon=True)
        thread.start()
        deadline_s = time.monotonic() + 4 * SILENT_AFTER * self._period_s
        while thread.is_alive() and time.monotonic() < deadline_s:
            thread.join(self._period_s)
            if threading.current_thread() is self._thread:
                self._try_to_write()  # others may look at this process meanwhile
        return (looks[0], looks[1]) if len(looks) == 2 else None

    def _try_to_write(self) -> None:
        try:
            self._write(ended=False)
        except (RuntimeError, OSError):
            self._store = None  # connect again next time

    def _write_marks(self) -> None:
        while not self._stopped.is_set():
            self._try_to_write()
            if self._each_beat is not None:
                self._each_beat()
            self._stopped.wait(self._period_s)

    def _write(self, *, ended: bool) -> None:
        if self._store is None:
            self._store = self._connect()
        self._beat += 1
        mark = Mark(self._beat, self._exchanges, self.place, ended)
        self._store.set(_key(self._rank), mark.to_text())


def _is_silent(first: dict[int, Mark | None], second: dict[int, Mark | None], rank: int) -> bool:
    before, after = first[rank], second[rank]
    if after is None:
        return True
    return not after.ended and before is not None and before.beat == after.beat


def _key(rank: int) -> str:
    return f"mark/{rank}"


def _name(ranks: Sequence[int], marks: dict[int, Mark | None]) -> str:
    """`rank 2 (in training, round 3)`; ranks in the same place together."""
    places: dict[str, list[int]] = {}
    for rank in ranks:
        mark = marks[rank]
        places.setdefault(f"last seen at: {mark.what}" if mark else "never seen", []).append(rank)
    return ", ".join(
        f"{'rank' if len(there) == 1 else 'ranks'} {', '.join(map(str, there[:SHOWN]))}"
        f"{', ...' if len(there) > SHOWN else ''} ({place})"
        for place, there in places.items()
    )
