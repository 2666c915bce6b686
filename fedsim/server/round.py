"""One synchronous round."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, final

from fedsim.aggregation.strategy import FactorStream, Strategy
from fedsim.comm.agree import all_or_none, consume_on_root
from fedsim.comm.exchange import broadcast_state, gather_reports, gather_stacks
from fedsim.comm.group import Group
from fedsim.comm.placement import place
from fedsim.data.build import FederatedData
from fedsim.evaluation.clients import ClientTest
from fedsim.evaluation.losses import LossEvaluator, LossSums, merge_batches
from fedsim.lora.factors import AdapterState
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport, ClientUpdate
from fedsim.server.cohort import CohortPolicy, LocalBudget, client_jobs, pooled_job, sample_cohort
from fedsim.training.packs import ClientJob, Pack, pack_cohort
from fedsim.training.settings import LocalSettings
from fedsim.training.trainer import Trainer


class Watch(Protocol):
    """Is told how a round goes on, on this process."""

    def phase(self, text: str) -> None:
        """What is being done now, in a word or two."""

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """This process has trained `done` of its `of` clients of the round, on `tokens` label tokens so far."""


@final
class NoWatch:
    """Nobody watches."""

    def phase(self, text: str) -> None:
        """Do nothing."""

    def clients_done(self, done: int, of: int, tokens: int) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Run:
    """Everything a round needs besides the server's state. The same on every rank but for the group's rank.

    Attributes:
        group: the processes.
        data: tokenized examples and their partition.
        strategy: the federated method.
        trainer: local training on this process.
        global_test: the global test set.
        client_test: the test of a client's adapter before and after local training.
        cohort: how cohorts are chosen.
        budget: how much a client trains in a round.
        local: how a client trains.
        num_packs: packs of a round.
        rounds: rounds of the whole run.
        evaluate_every: rounds between evaluations.
        seed: the run's seed.
        watch: is told how the round goes on.
    """

    group: Group
    data: FederatedData
    strategy: Strategy
    trainer: Trainer
    global_test: LossEvaluator
    client_test: ClientTest
    cohort: CohortPolicy
    budget: LocalBudget
    local: LocalSettings
    num_packs: int
    rounds: int
    evaluate_every: int
    seed: int
    watch: Watch = field(default_factory=NoWatch)

    def evaluates(self, round_index: int) -> bool:
        """Whether a round ends with an evaluation."""
        return (round_index + 1) % self.evaluate_every == 0 or round_index + 1 == self.rounds


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What is known about a finished round, on every rank.

    Attributes:
        round_index: from 0.
        clients: reports in client_id order.
        num_dropped: clients of the cohort whose update was left out because it was not finite.
        num_packs: packs of the round.
        global_test: loss sums of the global test set; None without an evaluation or without a global model.
        seconds: wall time by phase, on this rank.
        train_seconds_by_rank: time that each rank spent in local training.
    """

    round_index: int
    clients: tuple[ClientReport, ...]
    num_dropped: int
    num_packs: int
    global_test: LossSums | None
    seconds: dict[str, float]
    train_seconds_by_rank: tuple[float, ...]


def run_round(state: ServerState, run: Run) -> tuple[ServerState, RoundReport]:
    """One synchronous round. Every process returns the same state.

    Raises:
        PeerError: something failed on some rank.
    """
    began = time.perf_counter()
    round_index = state.round_index
    jobs = round_jobs(run, round_index)
    packs = pack_cohort(jobs, run.num_packs)  # whatever the world size
    mine = place([pack.cost_tokens for pack in packs], run.group.world_size)[run.group.rank]

    run.watch.phase("training")
    updates: list[ClientUpdate] = []
    with all_or_none(run.group, f"local training, round {round_index}"):
        updates = _train_packs(state, run, [packs[index] for index in mine])
        trained = time.perf_counter()

    run.watch.phase("aggregating")
    clients = gather_reports(run.group, updates)
    busy = tuple(run.group.gather_objects(trained - began))
    factors = _TimedStream(gather_stacks(run.group, updates))
    gathering = time.perf_counter()
    aggregated = consume_on_root(
        run.group,
        f"aggregation, round {round_index}",
        factors,
        lambda stream: run.strategy.aggregate(state, clients, stream),
    )
    next_state = broadcast_state(run.group, state, aggregated)
    aggregated_at = time.perf_counter()

    run.watch.phase("evaluating")
    global_test = None
    if run.evaluates(round_index) and run.strategy.has_global_model:
        global_test = measure_global(run, next_state.adapter, f"evaluation, round {round_index}")
    ended = time.perf_counter()
    seconds = {
        "train_s": trained - began,
        "wait_s": gathering - trained,
        "gather_s": factors.seconds,
        "aggregate_s": aggregated_at - gathering - factors.seconds,
        "evaluate_s": ended - aggregated_at,
        "round_s": ended - began,
    }
    return next_state, RoundReport(
        round_index, clients, len(jobs) - len(clients), len(packs), global_test, seconds, busy
    )


def round_jobs(run: Run, round_index: int) -> tuple[ClientJob, ...]:
    """What the clients of a round do; the same on every rank."""
    cohort = sample_cohort(run.cohort, run.seed, round_index)
    if run.strategy.trains_pool:
        return pooled_job(cohort, run.data, run.budget, run.local, round_index)
    return client_jobs(cohort, run.data, run.budget, run.local)


def measure_global(run: Run, adapter: AdapterState, what: str) -> LossSums:
    """Loss sums of the global test set, measured by all ranks together; equal bits for any number of them."""
    mine = range(run.group.rank, len(run.global_test.batches), run.group.world_size)
    measured: dict[int, LossSums] = {}
    with all_or_none(run.group, what):
        measured = run.global_test.measure(adapter, mine)
    everywhere = run.group.gather_objects(measured)
    return merge_batches({index: sums for part in everywhere for index, sums in part.items()})


def _train_packs(state: ServerState, run: Run, packs: list[Pack]) -> list[ClientUpdate]:
    """Train this rank's packs; test each client before and after where the round is evaluated."""
    updates: list[ClientUpdate] = []
    tested = run.evaluates(state.round_index)
    num_clients = sum(len(pack.jobs) for pack in packs)
    for pack in packs:
        starts = [run.strategy.download(state, job.client_id) for job in pack.jobs]
        trained = run.trainer.train(pack, starts, state.round_index)
        start_of = {job.client_id: start for job, start in zip(pack.jobs, starts, strict=True)}
        updates += _with_test_losses(run, start_of, trained) if tested and trained else trained
        run.watch.clients_done(
            len(updates), num_clients, sum(update.report.trained_tokens for update in updates)
        )
    return updates


def _with_test_losses(
    run: Run, start_of: Mapping[int, AdapterState], updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    client_ids = [update.report.client_id for update in updates]
    before = run.client_test.losses([start_of[client_id] for client_id in client_ids], client_ids)
    after = run.client_test.losses([update.adapter for update in updates], client_ids)
    return [
        replace(update, report=replace(update.report, test_loss_before=earlier, test_loss_after=later))
        for update, earlier, later in zip(updates, before, after, strict=True)
    ]


class _TimedStream(Iterator[tuple[str, tuple]]):  # type: ignore[type-arg]
    """A factor stream that adds up the time spent waiting for its items."""

    def __init__(self, stream: FactorStream) -> None:
        self._stream = stream
        self.seconds = 0.0

    def __next__(self) -> tuple[str, tuple]:  # type: ignore[type-arg]
        began = time.perf_counter()
        try:
            return next(self._stream)
        finally:
            self.seconds += time.perf_counter() - began
