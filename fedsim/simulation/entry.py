"""What the command line calls: check a run, estimate it, or run it to its end."""

import contextlib
import json
import logging
import os
from pathlib import Path

from fedsim.atomic import write_text_atomic
from fedsim.comm.agree import all_or_none, same_everywhere
from fedsim.comm.group import Group
from fedsim.config.loader import EstimateOptions
from fedsim.config.schema import Config
from fedsim.errors import ConfigError, FedsimError, PeerError
from fedsim.estimate.build import build_device, build_estimate
from fedsim.models.quantized import check_available
from fedsim.server.build import build_run
from fedsim.server.checkpoint import list_checkpoints, rounds_completed
from fedsim.simulation.prepare import load_base, prepare_data
from fedsim.simulation.records import (
    Records,
    check_folder,
    folder_path,
    open_existing,
    open_records,
    record_end,
)
from fedsim.simulation.rounds import run_rounds, stop_if_asked
from fedsim.stopping import (
    LAUNCHER_STOP_FILE_VARIABLE,
    STOP_FILE,
    STOP_FILE_VARIABLE,
    Preempted,
    StopRequests,
    StopWatch,
    TimeBudget,
)

logger = logging.getLogger(__name__)


def dry_run(config: Config, group: Group) -> str:
    """Check everything that can be checked without weights, and say what the run would do.

    Raises:
        PeerError, FedsimError: the run would fail.
    """
    summary, _ = prepare_data(config, group)
    with all_or_none(group, "opening the run folder"):
        check_available(config.model.quantization)
        if group.rank == 0:
            check_folder(config)
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
    summary, _ = prepare_data(config, group)
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
                records = open_existing(config, open_things)
                finished = records is not None and records.is_finished(config)
        if group.broadcast_object(finished):
            _tell_finished(config, records)
            if group.rank == 0:
                stops.obeyed()
            return
        try:
            summary, data = prepare_data(config, group)
            stop_if_asked(group, stops, "before the base was loaded")
            base = load_base(config, group)
            same_everywhere(group, "the base model", base.fingerprint + base.settings)
            with all_or_none(group, "setting up the run"):
                run = build_run(config, group, base, data, summary.tiers, summary.strategy)
            same_everywhere(group, "how clients are trained (training.trainer)", type(run.trainer).__name__)
            with all_or_none(group, "opening the run folder"):
                if group.rank == 0 and records is None:
                    records = open_records(config, open_things)
            run_rounds(config, run, base, summary, records, stops)
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


def _tell_finished(config: Config, records: Records | None) -> None:
    """Say on rank 0 that nothing is left to do."""
    if records is None:
        return
    done = rounds_completed(list_checkpoints(records.checkpoints)[-1])
    how = records.folder.recorded("reason") or f"{done} rounds"
    logger.info("run %s is finished (%s); nothing to do", folder_path(config), how)
    if done > config.run.rounds:
        logger.warning(
            "it has %d rounds, more than run.rounds=%d, and so has its adapter; choose another run.name for fewer",
            done,
            config.run.rounds,
        )


def _build_stops(config: Config, requests: StopRequests) -> StopWatch:
    minutes = config.run.max_minutes
    others = [os.environ.get(name) for name in (STOP_FILE_VARIABLE, LAUNCHER_STOP_FILE_VARIABLE)]
    return StopWatch(
        requests,
        folder_path(config) / STOP_FILE,
        [Path(other) for other in others if other],
        TimeBudget(None if minutes is None else 60 * minutes, requests.began_s),
    )


def _record_early_end(
    config: Config, open_things: contextlib.ExitStack, records: Records | None, error: BaseException
) -> None:
    """Write down how a start ended that did not come as far as its first record; a finished run stays what it is.

    A mistake in the configuration of a new run leaves no folder behind.
    """
    with contextlib.suppress(FedsimError):  # the error that ended the start is the one to show
        if records is None and (isinstance(error, Preempted) or folder_path(config).is_dir()):
            records = open_records(config, open_things)
        if records is not None and not records.folder.started and records.folder.status() != "finished":
            record_end(records, error)
