"""What the user sees while a run goes on: a live display in a terminal, plain lines elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from fedsim.tracking.metrics import ROUND, Scalar

Clock = Callable[[], float]


@dataclass(frozen=True)
class Column:
    """A column of the table of rounds: its head, the key of the record that it shows, and how."""

    head: str
    key: str
    spec: str
    width: int


COLUMNS = (
    Column("test loss", "test/loss", ".4f", 11),
    Column("train loss", "train/loss", ".4f", 12),
    Column("fairness", "fairness/test_loss_variance", ".3g", 10),
    Column("tokens/s", "train/tokens_per_s", ",.0f", 10),
    Column("clients/s", "train/clients_per_s", ".2f", 11),
    Column("seconds", "time/round_s", ".1f", 8),
)


class Progress(Protocol):
    """Shows how a run goes on.

    Attributes:
        console: where log lines must go, so that they do not tear the display.
    """

    console: Console

    def start(self, run_name: str, first_round: int, num_rounds: int, cohort_size: int) -> None:
        """The rounds from `first_round` (counted from 0) up to `num_rounds` begin."""

    def phase(self, text: str) -> None:
        """What is being done now, in a word or two."""

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """This process has trained `done` of its `of` clients of the round, on `tokens` tokens so far."""

    def round_done(self, record: Mapping[str, Scalar]) -> None:
        """A round is over; `record` is what `metrics.jsonl` holds about it."""

    def note(self, text: str) -> None:
        """A line for the user."""

    def stop(self) -> None:
        """Leave the terminal as it was. May be called twice, and without a start."""


def build_progress(
    mode: Literal["auto", "live", "plain", "off"], stream: IO[str], clock: Clock = time.monotonic
) -> Progress:
    """The display that `mode` asks for.

    Args:
        mode: `auto` is `live` where the stream is a terminal that can move its cursor, and `plain` elsewhere;
            `live` insists, for terminals that do not look like one.
        stream: what it is written to, usually standard error.
        clock: seconds, for the time left.
    """
    if mode == "off":
        return NoProgress(stream)
    console = Console(file=stream)
    if mode == "plain" or (mode == "auto" and (not console.is_terminal or console.is_dumb_terminal)):
        return PlainProgress(stream, clock)
    return LiveProgress(stream, clock)


class NoProgress:
    """Shows nothing; log lines still have a console."""

    def __init__(self, stream: IO[str]) -> None:
        self.console = _plain_console(stream)

    def start(self, run_name: str, first_round: int, num_rounds: int, cohort_size: int) -> None:
        """Do nothing."""

    def phase(self, text: str) -> None:
        """Do nothing."""

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """Do nothing."""

    def round_done(self, record: Mapping[str, Scalar]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class PlainProgress:
    """One line per round, for log files."""

    def __init__(self, stream: IO[str], clock: Clock) -> None:
        self.console = _plain_console(stream)
        self._rounds = _Rounds(clock)

    def start(self, run_name: str, first_round: int, num_rounds: int, cohort_size: int) -> None:
        """Print what runs, and the heads of the columns."""
        self._rounds.start(first_round, num_rounds)
        self.note(_head(run_name, first_round, num_rounds, cohort_size))

    def phase(self, text: str) -> None:
        """Print it before the rounds; between them it would bury the table."""
        if not self._rounds.started:
            self.note(text)

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """Do nothing: a line for each client would bury the table."""

    def round_done(self, record: Mapping[str, Scalar]) -> None:
        """Print the line of the round."""
        self.note(self._rounds.line(record))

    def note(self, text: str) -> None:
        """Print it at once."""
        self.console.print(text, markup=False)
        self.console.file.flush()

    def stop(self) -> None:
        """Do nothing: each line is complete."""


class LiveProgress:
    """The table of rounds, and below it two bars: the rounds, and this process's clients of the round."""

    def __init__(self, stream: IO[str], clock: Clock) -> None:
        self.console = Console(file=stream, force_terminal=True, highlight=False)
        self._clock = clock
        self._rounds = _Rounds(clock)
        self._phase = ""
        self._phase_start_s = clock()
        self._bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,  # drawn by a thread of this process, which shares its cores with training
        )
        self._round_bar: TaskID = self._bars.add_task("rounds", detail="")
        self._client_bar: TaskID = self._bars.add_task("clients", visible=False, detail="")

    def start(self, run_name: str, first_round: int, num_rounds: int, cohort_size: int) -> None:
        """Print what runs and the heads of the columns, and open the display."""
        self._rounds.start(first_round, num_rounds)
        self.note(_head(run_name, first_round, num_rounds, cohort_size))
        self._phase_start_s = self._clock()
        self._bars.update(self._round_bar, completed=first_round, total=num_rounds, detail="")
        self._bars.start()

    def phase(self, text: str) -> None:
        """Show it beside the rounds; before the rounds, as a line."""
        if not self._rounds.started:
            self.note(text)
            return
        self._phase = text
        self._phase_start_s = self._clock()
        self._bars.update(self._client_bar, visible=False)
        self._bars.update(self._round_bar, detail=self._round_detail())

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """Move the bar of the clients; the rate is that since the phase or the round began."""
        seconds = self._clock() - self._phase_start_s
        detail = f"{tokens / seconds:,.0f} tokens/s" if seconds > 0 else ""
        self._bars.update(self._client_bar, completed=done, total=of, visible=True, detail=f"here · {detail}")
        self._bars.update(self._round_bar, detail=self._round_detail())

    def round_done(self, record: Mapping[str, Scalar]) -> None:
        """Add the line of the round to the table."""
        self.note(self._rounds.line(record))
        self._phase = ""
        self._phase_start_s = self._clock()
        self._bars.update(self._client_bar, visible=False)
        self._bars.update(self._round_bar, advance=1, detail=self._round_detail())

    def note(self, text: str) -> None:
        """Print it, above the bars if they are there."""
        self.console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the bars; the table stays."""
        self._bars.stop()

    def _round_detail(self) -> str:
        return f"{self._rounds.left()} left{self._phase and ' · '}{self._phase}"


class ProgressHandler(logging.Handler):
    """Writes log lines through a display, so that neither tears the other."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line above the bars, or where the plain lines go; without a display, to its console."""
        self._progress.console.print(self.format(record), markup=False, soft_wrap=True)


