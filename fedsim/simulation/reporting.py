"""The progress display and W&B, opened before the rounds and closed however they end."""

import contextlib
import json
import sys
from collections.abc import Iterator

from fedsim.atomic import replace_file, write_text_atomic
from fedsim.comm.agree import all_or_none
from fedsim.comm.group import Group
from fedsim.config.loader import to_tree
from fedsim.config.schema import Config
from fedsim.errors import FedsimError
from fedsim.models.base import BaseModel
from fedsim.server.summary import RunSummary
from fedsim.simulation.prepare import input_fingerprints
from fedsim.simulation.records import Records, record_end
from fedsim.stopping import EXIT_PREEMPTED, Preempted, StopWatch
from fedsim.tracking.environment import describe_environment
from fedsim.tracking.progress import Progress, build_progress, logs_through
from fedsim.tracking.wandb_run import NoTracker, Tracker, build_tracker


@contextlib.contextmanager
def reporting(
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
                        "inputs": input_fingerprints(base, summary),
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
                record_end(records, error)
        tracker.finish(EXIT_PREEMPTED if isinstance(error, Preempted) else 1)
        raise
    finally:
        progress.stop()
        logs.close()
