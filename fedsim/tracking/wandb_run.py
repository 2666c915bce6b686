"""The mirror of a run in Weights & Biases. The record itself is the run folder; nothing here stops a run."""

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedsim.atomic import write_text_atomic
from fedsim.config.schema import Config
from fedsim.stopping import EXIT_PREEMPTED
from fedsim.tracking.metrics import ROUND, ClientTable, Scalar
from fedsim.tracking.run_folder import RunFolder

logger = logging.getLogger(__name__)

MAX_TABLE_ROWS = 10_000
"""Rows of the client table in W&B, the newest; the whole table is `clients.parquet`."""

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 120.0


class Tracker(Protocol):
    """Where a run is mirrored to. No method raises."""

    def log_round(self, record: Mapping[str, Scalar]) -> None:
        """The metrics of a round, with its `round_index`."""

    def log_clients(self, table: ClientTable) -> None:
        """The client table, at the end of the run; its newest `MAX_TABLE_ROWS` rows."""

    def log_adapter(self, path: Path) -> None:
        """The folder of the final adapter, if the configuration asks for it."""

    def finish(self, exit_code: int) -> None:
        """The run is over; 0 means that it finished, `EXIT_PREEMPTED` that it is to be resumed."""


class NoTracker:
    """Mirrors nothing."""

    def log_round(self, record: Mapping[str, Scalar]) -> None:
        """Do nothing."""

    def log_clients(self, table: ClientTable) -> None:
        """Do nothing."""

    def log_adapter(self, path: Path) -> None:
        """Do nothing."""

    def finish(self, exit_code: int) -> None:
        """Do nothing."""


def build_tracker(config: Config, folder: RunFolder, config_tree: Mapping[str, Any]) -> Tracker:
    """Start or continue the run in W&B; mode `disabled` does not even import it.

    A run that is resumed in the same folder goes on under the same W&B id.
    """
    node = config.tracking.wandb
    if node.mode == "disabled":
        return NoTracker()
    described = {
        "project": node.project,
        "entity": node.entity,
        "group": node.group,
        "tags": list(node.tags),
        "name": node.name or config.run.name,
        "config": dict(config_tree),
    }
    return WandbTracker(folder.path, described, online=node.mode == "online", adapter_wanted=node.log_adapter)


