"""Round after round, from the newest checkpoint or the initial state to the last one."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fedsim.comm.agree import all_or_none, first_reason, on_root
from fedsim.comm.exchange import broadcast_state
from fedsim.comm.group import Group
from fedsim.config.schema import Config
from fedsim.errors import ModelError
from fedsim.lora.payload import pickled_payload_mib
from fedsim.lora.plan import sides_bytes
from fedsim.lora.state import ServerState
from fedsim.models.base import BaseModel
from fedsim.server.checkpoint import checkpoint_path, kept_client_versions
from fedsim.server.metrics import client_rows, round_metrics
from fedsim.server.round import RoundReport, measure_global, run_round
from fedsim.server.run import Run
from fedsim.server.summary import RunSummary
from fedsim.simulation.export import finish_run
from fedsim.simulation.prepare import input_fingerprints
from fedsim.simulation.records import Records, folder_path
from fedsim.simulation.reporting import reporting
from fedsim.stopping import Preempted, StopWatch
from fedsim.tracking.rank_log import rank_log
from fedsim.training.memory import FreeMemory, long_lived_set_aside

logger = logging.getLogger(__name__)


def run_rounds(
    config: Config,
    run: Run,
    base: BaseModel,
    summary: RunSummary,
    records: Records | None,
    stops: StopWatch,
) -> None:
    """All rounds that are left, on every rank; `records` is None except on rank 0."""
    group = run.group
    state = _start_state(config, run, base, summary, records)
    with (
        rank_log(folder_path(config), group.rank, lambda: group.place),
        reporting(config, group, base, summary, records, stops) as (progress, tracker),
        long_lived_set_aside(),
    ):
        run = replace(run, watch=progress)
        stop_if_asked(group, stops, f"before round {state.round_index + 1}")
        initial_loss = None
        if state.round_index == 0 and run.strategy.traits.has_global_model:
            initial_loss = measure_global(run, state, "evaluation before round 0").mean
            with all_or_none(group, "evaluation before round 0"):
                _check_finite(initial_loss, base.name)
            progress.note(f"test loss before training: {initial_loss:.4f}")
        progress.start(config.run.name, state.round_index, run.rounds, run.cohort.size)
        stops.budget.rounds_begin()
        free_memory = FreeMemory()
        while not run.is_over(state):
            round_index = state.round_index
            before = state
            state, report = run_round(state, run)
            stops.budget.round_over()
            logger.debug(
                "round %d of %d is done, %.1f s", state.round_index, run.rounds, report.seconds["round_s"]
            )
            asked = first_reason(group, stops.reason())
            with all_or_none(group, f"recording round {round_index}"):
                if records is not None:
                    metrics = round_metrics(report, _payload_mib(run, before, report))
                    if round_index == 0 and initial_loss is not None:
                        metrics["test/loss_initial"] = initial_loss
                    _record_round(config, run, [before, state], metrics, report, records, asked is not None)
                    tracker.log_round(metrics)
                    progress.round_done(metrics)
            free_memory.give_back()
            if asked is not None and not run.is_over(state):
                raise Preempted(f"{asked}, after round {state.round_index} of {run.rounds}")
        with all_or_none(group, "writing the adapter"):
            if records is not None:
                finish_run(config, run, base, state, records, tracker)


def stop_if_asked(group: Group, stops: StopWatch, when: str) -> None:
    """Raise `Preempted` on every rank if any of them is asked to stop."""
    reason = first_reason(group, stops.reason())
    if reason is not None:
        raise Preempted(f"{reason}, {when}")


def _check_finite(initial_loss: float, base_name: str) -> None:
    if not math.isfinite(initial_loss):
        raise ModelError(
            f"model.name_or_path={base_name}: its loss on the test set must be finite, got {initial_loss}; "
            "check its weights, or set model.dtype to another type"
        )


def _record_round(
    config: Config,
    run: Run,
    states: Sequence[ServerState],
    metrics: dict[str, Any],
    report: RoundReport,
    records: Records,
    stops: bool,
) -> None:
    """Write a round down: its figures first, then the checkpoint that says that it is recorded.

    Args:
        config: of the run.
        run: whose round it was.
        states: before and after the round.
        metrics: its line of metrics.jsonl.
        report: of the round.
        records: to write to.
        stops: the run is to stop here, so a checkpoint is written whatever the round, and waited for.
    """
    before, state = states
    records.settle(run.store, states)
    records.metrics.append(metrics)
    records.clients.append_rows(client_rows(report))
    if report.spectra:
        records.spectra.append({"round_index": before.round_index, **report.spectra})
    for due in _due_checkpoints(config, run, before, state, records, stops):
        records.clients.flush()
        records.writer.save(due, config.checkpoint.keep_last)
    if stops:
        records.writer.wait()


def _due_checkpoints(
    config: Config, run: Run, before: ServerState, state: ServerState, records: Records, stops: bool
) -> list[ServerState]:
    """What is to be saved after a round, oldest first; with `stops`, the run is to stop here."""
    best_after = None if state.best is None else state.best.rounds
    due = []
    if best_after == before.round_index and not checkpoint_path(records.checkpoints, best_after).exists():
        due.append(before)  # only this round has found out that the one before it left the best state so far
    is_regular = state.round_index % config.checkpoint.every_rounds == 0
    if is_regular or stops or run.is_over(state) or best_after == state.round_index:
        due.append(state)
    return due


def _start_state(
    config: Config, run: Run, base: BaseModel, summary: RunSummary, records: Records | None
) -> ServerState:
    """The newest checkpoint, or the initial state, on every rank."""
    group = run.group

    def load() -> ServerState:
        assert records is not None
        records.check_same_inputs(input_fingerprints(base, summary))  # before any of its files is changed
        state = records.newest_state(config.checkpoint.every_rounds, run.store)
        if state is None:
            dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
            state = ServerState(0, summary.adapter.to("cpu", dtype))
        else:
            logger.info("resuming after %d of %d rounds", state.round_index, run.rounds)
        records.go_back_to(state.round_index)
        kept = kept_client_versions(records.checkpoints)
        if kept is not None:
            run.store.drop_unknown([*kept, state.client_versions])
        return state

    state = broadcast_state(group, None, on_root(group, "loading the checkpoint", load))
    if run.strategy.traits.keeps_client_state:
        run.store.check_shared(group)
    with all_or_none(group, "updating the base"):
        run.base.apply(state.base_update)
    return state


def _payload_mib(run: Run, before: ServerState, report: RoundReport) -> float | None:
    """Pickled size of what the largest client sent, where that is the sides of an adapter of the largest ranks."""
    sides = run.strategy.sends(before)
    most = max((client.uplink_bytes for client in report.clients), default=0)
    is_whole = bool(sides) and most == sides_bytes(before.adapter, sides)
    return pickled_payload_mib(before.adapter, sides) if is_whole else None
