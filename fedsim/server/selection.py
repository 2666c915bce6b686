"""Who trains in a round, on what, and who of them is heard."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from fedsim.aggregation.strategy import Strategy
from fedsim.comm.agree import on_root
from fedsim.config.clients_section import over_selected
from fedsim.data.build import FederatedData
from fedsim.lora.factors import AdapterState
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport
from fedsim.server.cohort import CohortPolicy, LocalBudget, client_jobs, pooled_job, sample_cohort
from fedsim.server.run import Run
from fedsim.server.turnout import Participation, Turnout
from fedsim.training.packs import ClientJob
from fedsim.training.settings import LocalSettings, at_round


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


def drawn_cohort(run: RoundInputs, round_index: int) -> tuple[int, ...]:
    """The clients drawn for a round, ascending, among those that can be; the same on every rank."""
    if run.participation is None:
        return sample_cohort(run.cohort, run.seed, round_index)
    available = run.participation.available(run.cohort.num_clients, run.seed, round_index)
    size = over_selected(run.cohort.size, run.participation.over_selection)
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

    Raises:
        PeerError: rank 0 cannot read what a client keeps.
    """
    participation = run.participation
    if participation is None:
        return tuple(jobs), None
    what = f"choosing clients, round {state.round_index}"
    turnout: Turnout = run.group.broadcast_object(
        on_root(run.group, what, lambda: _turnout(run, state, jobs, participation))
    )
    reporting = set(turnout.reporting)
    return tuple(job for job in jobs if job.client_id in reporting), turnout


def _turnout(
    run: Run, state: ServerState, jobs: Sequence[ClientJob], participation: Participation
) -> Turnout:
    """A client receives and sends what its plan says, at the LoRA ranks with which it starts."""
    round_index = state.round_index
    traffic = _traffic(run, state, jobs)
    seconds = participation.client_seconds(jobs, traffic, run.seed, round_index)
    drawn = [job.client_id for job in jobs]
    wanted = run.cohort.size if participation.over_selection > 1 else len(jobs)
    turnout = participation.turnout(drawn, wanted, seconds, run.seed, round_index, run.cohort.num_clients)
    reporting = set(turnout.reporting)
    silent = [client_id for client_id in drawn if client_id not in reporting]
    return replace(
        turnout,
        unused_downlink_bytes=sum(traffic[client_id][0] for client_id in silent),
        unused_uplink_bytes=sum(
            traffic[client_id][1] for client_id in silent if client_id not in turnout.lost
        ),
    )


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


def with_clock(reports: Sequence[ClientReport], turnout: Turnout | None) -> tuple[ClientReport, ...]:
    """The reports with what the simulated clock says about them."""
    if turnout is None:
        return tuple(reports)
    return tuple(replace(report, simulated_s=turnout.seconds.get(report.client_id)) for report in reports)
