"""What every process computes in a round: the clients, packs, rows of tokens and tests of the run itself, counted.

Cohorts, packs, placement and the order of examples follow from the configuration, so nothing here is a guess.

Letters: T = tokens of a packed row, L = tokens of one sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.aggregation.strategy import Strategy
from fedsim.comm.placement import place
from fedsim.data.build import FederatedData
from fedsim.data.tokens import TokenStore
from fedsim.evaluation.clients import ClientTest
from fedsim.evaluation.losses import LossEvaluator
from fedsim.lora.factors import AdapterState
from fedsim.server.cohort import CohortPolicy, LocalBudget
from fedsim.server.selection import round_jobs
from fedsim.server.tiers import Tiers
from fedsim.server.turnout import Participation
from fedsim.training.packs import ClientJob, Pack, pack_cohort
from fedsim.training.settings import LocalSettings
from fedsim.training.slots import plan_slots_within

Ints = NDArray[np.int64]

MOST_ROUNDS = 24
"""Rounds that are looked at; of more, so many at even distances."""


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one kind; amounts add up.

    Attributes:
        passes: rows of tokens that go through the base.
        steps: optimizer steps of a process, of all clients in slots at once.
        tokens: of these rows.
        label_tokens: of them, those that need the output head.
        squares: sum of L^2 over sequences.
        rank_tokens: sum over tokens of the rank rows that each is multiplied with.
        most_tokens: of the largest row.
    """

    passes: int = 0
    steps: int = 0
    tokens: int = 0
    label_tokens: int = 0
    squares: int = 0
    rank_tokens: int = 0
    most_tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        """The sum, but for `most_tokens`."""
        return Work(
            self.passes + other.passes,
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.label_tokens + other.label_tokens,
            self.squares + other.squares,
            self.rank_tokens + other.rank_tokens,
            max(self.most_tokens, other.most_tokens),
        )


def total(parts: Sequence[Work]) -> Work:
    """The sum of any number of parts."""
    return sum(parts, Work())


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a packed row and its rank rows.

    Attributes:
        max_slots: clients that train at the same time.
        max_tokens: of a row.
        max_rows: rank rows of all slots together.
        dense_rows: rank rows up to which neighbouring clients share one dense product.
        padded: clients train one after another, in padded batches with logits at every token.
    """

    max_slots: int
    max_tokens: int
    max_rows: int
    dense_rows: int
    padded: bool = False


@dataclass(frozen=True, slots=True)
class PackWork:
    """A pack's training.

    Attributes:
        clients: client ids.
        cost_tokens: by which packs are placed.
        work: of all its clients.
        num_slots: clients that train at the same time.
        rank_rows: of all slots.
        occupancy: share of slot-steps in which a client trains.
    """

    clients: tuple[int, ...]
    cost_tokens: int
    work: Work
    num_slots: int
    rank_rows: int
    occupancy: float


@dataclass(frozen=True, slots=True)
class RankLoad:
    """One process in a round.

    Attributes:
        clients: client ids that it trains.
        num_packs: packs that they are in.
        train: local training.
        client_tests: tests of these clients before and after.
        global_test: its share of the global test.
    """

    clients: tuple[int, ...]
    num_packs: int
    train: Work
    client_tests: Work
    global_test: Work


@dataclass(frozen=True, slots=True)
class RoundLoad:
    """A round.

    Attributes:
        round_index: from 0.
        packs: in the order of their indices.
        ranks: work of each process, tests as if the round were evaluated.
    """

    round_index: int
    packs: tuple[PackWork, ...]
    ranks: tuple[RankLoad, ...]

    @property
    def idle_share(self) -> float:
        """Share of the processes' time in local training that they wait for the slowest, by tokens."""
        loads = [rank.train.tokens for rank in self.ranks]
        return 1.0 - sum(loads) / (len(loads) * max(loads)) if max(loads) else 0.0


