"""A whole run: prepare, round after round, finish. Between the command line and the round."""

import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedsim.atomic import remove_folder, replace_file, replace_folder, write_text_atomic
from fedsim.comm.agree import all_or_none, first_reason, on_root, root_first, same_everywhere
from fedsim.comm.exchange import broadcast_state
from fedsim.comm.group import Group
from fedsim.comm.sharding import ShardingGroup
from fedsim.config.loader import SAFE_KEYS, EstimateOptions, complete_tree, to_tree, to_yaml
from fedsim.config.paths import is_there, local_path
from fedsim.config.schema import Config
from fedsim.data.build import FederatedData, build_data
from fedsim.errors import (
    CheckpointError,
    ConfigError,
    FedsimError,
    ModelError,
    PeerError,
    RunFolderError,
    is_user_error,
)
from fedsim.estimate.build import build_device, build_estimate
from fedsim.lora.factors import AdapterState
from fedsim.lora.lowrank import combine
from fedsim.lora.payload import pickled_payload_mib
from fedsim.lora.peft_format import save_peft_adapter
from fedsim.lora.plan import sides_bytes
from fedsim.lora.state import ServerState
from fedsim.models.base import BaseModel, build_base, locate_base
from fedsim.models.description import BaseDescription, describe_base
from fedsim.models.merged import save_merged_model
from fedsim.models.quantized import check_available
from fedsim.models.tokenizer import build_tokenizer
from fedsim.server.build import build_initial_adapter, build_local_training, build_run, check_svd_device
from fedsim.server.build_clients import build_cohort_policy, build_participation, build_tiers
from fedsim.server.build_strategy import build_federated_strategy
from fedsim.server.build_tests import build_stopping_rule
from fedsim.server.checkpoint import (
    CheckpointWriter,
    checkpoint_path,
    kept_client_versions,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    prune_checkpoints,
    rounds_completed,
    saved_best,
)
from fedsim.server.client_store import ClientStore
from fedsim.server.cohort import check_warmup
from fedsim.server.early_stopping import why_stopped
from fedsim.server.metrics import client_rows, round_metrics
from fedsim.server.round import RoundReport, measure_global, run_round
from fedsim.server.run import Run
from fedsim.server.summary import RunSummary
from fedsim.stopping import (
    EXIT_PREEMPTED,
    LAUNCHER_STOP_FILE_VARIABLE,
    STOP_FILE,
    STOP_FILE_VARIABLE,
    Preempted,
    StopRequests,
    StopWatch,
    TimeBudget,
)
from fedsim.tracking.environment import describe_environment
from fedsim.tracking.metrics import ClientTable, MetricsLog, whole_rounds
from fedsim.tracking.progress import Progress, build_progress, logs_through
from fedsim.tracking.rank_log import rank_log
from fedsim.tracking.run_folder import RunFolder, check_new_folder, check_run_folder, open_run_folder
from fedsim.tracking.wandb_run import NoTracker, Tracker, build_tracker
from fedsim.training.memory import FreeMemory, long_lived_set_aside

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
CLIENT_ADAPTERS = "adapters"
MODEL = "model"


def dry_run(config: Config, group: Group) -> str:
    """Check everything that can be checked without weights, and say what the run would do.

    Raises:
        PeerError, FedsimError: the run would fail.
    """
    summary, _ = _prepare_data(config, group)
    with all_or_none(group, "opening the run folder"):
        check_available(config.model.quantization)
        if group.rank == 0:
            check_run_folder(_folder_path(config), to_yaml(config), _safe_keys(), complete_tree)
    return "\n".join(summary.lines())


def estimate(config: Config, group: Group, options: EstimateOptions) -> str:
    """Say what the run would cost, with weights only for a probe; nothing is written but `options.json_path`.

    Raises:
        PeerError, FedsimError: the run would fail, or the options contradict it.
    """
    if options.probe and config.model.sharding != "none":
        raise ConfigError(
            f"--probe needs model.sharding=none, since it runs on the whole base, got '{config.model.sharding}'; leave "
            "it out for an estimate from shapes"
        )
    device = build_device(config, group, options.gpu, options.processes, options.probe)
    summary, _ = _prepare_data(config, group)
    estimated = build_estimate(config, group, summary, device, options.probe)
    with all_or_none(group, "writing the estimate"):
        if group.rank == 0 and options.json_path is not None:
            write_text_atomic(options.json_path, json.dumps(estimated.to_json(), indent=2) + "\n")
    return "\n".join(summary.lines() + estimated.lines())


