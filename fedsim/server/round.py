"""One synchronous round: who trains, training, aggregation, evaluation."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedsim.aggregation.spectrum import spectra_with_energy
from fedsim.aggregation.strategy import Aggregated
from fedsim.comm.agree import all_or_none
from fedsim.comm.exchange import gather_reports
from fedsim.comm.placement import place
from fedsim.evaluation.losses import LossSums, merge_batches
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport
from fedsim.server.early_stopping import stopping_figures
from fedsim.server.local_training import Trained, train_packs
from fedsim.server.run import Run
from fedsim.server.selection import drawn_cohort, round_jobs, who_reports, with_clock
from fedsim.server.turnout import Turnout
from fedsim.training.memory import peak_memory_bytes
from fedsim.training.packs import Pack, pack_cohort


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
        train_seconds_by_rank: time that each rank spent on its packs: local training, the clients' tests, and keeping
            what they send.
        test_seconds_by_rank: of it, the clients' tests.
        figures: by metric, what the strategy and the privacy accountant say about the round, its learning rate, and
            scores of answers, validation and early stopping.
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
    test_seconds_by_rank: tuple[float, ...]
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
    trained = Trained()
    with all_or_none(run.group, f"local training, round {round_index}"):
        trained = train_packs(state, run, [packs[index] for index in mine])
        trained_at = time.perf_counter()

    run.watch.phase("aggregating")
    clients = with_clock(gather_reports(run.group, trained.reports), turnout)
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
    global_test, answers = _evaluated(run, next_state, round_index)
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
            "client_tests_s": trained.test_s,  # within train_s
            "wait_s": gathering - trained_at,
            "gather_s": gather_s,
            "aggregate_s": aggregated_at - gathering - gather_s,
            "evaluate_s": ended - aggregated_at + started - began,
            "round_s": ended - began,
        },
        train_seconds_by_rank=tuple(seconds for seconds, *_ in told),
        test_seconds_by_rank=tuple(figures.test_s for *_, figures in told),
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
    expected = None
    if run.group.rank == 0:
        ranks = {
            job.client_id: max(run.tiers.lora_ranks(job.client_id, round_index).values())
            for pack in packs
            for job in pack.jobs
        }
        expected = run.costs.expected(packs, ranks)
    costs = run.group.broadcast_object(expected)
    return place(costs, run.group.world_size)[run.group.rank]


def _evaluated(run: Run, state: ServerState, round_index: int) -> tuple[LossSums | None, dict[str, float]]:
    """Loss sums of the global test set and scores of answers after the round, where it is evaluated."""
    if state.base_update is not None:
        with all_or_none(run.group, f"updating the base, round {round_index}"):
            run.base.apply(state.base_update)
    if not run.evaluates(round_index) or not run.strategy.traits.has_global_model:
        return None, {}
    global_test = measure_global(run, state, f"evaluation, round {round_index}")
    if run.answers is None:
        return global_test, {}
    what = f"scoring answers, round {round_index}"
    return global_test, run.answers.measure(run.group, run.strategy.export(state), what)


def measure_global(run: Run, state: ServerState, what: str) -> LossSums:
    """Loss sums of the global test set, measured by all ranks together; equal bits for any number of them."""
    mine = range(run.group.rank, len(run.global_test.batches), run.group.world_size)
    measured: dict[int, LossSums] = {}
    with all_or_none(run.group, what), run.passes.phase():
        measured = run.global_test.measure(run.strategy.export(state), mine)
    everywhere = run.group.gather_objects(measured)
    return merge_batches({index: sums for part in everywhere for index, sums in part.items()})


def _with_versions(
    run: Run, state: ServerState, next_state: ServerState, wrote_state: Sequence[Sequence[int]]
) -> ServerState:
    """The next state, with the versions of client states that this round wrote."""
    written = sorted(client_id for ids in wrote_state for client_id in ids)
    if not written:
        return next_state
    if run.group.rank == 0:  # which alone deletes
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
