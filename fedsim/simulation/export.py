"""The end of a run: what was trained is exported, and the records are closed."""

import logging
from pathlib import Path

from fedsim.atomic import replace_folder
from fedsim.config.schema import Config
from fedsim.lora.factors import AdapterState
from fedsim.lora.lowrank import combine
from fedsim.lora.peft_format import save_peft_adapter
from fedsim.lora.state import ServerState
from fedsim.models.base import BaseModel, build_base
from fedsim.models.merged import save_merged_model
from fedsim.server.checkpoint import load_checkpoint, prune_checkpoints
from fedsim.server.early_stopping import why_stopped
from fedsim.server.run import Run
from fedsim.simulation.records import Records
from fedsim.tracking.wandb_run import Tracker

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
CLIENT_ADAPTERS = "adapters"
MODEL = "model"


def finish_run(
    config: Config, run: Run, base: BaseModel, state: ServerState, records: Records, tracker: Tracker
) -> None:
    """Export what was trained and close the records."""
    path = records.folder.path
    records.settle(run.store, [state])
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