def simulate(config: Config, group: Group, requests: StopRequests | None = None) -> None:
    """Run, or resume, until the last round, and leave a complete run folder.

    Args:
        config: of the run.
        group: the processes.
        requests: to stop, by signals.

    Raises:
        PeerError, FedsimError: the run cannot start or go on. What was completed up to the last checkpoint stays.
        Preempted: it was asked to stop, and has.
    """
    stops = _build_stops(config, requests or StopRequests())
    with contextlib.ExitStack() as open_things:
        records = None
        finished = False
        with all_or_none(group, "opening the run folder"):
            if group.rank == 0:
                records = _open_existing(config, open_things)
                finished = records is not None and records.is_finished(config)
        if group.broadcast_object(finished):
            _tell_finished(config, records)
            if group.rank == 0:
                stops.obeyed()
            return
        try:
            summary, data = _prepare_data(config, group)
            _stop_if_asked(group, stops, "before the base was loaded")
            base = _load_base(config, group)
            same_everywhere(group, "the base model", base.fingerprint + base.settings)
            with all_or_none(group, "setting up the run"):
                run = build_run(config, group, base, data, summary.tiers, summary.strategy)
            same_everywhere(group, "how clients are trained (training.trainer)", type(run.trainer).__name__)
            with all_or_none(group, "opening the run folder"):
                if group.rank == 0 and records is None:
                    records = _open_new(config, open_things)
            _run_rounds(config, run, base, summary, records, stops)
            if group.rank == 0:
                stops.obeyed()  # it may have been asked in its last round
        except BaseException as error:
            stops.ends(error)
            if group.rank == 0:
                _record_early_end(config, open_things, records, error)
                if isinstance(error, Preempted):
                    stops.obeyed()
            if isinstance(error, PeerError | Preempted):
                # every rank is here: none leaves, and so lets the launcher end the others, before rank 0 has written
                group.gather_objects(None)
            raise


def _tell_finished(config: Config, records: "Records | None") -> None:
    """Say on rank 0 that nothing is left to do."""
    if records is None:
        return
    done = rounds_completed(list_checkpoints(records.checkpoints)[-1])
    how = records.folder.recorded("reason") or f"{done} rounds"
    logger.info("run %s is finished (%s); nothing to do", _folder_path(config), how)
    if done > config.run.rounds:
        logger.warning(
            "it has %d rounds, more than run.rounds=%d, and so has its adapter; choose another run.name for fewer",
            done,
            config.run.rounds,
        )


def _load_base(config: Config, group: Group) -> BaseModel:
    """The base on every process, or each one's part of it."""
    if config.model.sharding == "none":
        return root_first(group, "loading the base model", lambda: build_base(config.model, group.device))
    root_first(group, "fetching the base model", lambda: locate_base(config.model))
    sharding = ShardingGroup(
        group, config.model.sharding_group_size, config.model.offload == "cpu", config.comm.timeout_s
    )
    base: BaseModel | None = None
    with all_or_none(group, "loading the base model"):
        base = build_base(config.model, group.device, sharding)
    assert base is not None
    return base


def _build_stops(config: Config, requests: StopRequests) -> StopWatch:
    minutes = config.run.max_minutes
    others = [os.environ.get(name) for name in (STOP_FILE_VARIABLE, LAUNCHER_STOP_FILE_VARIABLE)]
    return StopWatch(
        requests,
        _folder_path(config) / STOP_FILE,
        [Path(other) for other in others if other],
        TimeBudget(None if minutes is None else 60 * minutes, requests.began_s),
    )


def _stop_if_asked(group: Group, stops: StopWatch, when: str) -> None:
    """Raise `Preempted` on every rank if any of them is asked to stop."""
    reason = first_reason(group, stops.reason())
    if reason is not None:
        raise Preempted(f"{reason}, {when}")


def _record_early_end(
    config: Config, open_things: contextlib.ExitStack, records: "Records | None", error: BaseException
) -> None:
    """Write down how a start ended that did not come as far as its first record; a finished run stays what it is.

    A mistake in the configuration of a new run leaves no folder behind.
    """
    with contextlib.suppress(FedsimError):  # the error that ended the start is the one to show
        if records is None and (isinstance(error, Preempted) or _folder_path(config).is_dir()):
            records = _open_new(config, open_things)
        if records is not None and not records.folder.started and records.folder.status() != "finished":
            _record_end(records, error)