@dataclass(frozen=True)
class Workload:
    """The run's decisions about who trains on what.

    Attributes:
        data: examples and partition.
        strategy: the federated method.
        tiers: LoRA ranks of each client.
        cohort: how cohorts are chosen.
        budget: how much a client trains.
        local: how it trains.
        seed: the run's seed.
        num_packs: packs of a round.
        rounds: of the run.
        evaluate_every: rounds between tests.
        limits: of packed rows.
        global_test: the global test, on `counter`.
        client_test: the clients' tests, on `counter`.
        counter: the scorer of both tests.
        shares_start: clients of a tier start from one adapter.
        participation: who can be drawn; drawn clients count as if all of them reported back.
        lr_phases: as in `Run`; without effect here.
    """

    data: FederatedData
    strategy: Strategy
    tiers: Tiers
    cohort: CohortPolicy
    budget: LocalBudget
    local: LocalSettings
    seed: int
    num_packs: int
    rounds: int
    evaluate_every: int
    limits: Limits
    global_test: LossEvaluator
    client_test: ClientTest
    counter: "CountingScorer"
    shares_start: bool
    participation: Participation | None = None
    lr_phases: tuple[tuple[int, float], ...] = ()

    def packs(self, round_index: int) -> tuple[Pack, ...]:
        """The packs of a round."""
        return pack_cohort(round_jobs(self, round_index), self.num_packs)

    def evaluates(self, round_index: int) -> bool:
        """As `Run.evaluates`."""
        return (round_index + 1) % self.evaluate_every == 0 or round_index + 1 == self.rounds

    def lora_rank(self, client_id: int, round_index: int) -> int:
        """Largest LoRA rank of a client's modules."""
        return max(self.tiers.lora_ranks(client_id, round_index).values())

    def round_work(self, round_index: int, world_size: int) -> RoundLoad:
        """What `world_size` processes do in a round."""
        packs = self.packs(round_index)
        trained = [self.pack_work(pack, round_index) for pack in packs]
        placed = place([pack.cost_tokens for pack in packs], world_size)
        shares = [self._global_share(rank, world_size) for rank in range(world_size)]
        return RoundLoad(
            round_index,
            tuple(trained),
            tuple(
                RankLoad(
                    tuple(client for index in mine for client in trained[index].clients),
                    len(mine),
                    total([trained[index].work for index in mine]),
                    self._client_tests([packs[index] for index in mine], round_index),
                    share,
                )
                for mine, share in zip(placed, shares, strict=True)
            ),
        )

    def pack_work(self, pack: Pack, round_index: int) -> PackWork:
        """The training of a pack, row by row as `PackedTrainer` cuts them."""
        ranks = [self.lora_rank(job.client_id, round_index) for job in pack.jobs]
        schedules = [_step_sizes(job, self.data.train, round_index) for job in pack.jobs]
        ids = tuple(job.client_id for job in pack.jobs)
        if self.limits.padded:
            work = total([_padded_work(steps) for steps in schedules])
            return PackWork(ids, pack.cost_tokens, work, 1, max(ranks), 1.0)
        slots, capacities = plan_slots_within(
            [len(steps) for steps in schedules], ranks, self.limits.max_slots, self.limits.max_rows
        )
        waiting = [list(queue) for queue in slots.queues]
        active: dict[int, tuple[int, int]] = {}  # slot -> client, its next step
        work = Work()
        for _ in range(slots.num_steps):
            for slot, queue in enumerate(waiting):
                if slot not in active and queue:
                    active[slot] = (queue.pop(0), 0)
            now = [(slot, *active[slot]) for slot in sorted(active)]
            work += self._step_work(
                [(capacities[slot], schedules[client][step]) for slot, client, step in now]
            )
            for slot, client, step in now:
                if step + 1 < len(schedules[client]):
                    active[slot] = (client, step + 1)
                else:
                    del active[slot]
        return PackWork(ids, pack.cost_tokens, work, len(slots.queues), sum(capacities), slots.occupancy)

    def _step_work(self, parts: Sequence[tuple[int, Ints]]) -> Work:
        """One optimizer step of all slots: (rank rows of the slot, sizes of its client's micro-batches)."""
        rows: list[dict[int, Ints]] = [{}]  # part -> its sizes, for each packed row
        tokens = 0
        for part, (_, micro_batches) in enumerate(parts):
            for sizes in micro_batches:
                if rows[-1] and tokens + int(sizes[0]) > self.limits.max_tokens:
                    rows.append({})
                    tokens = 0
                tokens += int(sizes[0])
                rows[-1][part] = rows[-1].get(part, 0) + sizes
        work = Work(steps=1)
        for row in rows:
            together = np.sum(list(row.values()), axis=0)
            held = sum(parts[part][0] for part in row)
            own = sum(parts[part][0] * int(sizes[0]) for part, sizes in row.items())
            dense = held * int(together[0])
            limit = self.limits.dense_rows * int(together[0])
            work += Work(
                passes=1,
                tokens=int(together[0]),
                label_tokens=int(together[1]),
                squares=int(together[2]),
                rank_tokens=dense if dense <= limit else max(own, min(dense, limit)),
                most_tokens=int(together[0]),
            )
        return work

    def _client_tests(self, packs: Sequence[Pack], round_index: int) -> Work:
        """The tests of a process's clients, by the tests' own rules on who is measured together and once."""
        received: dict[int, AdapterState] = {}
        self.counter.start()
        for pack in packs:
            ids = [job.client_id for job in pack.jobs]
            if self.shares_start:
                tiers = [id(self.tiers.lora_ranks(client, round_index)) for client in ids]
                starts = [received.setdefault(tier, AdapterState({})) for tier in tiers]
            else:
                starts = [AdapterState({}) for _ in ids]
            ranks = [self.lora_rank(client, round_index) for client in ids]
            self.counter.ranks = {}
            for adapters in (starts, [AdapterState({}) for _ in ids]):
                self.counter.ranks |= dict(zip(map(id, adapters), ranks, strict=True))
                self.client_test.losses(adapters, ids)
        return self.counter.work

    def _global_share(self, rank: int, world_size: int) -> Work:
        if not self.strategy.traits.has_global_model:
            return Work()
        self.counter.start()
        adapter = AdapterState({})
        self.counter.ranks = {id(adapter): max(self.tiers.max_ranks.values())}
        self.global_test.measure(adapter, range(rank, len(self.global_test.batches), world_size))
        return self.counter.work


