"""The figures of an estimate, for people and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsim.estimate.devices import GIB
from fedsim.estimate.memory import Memory

MIB = 2**20
UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (0.0, "MFLOP"))
HOUR = 3600


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a round amounts to, mean over the rounds that were looked at.

    Attributes:
        num_rounds: rounds of the run.
        num_sampled: rounds that were looked at.
        clients: of a round.
        packs: of a round.
        tokens: that are trained, repetitions included.
        label_tokens: of them, those that are predicted.
        busiest_tokens: trained by the process with most.
        row_tokens: mean length of a packed row.
        train_flops: local training.
        test_flops: tests of a round that is evaluated.
        idle_share: of the processes' time in local training.
        occupancy: of the slots.
        gathered_bytes: of factors, or of sums of them, that each process sends.
        received_bytes: of these, that the process with most gets.
        broadcast_bytes: that each process gets from rank 0.
    """

    num_rounds: int
    num_sampled: int
    clients: float
    packs: float
    tokens: float
    label_tokens: float
    busiest_tokens: float
    row_tokens: float
    train_flops: float
    test_flops: float
    idle_share: float
    occupancy: float
    gathered_bytes: float
    received_bytes: float
    broadcast_bytes: float


@dataclass(frozen=True, slots=True)
class Slots:
    """How many clients train at once, and how many could.

    Attributes:
        planned: slots of the largest pack.
        rank_rows: of all of them.
        row_tokens: tokens of the largest packed row.
        max_tokens: limit of a row.
        fitting: slots that the memory would hold with rows as they are; None where the memory is not known.
        fitting_tokens: tokens of a row that it would hold with slots as they are; None likewise.
    """

    planned: int
    rank_rows: int
    row_tokens: int
    max_tokens: int
    fitting: int | None
    fitting_tokens: int | None