def _record_end(records: "Records", error: BaseException) -> None:
    """Write how a run ended that did not finish."""
    if isinstance(error, Preempted):
        records.folder.finish("preempted", str(error))
        return
    reason = "interrupted by the user" if isinstance(error, KeyboardInterrupt) else str(error)
    records.folder.finish("failed", f"{type(error).__name__}: {reason}", user_error=is_user_error(error))


@dataclass(frozen=True)
class Records:
    """Where rank 0 writes what a run leaves behind."""

    folder: RunFolder
    metrics: MetricsLog
    spectra: MetricsLog
    clients: ClientTable
    writer: CheckpointWriter

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder.path / CHECKPOINTS

    def is_finished(self, config: Config) -> bool:
        """Whether all rounds that are asked for have been run, or it stopped early, and the run was closed properly."""
        found = list_checkpoints(self.checkpoints)
        if self.folder.status() != "finished" or not found:
            return False
        rule = build_stopping_rule(config)
        stopped = rule is not None and rule.stops(saved_best(found[-1]))
        return stopped or rounds_completed(found[-1]) >= config.run.rounds

    def check_same_inputs(self, inputs: Mapping[str, str]) -> None:
        """Check that a run that is resumed still has the data and the base it began with.

        Raises:
            RunFolderError: a file, the tokenizer, or a library behind one of them has changed in between.
        """
        if not list_checkpoints(self.checkpoints):
            return
        before = self.folder.recorded("inputs")
        if not isinstance(before, dict):
            raise RunFolderError(
                f"{self.folder.path / 'run.json'} must say what data and base the run was begun with, and does not; "
                "restore the file, or delete the run folder to start again"
            )
        before = {"base_settings": inputs["base_settings"], **before}  # which an older fedsim did not note
        changed = [name for name in inputs if before.get(name) != inputs[name]]
        if changed:
            raise RunFolderError(
                f"run folder {self.folder.path} was begun with other inputs ({', '.join(changed)}): what "
                "data.source or model.name_or_path stands for has changed since; choose another run.name"
            )

    def newest_state(self, every_rounds: int, store: ClientStore) -> ServerState | None:
        """The newest checkpoint that the record covers; None for a run that has not come to its first one.

        Args:
            every_rounds: rounds between checkpoints, as this run is started now.
            store: of the clients' own states, which must be whole.

        Raises:
            CheckpointError: there is none that can be used, although there must have been one.
        """
        recorded = whole_rounds(self.metrics, self.clients)
        state = load_newest_checkpoint(
            self.checkpoints, recorded, lambda found: store.check(found.client_versions)
        )
        before = self.folder.recorded("config")  # of the last start; this time it may be another number
        section = before.get("checkpoint") if isinstance(before, dict) else None
        every_before = section.get("every_rounds") if isinstance(section, dict) else None
        every_rounds = every_before if isinstance(every_before, int) else every_rounds
        if state is None and recorded > every_rounds:
            raise CheckpointError(
                f"{self.checkpoints} must hold a checkpoint of this run, of which {recorded} rounds are recorded; "
                "restore it, or delete the run folder to start again"
            )
        return state

    def go_back_to(self, round_index: int) -> None:
        """Drop the records of rounds that a resumed run will repeat, and checkpoints after them that cannot be used.

        One of these would count as the newest: what is written from now on would be deleted as older.
        """
        for path in list_checkpoints(self.checkpoints):
            if rounds_completed(path) > round_index:
                logger.warning("checkpoint %s is deleted: the run goes on from %d rounds", path, round_index)
                remove_folder(path)
        self.metrics.truncate(round_index)
        self.spectra.truncate(round_index)
        self.clients.truncate(round_index)


def _folder_path(config: Config) -> Path:
    return local_path(config.run.output_dir) / config.run.name


def _open_existing(config: Config, open_things: contextlib.ExitStack) -> Records | None:
    """The records of an earlier start of this run; None, with nothing written, if there was none."""
    path = _folder_path(config)
    if not is_there(path / "config.yaml"):
        check_new_folder(path)
        return None
    return _open_new(config, open_things)


def _safe_keys() -> list[str]:
    return [key.removesuffix(".*") for key in SAFE_KEYS]


