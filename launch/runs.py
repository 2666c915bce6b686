"""What the launcher reads from a run folder: how far the run came, and whether this configuration may run there."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout

from fedsim.config.loader import SAFE_KEYS, differences, load_config
from fedsim.config.paths import local_path
from fedsim.config.schema import Config
from fedsim.errors import RunFolderError
from fedsim.locks import file_lock

FINISHED = "finished"

OURS = {"slurm", "logs", "stop", "run.lock", "run.owner.json"}
"""What a run folder may hold before the run has written its `config.yaml`."""


@dataclass(frozen=True)
class RunState:
    """What a run folder says about its run.

    Attributes:
        status: `running`, `finished`, `preempted` or `failed`; None before the first start.
        reason: why it did not finish, where it is known.
        round: rounds that are in the record or in a checkpoint.
        rounds: rounds that were asked for; None where the folder does not say.
        patience: `early_stopping.patience` that was asked for; None where the folder does not say.
    """

    status: str | None
    reason: str | None
    round: int
    rounds: int | None
    patience: int | None = None

    def is_finished(self, config: Config) -> bool:
        """Whether the run has ended well and, as far as its folder tells, would not go on if asked for this.

        A run that stopped early may go on with more patience; whether it does, fedsim finds out itself.
        """
        if self.status != FINISHED or max(self.rounds or 0, self.round) < config.run.rounds:
            return False
        stopped_early = self.round < config.run.rounds and config.early_stopping.metric != "off"
        return not stopped_early or self.patience is None or config.early_stopping.patience <= self.patience


def run_folder(config: Config) -> Path:
    """The folder of a run, absolute."""
    return (local_path(config.run.output_dir) / config.run.name).absolute()


def read_run(folder: Path) -> RunState:
    """What `folder` says; a folder that is absent, or half-written, says little."""
    record = _read_json(folder / "run.json")
    rounds = _asked_for(record, "run", "rounds")
    if rounds is None:
        rounds = _asked_for({"config": _newest_submitted_tree(folder)}, "run", "rounds")
    status, reason = record.get("status"), record.get("reason")
    return RunState(
        status if isinstance(status, str) else None,
        reason if isinstance(reason, str) else None,
        max(_rounds_recorded(folder), _newest_checkpoint(folder)),
        rounds,
        _asked_for(record, "early_stopping", "patience"),
    )


def refuse_unusable(config: Config, patience_s: float = 0) -> RunState:
    """What the run's folder says, if the run may start there.

    Args:
        config: of the run.
        patience_s: how long to wait for a process that uses the folder, such as the last of a job that was requeued.

    Raises:
        RunFolderError: a process uses the folder, it holds something else, or a run with another configuration.
    """
    folder = run_folder(config)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"run folder {folder} must be a folder, and is a file; choose another run.name")
    _refuse_foreign(folder)
    deadline = time.monotonic() + patience_s
    while is_in_use(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    _refuse_in_use(folder)
    state = read_run(folder)
    if state.round:
        _refuse_other_config(folder, config)
    return state


def is_in_use(folder: Path) -> bool:
    """Whether a process holds the folder's lock, as far as this machine can see."""
    lock = folder / "run.lock"
    if not lock.exists():
        return False
    try:
        with file_lock(lock, timeout_s=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def _refuse_in_use(folder: Path) -> None:
    if is_in_use(folder):
        owner = _read_json(folder / "run.owner.json")
        who = (
            f"host {owner['host']}, pid {owner['pid']}"
            if {"host", "pid"} <= set(owner)
            else "another process"
        )
        raise RunFolderError(
            f"run folder {folder} is in use ({who}); wait for it, stop it, or choose another run.name"
        )


def _refuse_foreign(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(name for name in names - OURS if not name.startswith("."))
    if foreign and "config.yaml" not in names:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise RunFolderError(
            f"run folder {folder} must be new, empty or that of a run, and holds {shown} but no config.yaml; "
            "choose another run.name"
        )


def _refuse_other_config(folder: Path, config: Config) -> None:
    path = folder / "config.yaml"
    if not path.exists():
        return
    changed = differences(load_config(path), config, SAFE_KEYS)
    if changed:
        raise RunFolderError(
            f"run folder {folder} belongs to a run with another configuration ({'; '.join(changed)}); "
            "choose another run.name, or delete the folder"
        )


def _rounds_recorded(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
        return int(json.loads(lines[-1])["round_index"]) + 1
    except (OSError, IndexError, KeyError, TypeError, ValueError):
        return 0


def _newest_checkpoint(folder: Path) -> int:
    names = [path.name.removeprefix("round_") for path in folder.glob("checkpoints/round_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _newest_submitted_tree(folder: Path) -> Any:
    """The configuration that was submitted last, as a tree."""
    paths = sorted(folder.glob("slurm/[0-9]*/config.yaml"))
    try:
        return yaml.safe_load(paths[-1].read_text(encoding="utf-8")) if paths else None
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _asked_for(record: Mapping[str, Any], section: str, key: str) -> int | None:
    """A whole number of the configuration in a record."""
    node: Any = record
    for name in ("config", section, key):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, int) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
