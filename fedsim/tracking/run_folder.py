"""The folder of one run: who may use it, which run it belongs to, and how far that run came.

config.yaml      the resolved configuration
run.json         status, times, versions, hardware
run.lock         held while a process uses the folder; run.owner.json says which process
"""

import errno
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import BaseFileLock, Timeout

from fedsim.atomic import remove_unfinished, write_text_atomic
from fedsim.config.keys import flatten
from fedsim.config.yaml_text import read_yaml
from fedsim.errors import ConfigError, RunFolderError
from fedsim.locks import NoLocksError, take_lock

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
OWNER_FILE = "run.owner.json"

LARGEST_CONFIG_BYTES = 1 << 20

BEFORE_A_RUN = frozenset({LOCK_FILE, OWNER_FILE, "slurm", "logs", "stop"})
"""What a folder may hold before its run has written anything: the launcher's files, and a request to stop."""

EndStatus = Literal["finished", "preempted", "failed"]

LONGEST_SHOWN = 200

VANISHED = "ended without a word: killed, or its machine was lost"


class RunFolder:
    """A run folder that this process holds until `close`.

    Attributes:
        path: the folder, absolute.
        started: whether `start` was called.
    """

    def __init__(
        self, path: Path, config_tree: Mapping[str, Any], config_yaml: str, lock: BaseFileLock
    ) -> None:
        self.path = path
        self.started = False
        self._config_tree = config_tree
        self._config_yaml = config_yaml
        self._lock = lock
        self._identity = _identity(path)

    def check_held(self) -> None:
        """Check that the folder of this name is still the one that this process holds.

        Raises:
            RunFolderError: it was deleted or moved; perhaps another one, which somebody else holds, is in its place.
        """
        if not self._is_held():
            raise RunFolderError(
                f"run folder {self.path} must stay where it is while a run uses it, and was deleted or moved; put it "
                "back, or start again"
            )

    def status(self) -> str | None:
        """`running`, `finished`, `preempted` or `failed`; None before the first `start`.

        A run that is `running` here was cut off: nobody else can hold the folder now.
        """
        return self._read_run_file().get("status")

    def recorded(self, name: str) -> Any:
        """What the last `start` was given under this name in `info`; None if there was none."""
        return self._read_run_file().get(name)

    def start(self, info: Mapping[str, Any]) -> None:
        """Write `config.yaml`, and `run.json`: status `running`, the start time, `info` and the configuration.

        Deletes what earlier starts left half-written. Starts before this one are kept under `history`, oldest first.

        Args:
            info: JSON-like values, as from `describe_environment`.
        """
        before = self._read_run_file()
        history = before.get("history", [])
        if before:
            history = [*history, _history_entry(before)]
        for folder in (self.path, *(self.path / name for name in ("checkpoints", "adapters", "wandb"))):
            remove_unfinished(folder)
        write_text_atomic(self.path / CONFIG_FILE, self._config_yaml)
        started = {
            "status": "running",
            "reason": None,
            "user_error": None,
            "start_time": _now(),
            "end_time": None,
        }
        self._write_run_file({**started, **info, "config": self._config_tree, "history": history})
        self.started = True

    def finish(
        self,
        status: EndStatus,
        reason: str | None = None,
        info: Mapping[str, Any] | None = None,
        *,
        user_error: bool | None = None,
    ) -> None:
        """Write how the run ended into `run.json`, with the time.

        Args:
            status: how.
            reason: why, unless all rounds are done.
            info: further entries, JSON-like.
            user_error: of a run that failed, whether the same command would fail again until the user mends something.

        Raises:
            RunFolderError: it cannot be written, or the folder is no longer ours.
        """
        self.check_held()
        before = self._read_run_file()
        if before and not self.started:  # this start has ended before `start`; the one before it stays known
            history = [*before.get("history", []), _history_entry(before)]
            before = {**before, "start_time": None, "history": history}
        ended = {"status": status, "reason": reason, "user_error": user_error, "end_time": _now()}
        self._write_run_file({**before, **(info or {}), **ended})

    def close(self) -> None:
        """Let others use the folder. May be called twice."""
        if self._lock.is_locked:
            if self._is_held():
                (self.path / OWNER_FILE).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_held(self) -> bool:
        try:
            return _identity(self.path) == self._identity
        except OSError:
            return False

    def _read_run_file(self) -> dict[str, Any]:
        path = self.path / RUN_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(
                f"{path} must be readable JSON ({error}); delete the file and start again"
            ) from error
        if not isinstance(content, dict):
            raise RunFolderError(
                f"{path} must hold a JSON object, got {type(content).__name__}; delete the file"
            )
        if not isinstance(content.get("history", []), list):
            raise RunFolderError(f"{path} must hold a list under history; restore the file or delete it")
        return content

    def _write_run_file(self, content: Mapping[str, Any]) -> None:
        write_text_atomic(self.path / RUN_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def check_new_folder(path: Path) -> None:
    """Refuse what `open_run_folder` would refuse for a run that has no folder yet, and leave nothing behind.

    Raises:
        RunFolderError: the folder cannot be made or written, or holds something else than a run.
    """
    path = path.absolute()
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is a file")
        # by trying: permissions alone do not tell, least of all root
        trial = nearest / f".fedsim-{secrets.token_hex(4)}"
        trial.mkdir()
        trial.rmdir()
        if nearest == path:
            _refuse_foreign_folder(path)
    except OSError as error:
        raise _not_writable(path, error) from error


def check_run_folder(
    path: Path,
    config_yaml: str,
    safe_keys: Sequence[str],
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> None:
    """Refuse what `open_run_folder` would refuse, but for a folder in use, and leave nothing behind.

    Raises:
        RunFolderError: see `check_new_folder`; or it belongs to a run with another configuration.
    """
    check_new_folder(path)
    if path.is_dir() and _has_results(path):
        _refuse_other_config(path, config_yaml, safe_keys, complete)


def open_run_folder(
    path: Path,
    config_tree: Mapping[str, Any],
    config_yaml: str,
    safe_keys: Sequence[str],
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> RunFolder:
    """Create the folder of a run, or enter the one this run has written before, and take its lock.

    A folder whose run ended before its first round was recorded has nothing to lose: it is taken over, whatever its
    configuration was. One with results keeps its files as they are until `RunFolder.start`.

    Args:
        path: the folder, `run.output_dir` / `run.name`.
        config_tree: the resolved configuration as nested dictionaries.
        config_yaml: the same as the text of `config.yaml`.
        safe_keys: dotted keys that may differ from those of an earlier start; a node stands for all below it.
        complete: puts keys into the tree of an earlier start that it lacks, because an older fedsim wrote it.

    Raises:
        RunFolderError: the folder cannot be written, is in use, holds something else than a run, or belongs
            to a run with another configuration. In the last two cases no file of it is changed.
    """
    path = path.absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign_folder(path)
    except OSError as error:
        raise _not_writable(path, error) from error
    lock = _take_lock(path)
    try:
        tree: dict[str, Any] = json.loads(json.dumps(config_tree))  # tuples become lists, as in the file
        if _has_results(path):
            _refuse_other_config(path, config_yaml, safe_keys, complete)
        else:
            write_text_atomic(path / CONFIG_FILE, config_yaml)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        write_text_atomic(path / OWNER_FILE, json.dumps(owner) + "\n")
    except BaseException:
        lock.release()
        raise
    return RunFolder(path, tree, config_yaml, lock)


def _not_writable(path: Path, error: OSError) -> RunFolderError:
    reason = error.strerror or error
    return RunFolderError(
        f"run.output_dir must be writable, and the run folder {path} is not ({reason}); "
        "set run.output_dir or run.name to another"
    )


def _refuse_foreign_folder(path: Path) -> None:
    """A folder without `config.yaml` may hold nothing but what a start that was cut off leaves there."""
    names = {entry.name for entry in path.iterdir()}
    foreign = sorted(name for name in names - BEFORE_A_RUN if not name.startswith(f".{CONFIG_FILE}-"))
    if CONFIG_FILE not in names and foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise RunFolderError(
            f"run folder {path} must be new, empty or that of a run, and holds {shown} but no {CONFIG_FILE}; "
            "choose another run.name"
        )


def _take_lock(path: Path) -> BaseFileLock:
    try:
        return take_lock(path / LOCK_FILE, timeout_s=0)
    except Timeout as error:
        raise RunFolderError(
            f"run folder {path} is in use by another process ({_owner(path)}); "
            "wait for it or choose another run.name"
        ) from error
    except NoLocksError as error:
        raise RunFolderError(
            f"run.output_dir must be on a file system with file locks (flock), and that of {path} has none; choose "
            "another run.output_dir"
        ) from error
    except OSError as error:
        raise _not_writable(path, error) from error


def _identity(path: Path) -> tuple[int, int]:
    """That of the lock file, which no other file takes on while we hold it open."""
    found = (path / LOCK_FILE).stat()
    return found.st_dev, found.st_ino


def _owner(path: Path) -> str:
    try:
        owner = json.loads((path / OWNER_FILE).read_text(encoding="utf-8"))
        return f"host {owner['host']}, pid {owner['pid']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which has just started"


def _has_results(path: Path) -> bool:
    metrics = path / "metrics.jsonl"
    return (path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)


def _refuse_other_config(
    path: Path,
    config_yaml: str,
    safe_keys: Sequence[str],
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> None:
    tree = _read_config(path / CONFIG_FILE)
    if not tree:
        return
    # both through the same reader and the same completion, so that equal text is an equal value
    before, now = flatten(complete(tree)), flatten(complete(read_yaml(config_yaml, "the configuration")))
    changed = [
        f"{key}: {_shown(before, key)} -> {_shown(now, key)}"
        for key in [*before, *(key for key in now if key not in before)]
        if _differ(before, now, key)
        and not any(key == safe or key.startswith(f"{safe}.") for safe in safe_keys)
    ]
    if changed:
        raise RunFolderError(
            f"run folder {path} belongs to a run with another configuration ({'; '.join(changed)}); "
            "choose another run.name, or delete the folder"
        )


def _read_config(path: Path) -> Mapping[str, Any]:
    """The tree in the file; empty where there is no file."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_CONFIG_BYTES + 1)
        if len(raw) > LARGEST_CONFIG_BYTES:
            raise ValueError(f"longer than {LARGEST_CONFIG_BYTES} bytes")
        tree = read_yaml(raw.decode("utf-8"), path.name)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise RunFolderError(f"{path} must be readable YAML ({reason}); delete the run folder") from error
    if not isinstance(tree, dict) or not tree:
        raise RunFolderError(f"{path} must hold a configuration tree; delete the run folder")
    return tree


def _shown(flat: Mapping[str, Any], key: str) -> str:
    text = str(flat.get(key, "not set"))
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _differ(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    return (key in before) != (key in now) or before.get(key) != now.get(key)


def _history_entry(run: Mapping[str, Any]) -> dict[str, Any]:
    entry = {name: run.get(name) for name in ("status", "reason", "start_time", "end_time", "world_size")}
    if entry["status"] == "running":
        entry.update(status="failed", reason=VANISHED)
    return entry


def _now() -> str:
    """The time in UTC, to the second, as in 2025-01-31T23:59:59+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")