def _open_new(config: Config, open_things: contextlib.ExitStack) -> Records:
    folder = open_run_folder(
        _folder_path(config), to_tree(config), to_yaml(config), _safe_keys(), complete_tree
    )
    open_things.enter_context(folder)
    writer = CheckpointWriter(folder.path / CHECKPOINTS)
    open_things.callback(writer.close)
    return Records(
        folder,
        MetricsLog(folder.path / "metrics.jsonl"),
        MetricsLog(folder.path / "spectra.jsonl"),
        ClientTable(folder.path / "clients.parquet"),
        writer,
    )


def _prepare_data(config: Config, group: Group) -> tuple[RunSummary, FederatedData]:
    """Tokenizer, data, partition, and all checks that need no weights; the same on every rank."""

    def prepare() -> tuple[BaseDescription, FederatedData]:
        tokenizer = build_tokenizer(config.model)
        description = describe_base(
            config.model, config.lora.target_modules, tokenizer, config.data.max_tokens
        )
        return description, build_data(config.data, tokenizer, config.run.seed)

    description, data = root_first(group, "preparing the data", prepare)
    same_everywhere(group, "the data and its partition", data.fingerprint)
    with all_or_none(group, "setting up the adapter"):
        check_svd_device(config.aggregation.svd_device, group.device)
        num_clients = data.partition.num_clients
        budget, local = build_local_training(config)
        check_warmup(local.warmup_steps, budget, int(data.partition.sizes.max()))
        tiers = build_tiers(config, description.targets, num_clients, data.partition.sizes)
        summary = RunSummary(
            description.name,
            description.num_parameters,
            build_initial_adapter(config, description.targets, tiers),
            data,
            build_cohort_policy(config.cohort, num_clients),
            tiers,
            build_federated_strategy(config, description.targets, tiers, num_clients),
            build_participation(config, tiers),
        )
    return summary, data


def _run_rounds(
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
        rank_log(_folder_path(config), group.rank, lambda: group.place),
        _reporting(config, group, base, summary, records, stops) as (progress, tracker),
        long_lived_set_aside(),
    ):
        run = replace(run, watch=progress)
        _stop_if_asked(group, stops, f"before round {state.round_index + 1}")
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
                    _settle_checkpoint(run, [before, state], records)
                    metrics = round_metrics(report, _payload_mib(run, before, report))
                    if round_index == 0 and initial_loss is not None:
                        metrics["test/loss_initial"] = initial_loss
                    records.metrics.append(metrics)
                    records.clients.append_rows(client_rows(report))
                    if report.spectra:
                        records.spectra.append({"round_index": round_index, **report.spectra})
                    for due in _due_checkpoints(config, run, before, state, records, asked is not None):
                        records.clients.flush()
                        records.writer.save(due, config.checkpoint.keep_last)
                    if asked is not None:
                        records.writer.wait()
                    tracker.log_round(metrics)
                    progress.round_done(metrics)
            free_memory.give_back()
            if asked is not None and not run.is_over(state):
                raise Preempted(f"{asked}, after round {state.round_index} of {run.rounds}")
        with all_or_none(group, "writing the adapter"):
            if records is not None:
                _finish(config, run, base, state, records, tracker)


def _check_finite(initial_loss: float, base_name: str) -> None:
    if not math.isfinite(initial_loss):
        raise ModelError(
            f"model.name_or_path={base_name}: its loss on the test set must be finite, got {initial_loss}; "
            "check its weights, or set model.dtype to another type"
        )


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


def _settle_checkpoint(run: Run, states: Sequence[ServerState], records: Records) -> None:
    """Before anything is recorded: the checkpoint under way is on the disk, and no version of a client's state is kept
    that neither a checkpoint needs nor one of `states`, which may yet be saved.
    """
    records.folder.check_held()
    records.writer.wait()
    if any(state.client_versions for state in states):  # else no checkpoint need be read again
        kept = kept_client_versions(records.checkpoints)
        if kept is not None:
            run.store.drop_superseded([*kept, *(state.client_versions for state in states)])


def _fingerprints(base: BaseModel, summary: RunSummary) -> dict[str, str]:
    return {"data": summary.data.fingerprint, "base": base.fingerprint, "base_settings": base.settings}


def _start_state(
    config: Config, run: Run, base: BaseModel, summary: RunSummary, records: Records | None
) -> ServerState:
    """The newest checkpoint, or the initial state, on every rank."""
    group = run.group

    def load() -> ServerState:
        assert records is not None
        records.check_same_inputs(_fingerprints(base, summary))  # before any of its files is changed
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