@dataclass(frozen=True, slots=True)
class Times:
    """Expected seconds.

    Attributes:
        measured: by a probe; else from a data sheet.
        rounds: of each round.
        train_s: local training with the clients' tests, mean.
        server_s: exchange and aggregation.
        test_s: global test of a round that has one, answers included.
        record_s: writing a round down.
        start_s: from the start of the program to the first round, the test before it included.
        loaded_cpu_s: of that, without the test, what a process computed, in seconds of a core; 0 without a probe.
        cpu_share: cores that the probe had to itself on average; 1 without a probe.
    """

    measured: bool
    rounds: tuple[float, ...]
    train_s: float
    server_s: float
    test_s: float
    record_s: float
    start_s: float
    loaded_cpu_s: float
    cpu_share: float

    @property
    def mean_s(self) -> float:
        """Mean of a round."""
        return math.fsum(self.rounds) / len(self.rounds)

    @property
    def p95_s(self) -> float:
        """What 95 % of the rounds stay below."""
        return sorted(self.rounds)[max(0, math.ceil(0.95 * len(self.rounds)) - 1)]

    @property
    def total_s(self) -> float:
        """The whole run."""
        return self.start_s + math.fsum(self.rounds) + len(self.rounds) * self.record_s

    @property
    def margin(self) -> float:
        """Factor on the total for what to ask of a scheduler: more where nothing was measured."""
        return 1.25 if self.measured else 2.0

    @property
    def ask_s(self) -> int:
        """Seconds to ask for."""
        return rounded_up(self.total_s * self.margin)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Everything that is known about a run before it starts.

    Attributes:
        device: where it runs, in words.
        world_size: number of processes.
        on_gpu: whether each has a GPU.
        memory: of the process that needs most.
        capacity: bytes that a process may use; None where not known.
        measured_bytes: peak of the probe; None without one.
        slots: clients at once.
        amounts: of a round.
        times: None where there is no rate to compute them with.
        advice: what to change.
    """

    device: str
    world_size: int
    on_gpu: bool
    memory: Memory
    capacity: int | None
    measured_bytes: int | None
    slots: Slots
    amounts: Amounts
    times: Times | None
    advice: tuple[str, ...]

    def lines(self) -> list[str]:
        """Aligned lines of text."""
        rows = [
            ("estimate", f"{self.world_size} process{'' if self.world_size == 1 else 'es'}, {self.device}"),
            ("memory", self._peak()),
            *(("", text) for text in self._parts()),
            ("slots", self._slots()),
            ("work", self._work()),
            ("balance", self._balance()),
            ("bytes", self._bytes()),
            ("time", self._time()),
        ]
        if self.times is not None:
            rows += [("", text) for text in self._phases(self.times)]
            rows.append(("ask for", self._ask(self.times)))
        rows += [("advice", text) for text in self.advice]
        return [f"{name:<10}{text}" for name, text in rows]

    def to_json(self) -> dict[str, object]:
        """The same figures, in bytes, seconds and operations."""
        memory = self.memory
        times = self.times
        return {
            "device": self.device,
            "world_size": self.world_size,
            "memory": {
                "resident": dict(memory.resident),
                "phases": {name: dict(phase.parts) for name, phase in memory.phases.items()},
                "peak_bytes": memory.peak_bytes,
                "peak_phase": memory.peak_phase,
                "capacity_bytes": self.capacity,
                "measured_bytes": self.measured_bytes,
            },
            "slots": _fields(self.slots),
            "round": _fields(self.amounts),
            "time": None
            if times is None
            else {
                "measured": times.measured,
                "round_mean_s": times.mean_s,
                "round_p95_s": times.p95_s,
                "train_s": times.train_s,
                "server_s": times.server_s,
                "test_s": times.test_s,
                "record_s": times.record_s,
                "start_s": times.start_s,
                "loaded_cpu_s": times.loaded_cpu_s,
                "cpu_share": times.cpu_share,
                "total_s": times.total_s,
                "process_hours": times.total_s * self.world_size / HOUR,
                "ask_s": times.ask_s,
            },
            "advice": list(self.advice),
        }

    def _peak(self) -> str:
        text = f"{size(self.memory.peak_bytes)} a process at most, in {self.memory.peak_phase}"
        if self.capacity is not None:
            text += f", of {size(self.capacity)}"
        if self.measured_bytes is not None:
            text += f"; the probe took {size(self.measured_bytes)}"
        return text

    def _parts(self) -> list[str]:
        peak = self.memory.phases[self.memory.peak_phase]
        parts = {**self.memory.resident, **peak.parts}
        return [f"{size(number):>10}  {name}" for name, number in parts.items() if number > 0]

    def _slots(self) -> str:
        slots = self.slots
        text = (
            f"{slots.planned} at once with {slots.rank_rows} rank rows, packed rows of up to "
            f"{slots.row_tokens:,} tokens (limit {slots.max_tokens:,})"
        )
        if slots.fitting is None or slots.fitting_tokens is None:
            return text
        return f"{text}; memory holds {slots.fitting:,} slots, or rows of {slots.fitting_tokens:,} tokens"

    def _work(self) -> str:
        a = self.amounts
        return (
            f"{a.tokens:,.0f} tokens trained a round, {a.label_tokens:,.0f} of them predicted; "
            f"{operations(a.train_flops)} to train, {operations(a.test_flops)} to test ({_of_rounds(a)})"
        )

    def _balance(self) -> str:
        a = self.amounts
        return (
            f"{a.clients:g} clients in {a.packs:g} packs, {a.busiest_tokens:,.0f} tokens on the busiest process, "
            f"{a.idle_share:.1%} of the processes' time idle, slots {a.occupancy:.0%} full, "
            f"{a.row_tokens:,.0f} tokens a packed row"
        )

    def _bytes(self) -> str:
        a = self.amounts
        if self.world_size == 1:
            return "nothing is exchanged by one process"
        return (
            f"{a.gathered_bytes:,.0f} sent by each process and {a.received_bytes:,.0f} received by the one that gets "
            f"most in the gather of a round, {a.broadcast_bytes:,.0f} in the broadcast"
        )

    def _time(self) -> str:
        if self.times is None:
            return (
                "not known without a rate; add --probe to measure one here, or --gpu NAME for a data sheet's"
            )
        times = self.times
        how = "measured rates" if times.measured else "a data sheet's rates, not measured: add --probe"
        hours = times.total_s * self.world_size / HOUR
        return (
            f"{times.mean_s:.3g} s a round (95 % below {times.p95_s:.3g} s), {clock(times.total_s)} in all, "
            f"{hours:.3g} {'GPU' if self.on_gpu else 'process'}-hours; from {how}"
        )

    def _phases(self, times: Times) -> list[str]:
        parts = {
            "training and clients' tests": times.train_s,
            "exchange and aggregation": times.server_s,
            "global test": times.test_s,
            "record": times.record_s,
            "start-up, once": times.start_s,
        }
        return [f"{seconds:>10.3g}  s {name}" for name, seconds in parts.items()]

    def _ask(self, times: Times) -> str:
        return f"--time={slurm_time(times.ask_s)} (total, times {times.margin:g}, rounded up)"


def size(num_bytes: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.1f} MiB"


def operations(flops: float) -> str:
    """Floating-point operations with a unit."""
    for unit, name in UNITS:
        if flops >= unit:
            return f"{flops / (unit or 1e6):.3g} {name}"
    raise AssertionError("the last unit takes everything")


def clock(seconds: float) -> str:
    """Such as 45 s, 12 min or 7.5 h."""
    if seconds < 2 * 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.1f} h"


def rounded_up(seconds: float) -> int:
    """To 5 minutes below an hour, 15 minutes below four hours, half an hour below a day, else hours."""
    for limit, step in ((HOUR, 300), (4 * HOUR, 900), (24 * HOUR, 1800)):
        if seconds <= limit:
            return max(1, math.ceil(seconds / step)) * step
    return math.ceil(seconds / HOUR) * HOUR


def slurm_time(seconds: int) -> str:
    """HH:MM:SS, or D-HH:MM:SS from a day on, as sbatch takes it."""
    days, rest = divmod(seconds, 24 * HOUR)
    text = f"{rest // HOUR:02d}:{rest % HOUR // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def _of_rounds(amounts: Amounts) -> str:
    if amounts.num_sampled == amounts.num_rounds:
        return f"mean of {amounts.num_rounds} rounds"
    return f"mean of {amounts.num_sampled} of {amounts.num_rounds} rounds"


def _fields(value: Slots | Amounts) -> Mapping[str, object]:
    names: Sequence[str] = value.__slots__
    return {name: getattr(value, name) for name in names}
