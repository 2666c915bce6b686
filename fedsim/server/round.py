"""One synchronous round."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, final

from fedsim.aggregation.privacy import PrivacyAccountant
from fedsim.aggregation.spectrum import spectra_with_energy
from fedsim.aggregation.strategy import Aggregated, Strategy
from fedsim.comm.agree import all_or_none
from fedsim.comm.exchange import gather_reports
from fedsim.comm.group import Group
from fedsim.comm.placement import place
from fedsim.data.build import FederatedData
from fedsim.evaluation.clients import ClientTest
from fedsim.evaluation.losses import LossEvaluator, LossSums, merge_batches
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import Client, ClientPlan
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport, ClientUpdate
from fedsim.models.base_update import UpdatableBase
from fedsim.models.passes import FreePasses, Passes
from fedsim.server.aggregation import Aggregator
from fedsim.server.answers import AnswerEvaluation
from fedsim.server.client_store import ClientStore
from fedsim.server.cohort import CohortPolicy, LocalBudget, client_jobs, pooled_job, sample_cohort
from fedsim.server.early_stopping import StoppingRule, stopping_figures
from fedsim.server.pack_costs import PackCosts
from fedsim.server.screening import Corruption, Screening
from fedsim.server.tiers import Tiers
from fedsim.server.turnout import Participation, Turnout
from fedsim.server.validation import Validation
from fedsim.training.memory import peak_memory_bytes
from fedsim.training.packs import ClientJob, Pack, pack_cohort
from fedsim.training.settings import LocalSettings, at_round
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


class RoundInputs(Protocol):
    """What decides who trains on what in each round; a `Run` is one."""

    @property
    def data(self) -> FederatedData: ...  # noqa: D102

    @property
    def strategy(self) -> Strategy: ...  # noqa: D102

    @property
    def cohort(self) -> CohortPolicy: ...  # noqa: D102

    @property
    def budget(self) -> LocalBudget: ...  # noqa: D102

    @property
    def local(self) -> LocalSettings: ...  # noqa: D102

    @property
    def lr_phases(self) -> tuple[tuple[int, float], ...]: ...  # noqa: D102

    @property
    def participation(self) -> Participation | None: ...  # noqa: D102

    @property
    def seed(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Run:
    """Everything a round needs besides the server's state. The same on every rank but for the group's rank.

    Attributes:
        group: the processes.
        data: tokenized examples and their partition.
        strategy: the federated method.
        aggregator: where its mathematics runs.
        tiers: LoRA ranks of each client.
        store: what belongs to single clients.
        base: weights that follow the server's updates of the base.
        trainer: local training on this process.
        global_test: the global test set.
        client_test: the test of a client's adapter before and after local training.
        cohort: how cohorts are chosen.
        budget: how much a client trains in a round.
        local: how a client trains.
        lr_phases: first round and factor on the learning rate of `local` from then on, ascending.
        num_packs: packs of a round.
        rounds: rounds of the whole run.
        evaluate_every: rounds between evaluations.
        seed: the run's seed.
        privacy: what differential privacy has been spent; None without it.
        answers: the test of the global model's answers; None without it.
        participation: how reliable clients are, on a simulated clock; None if all report back.
        screening: which updates the server takes; None for all finite ones, which the trainer sees to.
        corruption: updates that arrive broken; None for none.
        stopping: when to stop before the last round; None for never.
        validation: the test of the global model before a round on its clients' own examples; None without it.
        most_waiting_bytes: of trained adapters that wait on the device for the end of the round; the rest leave it.
        watch: is told how the round goes on.
        costs: what packs have cost so far.
        passes: through which the base is used.
    """

    group: Group
    data: FederatedData
    strategy: Strategy
    aggregator: Aggregator
    tiers: Tiers
    store: ClientStore
    base: UpdatableBase
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
    lr_phases: tuple[tuple[int, float], ...] = ()
    privacy: PrivacyAccountant | None = None
    answers: AnswerEvaluation | None = None
    participation: Participation | None = None
    screening: Screening | None = None
    corruption: Corruption | None = None
    stopping: StoppingRule | None = None
    validation: Validation | None = None
    most_waiting_bytes: float = math.inf
    watch: Watch = field(default_factory=NoWatch)
    costs: PackCosts = field(default_factory=PackCosts)
    passes: Passes = field(default_factory=FreePasses)

    def evaluates(self, round_index: int) -> bool:
        """Whether a round ends with an evaluation."""
        return self.evaluates_regularly(round_index) or round_index + 1 == self.rounds

    def evaluates_regularly(self, round_index: int) -> bool:
        """Whether it would, if it were not the last round: only that may decide anything, as a run may be extended."""
        return (round_index + 1) % self.evaluate_every == 0

    def is_over(self, state: ServerState) -> bool:
        """Whether no round is left to be run."""
        stops = self.stopping is not None and self.stopping.stops(state.best)
        return stops or state.round_index >= self.rounds

    def local_in(self, round_index: int) -> LocalSettings:
        """How a client trains in a round."""
        return at_round(self.local, self.lr_phases, round_index)

    def client(self, client_id: int, state: ServerState) -> Client:
        """A client with what was kept for it, on the group's device.

        Raises:
            CheckpointError: its file is damaged.
        """
        kept = self.store.load(client_id, state.client_versions)
        on_device = {name: tensor.to(self.group.device) for name, tensor in kept.items()}
        return Client(client_id, self.tiers.lora_ranks(client_id, state.round_index), on_device)


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What is known about a finished round, on every rank.

    Attributes:
        round_index: from 0.
        clients: reports in client_id order.
        num_dropped: clients of the cohort whose update was left out because it was not finite, or too large.
        num_packs: packs of the round.
        global_test: loss sums of the global test set; None without an evaluation or without a global model.
        seconds: wall time by phase, on this rank.
        train_seconds_by_rank: time that each rank spent in local training.
        figures: what the strategy and the privacy accountant say about the round, and its learning rate, by metric.
        spectra: module -> singular values of the average update, and module/energy -> its squared norm, where the
            strategy knows them.
        turnout: clients that did not report back, and simulated times; None if all report back.
        num_clipped: clients whose update was scaled down.
        num_corrupted: clients whose update arrived broken.
        unused_downlink_bytes: what clients received of whom the server took nothing.
        unused_uplink_bytes: what these clients sent.
        simulated_s: simulated seconds of all rounds so far; None without a clock.
        peak_memory_bytes: most that any process has held from its start to the end of this round's training.
    """

    round_index: int
    clients: tuple[ClientReport, ...]
    num_dropped: int
    num_packs: int
    global_test: LossSums | None
    seconds: dict[str, float]
    train_seconds_by_rank: tuple[float, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    spectra: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    turnout: Turnout | None = None
    num_clipped: int = 0
    num_corrupted: int = 0
    unused_downlink_bytes: int = 0
    unused_uplink_bytes: int = 0
    simulated_s: float | None = None
    peak_memory_bytes: int = 0


def run_round(state: ServerState, run: Run) -> tuple[ServerState, RoundReport]:
    """One synchronous round. Every process returns the same state.

    Raises:
        PeerError: something failed on some rank.
    """
    began = time.perf_counter()
    round_index = state.round_index
    jobs, turnout = who_reports(run, state, round_jobs(run, round_index))
    packs = pack_cohort(jobs, run.num_packs)  # whatever the world size
    mine = _placed(run, packs, round_index)

    validated: dict[str, float] = {}
    if run.validation is not None and run.evaluates(round_index):
        run.watch.phase("validating")
        cohort = drawn_cohort(run, round_index) if turnout is None else turnout.reporting
        what = f"validation, round {round_index}"
        validated = run.validation.measure(run.group, run.strategy.export(state), cohort, what)
    started = time.perf_counter()

    run.watch.phase("training")
    trained = _Trained()
    with all_or_none(run.group, f"local training, round {round_index}"):
        trained = _train_packs(state, run, [packs[index] for index in mine])
        trained_at = time.perf_counter()

    run.watch.phase("aggregating")
    clients = _with_clock(gather_reports(run.group, trained.reports), turnout)
    run.costs.learn(packs, clients)
    held = peak_memory_bytes(run.group.device)
    told = run.group.gather_objects((trained_at - started, held, trained.figures()))
    gathering = time.perf_counter()
    aggregated, gather_s = run.aggregator.aggregate(run.group, run.strategy, state, clients, trained.sent)
    next_state = _with_versions(run, state, aggregated.state, [figures.wrote_state for *_, figures in told])
    if turnout is not None and turnout.round_s is not None:
        next_state = replace(next_state, simulated_s=state.simulated_s + turnout.round_s)
    aggregated_at = time.perf_counter()

    run.watch.phase("evaluating")
    global_test = None
    answers: dict[str, float] = {}
    if next_state.base_update is not None:
        with all_or_none(run.group, f"updating the base, round {round_index}"):
            run.base.apply(next_state.base_update)
    if run.evaluates(round_index) and run.strategy.traits.has_global_model:
        global_test = measure_global(run, next_state, f"evaluation, round {round_index}")
        if run.answers is not None:
            what = f"scoring answers, round {round_index}"
            answers = run.answers.measure(run.group, run.strategy.export(next_state), what)
    figures = _figures(run, round_index, aggregated) | answers | validated
    if run.stopping is not None:
        if run.evaluates_regularly(round_index):
            known = figures if global_test is None else {**figures, "test/loss": global_test.mean}
            next_state = replace(next_state, best=run.stopping.updated(state.best, known, round_index))
        figures |= stopping_figures(next_state.best)
    unused = [figures_of_rank for *_, figures_of_rank in told] + ([] if turnout is None else [turnout])
    ended = time.perf_counter()
    return next_state, RoundReport(
        round_index=round_index,
        clients=clients,
        num_dropped=len(jobs) - len(clients),
        num_packs=len(packs),
        global_test=global_test,
        seconds={
            "train_s": trained_at - started,
            "wait_s": gathering - trained_at,
            "gather_s": gather_s,
            "aggregate_s": aggregated_at - gathering - gather_s,
            "evaluate_s": ended - aggregated_at + started - began,
            "round_s": ended - began,
        },
        train_seconds_by_rank=tuple(seconds for seconds, *_ in told),
        figures=figures,
        spectra=spectra_with_energy(aggregated.spectra, aggregated.by_module),
        turnout=turnout,
        num_clipped=sum(figures.num_clipped for *_, figures in told),
        num_corrupted=sum(figures.num_corrupted for *_, figures in told),
        unused_downlink_bytes=sum(each.unused_downlink_bytes for each in unused),
        unused_uplink_bytes=sum(each.unused_uplink_bytes for each in unused),
        simulated_s=None if turnout is None or turnout.round_s is None else next_state.simulated_s,
        peak_memory_bytes=max(most for _, most, _ in told),
    )


def _placed(run: Run, packs: Sequence[Pack], round_index: int) -> tuple[int, ...]:
    """The packs that this rank trains, by what rank 0 expects of them: arithmetic may differ between nodes."""
    if run.group.world_size == 1:
        return tuple(range(len(packs)))
    ranks = {
        job.client_id: max(run.tiers.lora_ranks(job.client_id, round_index).values())
        for pack in packs
        for job in pack.jobs
    }
    costs = run.group.broadcast_object(run.costs.expected(packs, ranks))
    return place(costs, run.group.world_size)[run.group.rank]


def drawn_cohort(run: RoundInputs, round_index: int) -> tuple[int, ...]:
    """The clients drawn for a round, ascending, among those that can be; the same on every rank."""
    if run.participation is None:
        return sample_cohort(run.cohort, run.seed, round_index)
    available = run.participation.available(run.cohort.num_clients, run.seed, round_index)
    size = math.ceil(run.cohort.size * run.participation.over_selection - 1e-9)
    return sample_cohort(replace(run.cohort, size=size), run.seed, round_index, available)


def round_jobs(run: RoundInputs, round_index: int) -> tuple[ClientJob, ...]:
    """What the clients drawn for a round do; the same on every rank."""
    cohort = drawn_cohort(run, round_index)
    local = at_round(run.local, run.lr_phases, round_index)
    if run.strategy.traits.trains_pool:
        return pooled_job(cohort, run.data, run.budget, local, round_index)
    return client_jobs(cohort, run.data, run.budget, local)


def who_reports(
    run: Run, state: ServerState, jobs: Sequence[ClientJob]
) -> tuple[tuple[ClientJob, ...], Turnout | None]:
    """The jobs of the clients that report back, and how the others were lost; the same on every rank.

    A client receives and sends what its plan says, at the LoRA ranks with which it starts.
    """
    participation = run.participation
    if participation is None:
        return tuple(jobs), None
    round_index = state.round_index
    traffic = _traffic(run, state, jobs)
    seconds = participation.client_seconds(jobs, traffic, run.seed, round_index)
    drawn = [job.client_id for job in jobs]
    wanted = run.cohort.size if participation.over_selection > 1 else len(jobs)
    turnout = participation.turnout(drawn, wanted, seconds, run.seed, round_index, run.cohort.num_clients)
    reporting = set(turnout.reporting)
    silent = [client_id for client_id in drawn if client_id not in reporting]
    turnout = replace(
        turnout,
        unused_downlink_bytes=sum(traffic[client_id][0] for client_id in silent),
        unused_uplink_bytes=sum(
            traffic[client_id][1] for client_id in silent if client_id not in turnout.lost
        ),
    )
    return tuple(job for job in jobs if job.client_id in reporting), turnout


def _traffic(run: Run, state: ServerState, jobs: Sequence[ClientJob]) -> dict[int, tuple[int, int]]:
    """Client -> bytes that it receives and sends; clients of a tier differ only where the strategy keeps something."""
    sides = run.strategy.sends(state)
    received: dict[int, AdapterState] = {}
    by_tier: dict[int, tuple[int, int]] = {}
    traffic = {}
    for job in jobs:
        lora_ranks = run.tiers.lora_ranks(job.client_id, state.round_index)
        tier = id(lora_ranks)
        if tier not in received:
            received[tier] = run.strategy.download(state, lora_ranks)
        if tier not in by_tier or run.strategy.traits.keeps_client_state:
            plan = run.strategy.plan(state, run.client(job.client_id, state), received[tier])
            by_tier[tier] = (plan.received_bytes, plan.sent_bytes(sides))
        traffic[job.client_id] = by_tier[tier]
    return traffic


def _with_clock(reports: Sequence[ClientReport], turnout: Turnout | None) -> tuple[ClientReport, ...]:
    """The reports with what the simulated clock says about them."""
    if turnout is None:
        return tuple(reports)
    return tuple(replace(report, simulated_s=turnout.seconds.get(report.client_id)) for report in reports)


def measure_global(run: Run, state: ServerState, what: str) -> LossSums:
    """Loss sums of the global test set, measured by all ranks together; equal bits for any number of them."""
    mine = range(run.group.rank, len(run.global_test.batches), run.group.world_size)
    measured: dict[int, LossSums] = {}
    with all_or_none(run.group, what), run.passes.phase():
        measured = run.global_test.measure(run.strategy.export(state), mine)
    everywhere = run.group.gather_objects(measured)
    return merge_batches({index: sums for part in everywhere for index, sums in part.items()})


@dataclass(frozen=True, slots=True)
class _Figures:
    """What the other ranks must know about this rank's clients besides their reports."""

    wrote_state: tuple[int, ...]
    num_clipped: int
    num_corrupted: int
    unused_downlink_bytes: int
    unused_uplink_bytes: int


@dataclass(slots=True)
class _Trained:
    """What this rank did in local training: what its clients send, and what happened to it on the way."""

    reports: list[ClientReport] = field(default_factory=list)
    sent: dict[int, AdapterState] = field(default_factory=dict)
    wrote_state: list[int] = field(default_factory=list)
    num_clipped: int = 0
    num_corrupted: int = 0
    unused_downlink_bytes: int = 0
    unused_uplink_bytes: int = 0
    waiting_bytes: int = 0

    def figures(self) -> _Figures:
        return _Figures(
            tuple(self.wrote_state),
            self.num_clipped,
            self.num_corrupted,
            self.unused_downlink_bytes,
            self.unused_uplink_bytes,
        )


def _train_packs(state: ServerState, run: Run, packs: Sequence[Pack]) -> _Trained:
    """Train this rank's packs; test each client before and after where the round is evaluated."""
    done = _Trained()
    num_clients = sum(len(pack.jobs) for pack in packs)
    received: dict[int, AdapterState] = {}  # by tier: what travels is cut to a tier's ranks once
    with run.passes.phase():
        for pack in packs:
            _train_pack(state, run, pack, received, done)
            tokens = sum(report.trained_tokens for report in done.reports)
            run.watch.clients_done(len(done.reports), num_clients, tokens)
    return done


def _train_pack(
    state: ServerState, run: Run, pack: Pack, received: dict[int, AdapterState], done: _Trained
) -> None:
    """Train a pack into `done`; nothing else of its clients is held afterwards."""
    clients = {job.client_id: run.client(job.client_id, state) for job in pack.jobs}
    plans: dict[int, ClientPlan] = {}
    for client_id, client in clients.items():
        tier = id(client.lora_ranks)
        if tier not in received:
            received[tier] = run.strategy.download(state, client.lora_ranks)
        plans[client_id] = run.strategy.plan(state, client, received[tier])
    trained = run.trainer.train(pack, [plans[job.client_id] for job in pack.jobs], state.round_index)
    if run.evaluates(state.round_index) and trained:
        trained = _with_test_losses(run, plans, trained)
    sides = run.strategy.sends(state)
    uploads = []
    for update in trained:
        client_id = update.report.client_id
        upload = _upload(state, run, clients[client_id], plans[client_id], update, done)
        if upload is None:
            done.unused_uplink_bytes += plans[client_id].sent_bytes(sides)
        else:
            uploads.append(upload)
    used = {upload.report.client_id for upload in uploads}
    done.unused_downlink_bytes += sum(plans[client_id].received_bytes for client_id in plans.keys() - used)
    done.reports += [upload.report for upload in uploads]
    for number, waits in run.aggregator.contribution(run.strategy, state, pack.index, uploads).items():
        fits = done.waiting_bytes + waits.num_bytes <= run.most_waiting_bytes
        done.waiting_bytes += waits.num_bytes * fits
        done.sent[number] = waits if fits else waits.to("cpu")


def _screened(
    run: Run, start: AdapterState, update: ClientUpdate, round_index: int, done: _Trained
) -> AdapterState | None:
    """The adapter as the server takes it, which may be not at all; counts into `done`."""
    adapter: AdapterState | None = update.adapter
    client_id = update.report.client_id
    if run.corruption is not None and run.corruption.hits(client_id, round_index):
        adapter = run.corruption.apply(start, update.adapter)
        done.num_corrupted += 1
    if run.screening is not None and adapter is not None:
        adapter, was_clipped = run.screening.screen(start, adapter, client_id, round_index)
        done.num_clipped += was_clipped
    return adapter


def _upload(
    state: ServerState, run: Run, client: Client, plan: ClientPlan, update: ClientUpdate, done: _Trained
) -> ClientUpdate | None:
    """What the server takes of what a client returns, which may be nothing; what stays with it goes into the store.

    What stays is as the client trained it: an update breaks on its way, and is scaled down by the server.
    """
    upload = run.strategy.upload(state, client, plan, update.adapter, update.report)
    if upload.client_state is not None:
        run.store.save(client.client_id, state.round_index, upload.client_state)
        done.wrote_state.append(client.client_id)
    taken = _screened(run, plan.start, update, state.round_index, done)
    if taken is None:
        return None
    if taken is not update.adapter:
        upload = run.strategy.upload(state, client, plan, taken, update.report)
    uplink_bytes = plan.sent_bytes(run.strategy.sends(state), upload.adapter)
    return ClientUpdate(replace(update.report, uplink_bytes=uplink_bytes), upload.adapter)


def _with_versions(
    run: Run, state: ServerState, next_state: ServerState, wrote_state: Sequence[Sequence[int]]
) -> ServerState:
    """The next state, with the versions of client states that this round wrote."""
    written = sorted(client_id for ids in wrote_state for client_id in ids)
    if not written:
        return next_state
    run.store.supersede(written, state.client_versions)
    versions = {**state.client_versions, **dict.fromkeys(written, state.round_index)}
    return replace(next_state, client_versions=versions)


def _figures(run: Run, round_index: int, aggregated: Aggregated) -> dict[str, float]:
    """Means over modules of what the strategy says, the peak learning rate, and the privacy spent."""
    names = dict.fromkeys(name for figures in aggregated.by_module.values() for name in figures)
    means = {}
    for name in names:
        values = [figures[name] for figures in aggregated.by_module.values() if name in figures]
        means[name] = math.fsum(values) / len(values)
    means["train/lr"] = run.local_in(round_index).optimizer.lr
    if run.privacy is not None:
        means["privacy/epsilon"] = run.privacy.epsilon(round_index + 1)
    return means


def _with_test_losses(
    run: Run, plans: Mapping[int, ClientPlan], updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    client_ids = [update.report.client_id for update in updates]
    before = run.client_test.losses([plans[client_id].start for client_id in client_ids], client_ids)
    after = run.client_test.losses([update.adapter for update in updates], client_ids)
    return [
        replace(update, report=replace(update.report, test_loss_before=earlier, test_loss_after=later))
        for update, earlier, later in zip(updates, before, after, strict=True)
    ]