@contextmanager
def logs_through(progress: Progress) -> Iterator[None]:
    """Within the block, the lines that the root logger writes to a stream go through the display instead."""
    root = logging.getLogger()
    streams = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    through = ProgressHandler(progress)
    for handler in streams:
        through.setFormatter(handler.formatter)
        through.setLevel(handler.level)
        root.removeHandler(handler)
    if streams:
        root.addHandler(through)
    try:
        yield
    finally:
        root.removeHandler(through)
        for handler in streams:
            root.addHandler(handler)


class _Rounds:
    """Counts the rounds since this start, and the time they take."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._first_round = self._next_round = self._num_rounds = 0
        self._start_s = self._last_end_s = 0.0
        self.started = False

    def start(self, first_round: int, num_rounds: int) -> None:
        self._first_round = self._next_round = first_round
        self._num_rounds = num_rounds
        self._start_s = self._last_end_s = self._clock()
        self.started = True

    def line(self, record: Mapping[str, Scalar]) -> str:
        """The line of a round that is over."""
        round_index = record[ROUND]
        assert isinstance(round_index, int)
        self._next_round = round_index + 1
        self._last_end_s = self._clock()
        position = f"{self._next_round}/{self._num_rounds}"
        cells = "".join(_cell(record.get(column.key), column) for column in COLUMNS)
        return f"{position:>9}{cells}{self.left():>8}"

    def left(self) -> str:
        """Time for the rounds to come if they take as long as those done; `-` before the first is done."""
        done = self._next_round - self._first_round
        if done == 0:
            return "-"
        seconds_per_round = (self._last_end_s - self._start_s) / done
        end_s = self._last_end_s + seconds_per_round * (self._num_rounds - self._next_round)
        seconds = max(0.0, end_s - self._clock())
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _cell(value: Scalar, column: Column) -> str:
    """The value, right-aligned; `-` where a round has none, for example because it was not evaluated."""
    if not isinstance(value, int | float):
        return f"{'-':>{column.width}}"
    return f"{value:{column.width}{column.spec}}"


def _head(run_name: str, first_round: int, num_rounds: int, cohort_size: int) -> str:
    clients = "1 client" if cohort_size == 1 else f"{cohort_size} clients"
    columns = "".join(f"{column.head:>{column.width}}" for column in COLUMNS)
    if first_round >= num_rounds:
        return f"{run_name}: all {num_rounds} rounds are done"
    return (
        f"{run_name}: rounds {first_round + 1} to {num_rounds}, {clients} in each\n"
        f"{'round':>9}{columns}{'left':>8}"
    )


def _plain_console(stream: IO[str]) -> Console:
    return Console(file=stream, no_color=True, highlight=False, soft_wrap=True)