class WandbTracker:
    """A W&B run whose files are in the folder `wandb` of the run folder.

    Args:
        folder: the run folder, absolute.
        described: project, entity, group, tags, name and config, as `wandb.init` takes them.
        online: upload as the run goes on; without a login or a network, the run is recorded offline.
        adapter_wanted: whether `log_adapter` does anything.
    """

    def __init__(
        self, folder: Path, described: Mapping[str, Any], *, online: bool, adapter_wanted: bool
    ) -> None:
        self._adapter_wanted = adapter_wanted
        self._run: Any = None
        self._variables: list[str] = []  # environment variables set by us
        self._guarded("start", lambda: self._start(folder, described, online))

    def log_round(self, record: Mapping[str, Scalar]) -> None:
        """The metrics of a round; what has no value is left out."""
        self._if_running(
            "log a round", lambda run: run.log({k: v for k, v in record.items() if v is not None})
        )

    def log_clients(self, table: ClientTable) -> None:
        """The newest rows of the client table as a W&B table."""
        self._if_running("log the client table", lambda run: run.log({"clients": _to_wandb_table(table)}))

    def log_adapter(self, path: Path) -> None:
        """The files of the adapter as an artifact of type `model`."""
        if self._adapter_wanted:
            self._if_running("log the adapter", lambda run: run.log_artifact(_to_artifact(run, path)))

    def finish(self, exit_code: int) -> None:
        """Hand everything over; online, wait for the upload up to `FINISH_TIMEOUT_S` seconds."""
        if exit_code == EXIT_PREEMPTED:
            self._if_running("say that it is preempted", lambda run: run.mark_preempting())
        self._if_running("finish", lambda run: run.finish(exit_code=exit_code))
        self._stop()

    def _if_running(self, what: str, call: Callable[[Any], object]) -> None:
        run = self._run
        if run is not None:
            self._guarded(what, lambda: call(run))

    def _guarded(self, what: str, call: Callable[[], object]) -> None:
        """Make a call to W&B; where it fails, warn and mirror nothing from then on.

        Departs from the rule never to catch Exception and go on: W&B brings a service process, a network and
        an account, which fail in ways that it does not list, and hours of training must not end with them.
        Nothing is lost, because all that goes to W&B is in the run folder as well.
        """
        try:
            call()
        except Exception as error:
            logger.warning(
                "W&B failed to %s and is off for the rest of this run; its record is the run folder (%s: %s)",
                what,
                type(error).__name__,
                _one_line(error),
            )
            if isinstance(error, ConnectionError):
                _forget_service()
            self._stop()

    def _stop(self) -> None:
        self._run = None
        for name in self._variables:
            os.environ.pop(name, None)
        self._variables = []

    def _start(self, folder: Path, described: Mapping[str, Any], online: bool) -> None:
        self._set_variables(folder / "wandb")
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True))
        arguments = {
            **described,
            "dir": folder,
            "id": _run_id(folder / "wandb"),
            "resume": "allow",
            "settings": _quiet_settings(wandb),
        }
        run = _init(wandb, online, arguments)
        run.define_metric(ROUND)
        run.define_metric("*", step_metric=ROUND)
        self._run = run

    def _set_variables(self, folder: Path) -> None:
        """Keep W&B's staged files and cache in the run folder: a cluster's home may be small or read-only.

        W&B takes these from the environment alone. What the user has set stands.
        """
        folder.mkdir(exist_ok=True)
        wanted = {
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_ERROR_REPORTING": "false",  # reports on W&B's own errors, which would need a network
        }
        for name, value in wanted.items():
            if name not in os.environ:
                self._variables.append(name)
                os.environ[name] = value


def _init(wandb: Any, online: bool, arguments: Mapping[str, Any]) -> Any:
    """A W&B run; one that cannot go online is recorded offline."""
    if online:
        try:
            # Asked first, because init would wait at a prompt for a key where there is a terminal.
            if wandb.login(prompt=False, verify=False):
                return wandb.init(mode="online", **arguments)
            reason = "there is no login: set WANDB_API_KEY or call `wandb login`"
        except wandb.errors.Error as error:
            reason = _one_line(error)
        logger.warning(
            "tracking.wandb.mode is online and W&B cannot be used (%s); recording offline, "
            "upload later with `wandb sync %s/wandb/offline-run-*`",
            reason,
            arguments["dir"],
        )
        # The service still holds the id of the failed run, and would refuse it below.
        wandb.teardown(exit_code=1)
        wandb.setup(settings=wandb.Settings(silent=True))
    return wandb.init(mode="offline", **arguments)


def _forget_service() -> None:
    """Let go of a service process that has died: what W&B has registered for the exit would fail with a traceback."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown(exit_code=1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _quiet_settings(wandb: Any) -> Any:
    """No console output and no capture of ours; waits that end."""
    return wandb.Settings(
        silent=True,
        quiet=True,
        console="off",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
    )


def _run_id(folder: Path) -> str:
    """The id of this run folder in W&B, drawn at its first start."""
    path = folder / "run_id.txt"
    if path.exists():
        known = path.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):  # W&B makes folders of it
            return known
        logger.warning("%s does not hold an id of W&B; the run gets a new one there", path)
    run_id = secrets.token_hex(4)
    write_text_atomic(path, run_id + "\n")
    return run_id


def _to_wandb_table(table: ClientTable) -> Any:
    import wandb

    newest = table.newest(MAX_TABLE_ROWS)
    columns = newest.column_names
    return wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in newest.to_pylist()])


def _to_artifact(run: Any, path: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(f"adapter-{run.id}", type="model")
    for file in sorted(path.rglob("*")):
        if file.is_file():  # one by one: add_dir writes to the console whatever the settings say
            artifact.add_file(str(file), name=str(file.relative_to(path)))
    return artifact