class CountingScorer:
    """A scorer that counts what it is asked to measure, and measures nothing.

    Attributes:
        work: since `start`.
        ranks: LoRA rank of the adapters, by id.
        most_ranks: rank rows of the adapters that were measured together, at most, ever.
        most_rank: rank rows of one adapter that was measured alone, at most, ever.
    """

    def __init__(self, padded: bool = False) -> None:
        self.padded = padded
        self.work = Work()
        self.ranks: Mapping[int, int] = {}
        self.most_ranks = 0
        self.most_rank = 0

    def start(self) -> None:
        """Count from 0."""
        self.work = Work()

    def losses(
        self, adapters: Sequence[AdapterState], store: TokenStore, parts: Sequence[Ints]
    ) -> list[NDArray[np.float64]]:
        """Zeros; see `Scorer`."""
        ranks = [self.ranks.get(id(adapter), 1) for adapter in adapters]
        if len(ranks) == 1:
            self.most_rank = max(self.most_rank, *ranks)
        if self.padded:
            self.work += total([_padded(store.num_tokens[part]) for part in parts])
            self.most_ranks = max(self.most_ranks, *ranks)
        else:
            self.most_ranks = max(self.most_ranks, sum(ranks))
            together = np.sum([_sizes(store, part) for part in parts], axis=0)
            self.work += Work(
                1,
                0,
                int(together[0]),
                int(together[1]),
                int(together[2]),
                sum(ranks) * int(together[0]),
                int(together[0]),
            )
        return [np.zeros(len(part)) for part in parts]


def sampled_rounds(rounds: int) -> list[int]:
    """The rounds that are looked at: all, or `MOST_ROUNDS` at even distances, the first and the last among them."""
    if rounds <= MOST_ROUNDS:
        return list(range(rounds))
    return sorted({round(index * (rounds - 1) / (MOST_ROUNDS - 1)) for index in range(MOST_ROUNDS)})


def _step_sizes(job: ClientJob, store: TokenStore, round_index: int) -> list[Ints]:
    """For each optimizer step, (micro-batches, 5) as `_sizes`."""
    steps = job.batches(round_index)
    micro_batches = [examples for step in steps for examples in step]
    starts = np.cumsum([0, *(len(examples) for examples in micro_batches[:-1])])
    examples = np.concatenate(micro_batches)
    lengths = store.num_tokens[examples]
    by_example = np.stack(
        (lengths, store.num_label_tokens[examples], lengths * lengths, np.ones_like(lengths))
    )
    sums = np.add.reduceat(by_example, starts, axis=1)
    longest = np.maximum.reduceat(lengths, starts)
    ends = np.cumsum([len(step) for step in steps])[:-1]
    return np.split(np.vstack((sums, longest)).T, ends)


def _sizes(store: TokenStore, examples: Ints) -> Ints:
    """(5,) tokens, label tokens, sum of L^2, sequences, longest of some examples."""
    lengths = store.num_tokens[examples]
    labels = store.num_label_tokens[examples]
    return np.array(
        (lengths.sum(), labels.sum(), (lengths * lengths).sum(), len(examples), lengths.max()), dtype=np.int64
    )


def _padded(lengths: Ints) -> Work:
    """A padded batch of sequences."""
    tokens = len(lengths) * int(lengths.max())
    return Work(1, 0, tokens, tokens, tokens * int(lengths.max()), tokens, tokens)


def _padded_work(steps: Sequence[Ints]) -> Work:
    """A client that trains by itself: each micro-batch padded to its longest sequence, logits everywhere."""
    work = Work(steps=len(steps))
    for _, _, _, sequences, longest in np.concatenate(steps).tolist():
        tokens = sequences * longest
        work += Work(1, 0, tokens, tokens, tokens * longest, tokens, tokens)
    return work
