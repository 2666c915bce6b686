"""What rank 0 writes of a run: its folder, the records of its rounds, its checkpoints; and how it goes on from them."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.atomic import remove_folder
from fedsim.config.loader import SAFE_KEYS, complete_tree, to_tree, to_yaml
from fedsim.config.paths import is_there, local_path
from fedsim.config.schema import Config
from fedsim.errors import CheckpointError, RunFolderError, is_user_error
from fedsim.lora.state import ServerState
from fedsim.server.build_tests import build_stopping_rule
from fedsim.server.checkpoint import (
    CheckpointWriter,
    kept_client_versions,
    list_checkpoints,
    load_newest_checkpoint,
    rounds_completed,
    saved_best,
)
from fedsim.server.client_store import ClientStore
from fedsim.stopping import Preempted
from fedsim.tracking.metrics import ClientTable, MetricsLog, whole_rounds
from fedsim.tracking.run_folder import RunFolder, check_new_folder, check_run_folder, open_run_folder

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


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
                "data.source, data.partition.name or model.name_or_path stands for has changed since; choose another "
                "run.name"
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

    def settle(self, store: ClientStore, states: Sequence[ServerState]) -> None:
        """Before anything is recorded: the checkpoint under way is on the disk, and of the clients' states no version
        is kept that neither a checkpoint needs nor one of `states`, which may yet be saved.
        """
        self.folder.check_held()
        self.writer.wait()
        if any(state.client_versions for state in states):  # else no checkpoint need be read again
            kept = kept_client_versions(self.checkpoints)
            if kept is not None:
                store.drop_superseded([*kept, *(state.client_versions for state in states)])


def folder_path(config: Config) -> Path:
    """The run folder."""
    return local_path(config.run.output_dir) / config.run.name


def check_folder(config: Config) -> None:
    """Check that the run could open its folder, and write nothing.

    Raises:
        RunFolderError: it could not.
    """
    check_run_folder(folder_path(config), to_yaml(config), _safe_keys(), complete_tree)


def open_existing(config: Config, open_things: contextlib.ExitStack) -> Records | None:
    """The records of an earlier start of this run; None, with nothing written, if there was none."""
    path = folder_path(config)
    if not is_there(path / "config.yaml"):
        check_new_folder(path)
        return None
    return open_records(config, open_things)


def _safe_keys() -> list[str]:
    return [key.removesuffix(".*") for key in SAFE_KEYS]


def open_records(config: Config, open_things: contextlib.ExitStack) -> Records:
    """The records in the run folder, made if it is not there; held until `open_things` is closed.

    Raises:
        RunFolderError: the folder belongs to another configuration, is in use, or cannot be written.
    """
    folder = open_run_folder(
        folder_path(config), to_tree(config), to_yaml(config), _safe_keys(), complete_tree
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


def record_end(records: Records, error: BaseException) -> None:
    """Write how a run ended that did not finish."""
    if isinstance(error, Preempted):
        records.folder.finish("preempted", str(error))
        return
    reason = "interrupted by the user" if isinstance(error, KeyboardInterrupt) else str(error)
    records.folder.finish("failed", f"{type(error).__name__}: {reason}", user_error=is_user_error(error))