@contextlib.contextmanager
def _reporting(
    config: Config,
    group: Group,
    base: BaseModel,
    summary: RunSummary,
    records: Records | None,
    stops: StopWatch,
) -> Iterator[tuple[Progress, Tracker]]:
    """Open what shows and mirrors the run, on rank 0; write down how the run ended if it did not finish."""
    progress = build_progress(config.tracking.progress if group.rank == 0 else "off", sys.stderr)
    tracker: Tracker = NoTracker()
    logs = contextlib.ExitStack()
    try:
        logs.enter_context(logs_through(progress))
        with all_or_none(group, "starting the records"):
            if records is not None:
                records.folder.start(
                    {
                        **describe_environment(group.world_size, sys.argv),
                        "inputs": _fingerprints(base, summary),
                        "parameters": {
                            "base": summary.base_parameters,
                            "adapter": summary.adapter.num_parameters,
                        },
                        "answers": summary.answer_counts(),
                    }
                )
                partition = summary.data.partition
                write_text_atomic(
                    records.folder.path / "partition.json", json.dumps(partition.to_json()) + "\n"
                )
                replace_file(records.folder.path / "partition.parquet", partition.to_parquet())
                tiers = json.dumps(summary.tiers.to_json()) + "\n"
                write_text_atomic(records.folder.path / "tiers.json", tiers)
                tracker = build_tracker(config, records.folder, to_tree(config))
                for line in summary.lines():
                    progress.note(line)
        yield progress, tracker
    except BaseException as error:
        stops.ends(error)
        if records is not None:
            with contextlib.suppress(FedsimError):  # the error that ended the run is the one to show
                _record_end(records, error)
        tracker.finish(EXIT_PREEMPTED if isinstance(error, Preempted) else 1)
        raise
    finally:
        progress.stop()
        logs.close()


def _finish(
    config: Config, run: Run, base: BaseModel, state: ServerState, records: Records, tracker: Tracker
) -> None:
    """Export what was trained and close the records."""
    path = records.folder.path
    _settle_checkpoint(run, [state], records)
    prune_checkpoints(records.checkpoints, config.checkpoint.keep_last)  # a kill may have come before this
    exported = _exported(config, state, records)
    if run.strategy.traits.has_global_model:
        adapter = combine(run.strategy.export(exported), exported.base_update)
        _export(config, base, adapter, path / ADAPTER)
        tracker.log_adapter(path / ADAPTER)
        if config.run.merged_model:
            replace_folder(
                path / MODEL,
                lambda unfinished: save_merged_model(
                    build_base(config.model, "cpu", alone=True), adapter, unfinished
                ),
            )
    else:
        (path / CLIENT_ADAPTERS).mkdir(exist_ok=True)
        for client_id in sorted(state.client_versions):  # the others have nothing of their own
            adapter = combine(run.strategy.export(state, run.client(client_id, state)), state.base_update)
            _export(config, base, adapter, path / CLIENT_ADAPTERS / f"client_{client_id:06d}")
    tracker.log_clients(records.clients)
    tracker.finish(0)
    reason, info = None, None
    if run.stopping is not None and state.best is not None:
        reason = why_stopped(run.stopping, state, run.rounds)
        info = {
            "metric": run.stopping.figure,
            "best": state.best.score,
            "best_after_rounds": state.best.rounds,
            "rounds": state.round_index,
            "stopped_early": reason is not None,
            "exported_after_rounds": exported.round_index,
        }
    records.folder.finish("finished", reason, {} if info is None else {"early_stopping": info})
    logger.info("run %s is finished (%s)", path, reason or f"{state.round_index} rounds")


def _exported(config: Config, state: ServerState, records: Records) -> ServerState:
    """The state that is exported: the best one so far where that is asked for, else the last one."""
    best = state.best
    if best is None or config.early_stopping.export == "last" or best.rounds == state.round_index:
        return state
    return load_checkpoint(records.checkpoints, best.rounds)


def _export(config: Config, base: BaseModel, adapter: AdapterState, folder: Path) -> None:
    replace_folder(
        folder,
        lambda unfinished: save_peft_adapter(
            adapter, unfinished, base.source, config.lora.target_modules, config.lora.dropout
        ),
    )
