"""Checkpoints: the server's state between two rounds, on disk whole or not at all.

A checkpoint is a folder `round_NNNNNN`, named after the rounds completed, with two files. `state.safetensors` holds the
factors. `state.json` holds the rest, the SHA-256 of the other file, and one of itself: of its own values but `sha256`,
as `_digest` writes them. That rule is the same in every format version, so that a checkpoint of a later fedsim can be
told from a damaged one.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsim.atomic import remove_folder, replace_folder
from fedsim.errors import AdapterError, CheckpointError, RunFolderError, UnreadableError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import BestSoFar, ServerState

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
WITHOUT_DIGEST = 2
"""The last format whose `state.json` has no checksum of itself; it is still read."""

STATE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"

LARGEST_INTEGER = 2**63
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, AdapterError)
"""What reading a file raises that is not what it was; `reading` sets errors of a disk that does not answer apart."""
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class _NewerFormatError(CheckpointError):
    """Whole, and written by a later fedsim: not to be passed over."""


def save_checkpoint(
    state: ServerState,
    folder: Path,
    keep_last: int,
    *,
    make_folder: bool = True,
) -> Path:
    """Write the checkpoint of `state` below `folder`; then drop what `prune_checkpoints` drops.

    Args:
        state: after as many rounds as it says.
        folder: of the checkpoints.
        keep_last: how many of the newest stay.
        make_folder: make `folder` if it is not there. The folder that it is in is never made: it was there.

    The best state that one of these knows of (`ServerState.best`) is kept as well.

    Raises:
        CheckpointError: the disk does not take it. The checkpoints that were there are as they were.
    """
    from safetensors.torch import save

    named = state.adapters()
    data = save(
        {
            f"{name}|{module}|{side}": getattr(factors, side).detach().cpu().contiguous()
            for name, adapter in named.items()
            for module, factors in adapter.items()
            for side in ("A", "B")
        },
        metadata={"holds": "server state"},  # a client's file of format version 2 says nothing of itself
    )
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "round_index": state.round_index,
        "adapters": {
            name: {module: factors.scaling for module, factors in adapter.items()}
            for name, adapter in named.items()
        },
        "simulated_s": state.simulated_s,
        "client_versions": {str(client): version for client, version in state.client_versions.items()},
        "best": None if state.best is None else asdict(state.best),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    description["sha256"] = _digest(description)

    def build(unfinished: Path) -> None:
        (unfinished / TENSORS_FILE).write_bytes(data)
        (unfinished / STATE_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")

    target = checkpoint_path(folder, state.round_index)
    try:
        if make_folder:
            folder.mkdir(exist_ok=True)
        replace_folder(target, build)
        prune_checkpoints(folder, keep_last)
    except (OSError, RunFolderError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write the checkpoint {target}: {reason}") from error
    return target


def checkpoint_path(folder: Path, rounds: int) -> Path:
    """The checkpoint of the state after so many rounds."""
    return folder / f"round_{rounds:06d}"


def saved_best(path: Path) -> BestSoFar | None:
    """The best state that a checkpoint knows of; None if it knows of none, or is damaged.

    Raises:
        UnreadableError: it cannot be read now.
    """
    try:
        return _best(_read_description(path))
    except (*DAMAGE, _NewerFormatError) as error:
        logger.warning("checkpoint %s is damaged (%s)", path, _one_line(error))
        return None


def load_checkpoint(folder: Path, rounds: int) -> ServerState:
    """The state after so many rounds, on the CPU.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = checkpoint_path(folder, rounds)
    try:
        return _load(path)
    except DAMAGE as error:
        raise CheckpointError(
            f"checkpoint {path} must be readable, since it holds the best state so far, and is not "
            f"({_one_line(error)}); get it back, or start again with early_stopping.export=last"
        ) from error


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all checkpoints but the newest `keep_last`, and those of the best states that these know of.

    Where one of the newest cannot be read now, all stay for this time.

    Raises:
        RunFolderError: one cannot be deleted.
    """
    checkpoints = list_checkpoints(folder)
    try:
        best = {known.rounds for path in checkpoints[-keep_last:] if (known := saved_best(path)) is not None}
    except UnreadableError as error:
        logger.warning("no older checkpoint is deleted this time: %s", error)
        return
    for path in checkpoints[:-keep_last]:
        if rounds_completed(path) not in best:
            remove_folder(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints below `folder`, oldest first."""
    found = [path for path in folder.glob("round_*") if re.fullmatch(r"round_[0-9]{6,18}", path.name)]
    return sorted((path for path in found if path.is_dir()), key=rounds_completed)


def rounds_completed(checkpoint: Path) -> int:
    """How many rounds were completed when a checkpoint of `list_checkpoints` was written."""
    return int(checkpoint.name.removeprefix("round_"))


def load_newest_checkpoint(
    folder: Path,
    recorded_rounds: int | None = None,
    check: Callable[[ServerState], object] = lambda _: None,
) -> ServerState | None:
    """The newest checkpoint that a run can go on from, on the CPU; None if there is none at all.

    A damaged one is reported, and the one before it is used; so is one after rounds that the record does not hold, and
    one that `check` refuses. One that is there and cannot be read now is not passed over: it may be whole.

    Args:
        folder: of the checkpoints.
        recorded_rounds: rounds in the record of the run, from the first on; None: not to be looked at.
        check: raises a `CheckpointError` for a state that cannot be gone on from.

    Raises:
        CheckpointError: there are checkpoints, but none is readable, or the newest whole one is of a later fedsim.
        UnreadableError: a file of the newest one cannot be read now.
    """
    found = list_checkpoints(folder)
    problems = []
    for path in reversed(found):
        try:
            state = _load(path)
            if recorded_rounds is not None and state.round_index > recorded_rounds:
                raise ValueError(
                    f"the record of the run, metrics.jsonl and clients.parquet, is whole up to round "
                    f"{recorded_rounds} only"
                )
            check(state)
        except (_NewerFormatError, UnreadableError):
            raise
        except (*DAMAGE, CheckpointError) as error:
            problems.append(f"{path.name}: {_one_line(error)}")
            logger.warning("checkpoint %s cannot be used (%s); trying the one before", path, _one_line(error))
        else:
            return state
    if found:
        raise CheckpointError(
            f"no checkpoint in {folder} is readable ({'; '.join(problems)}); restore one, or delete the run folder to "
            "start again"
        )
    return None


def kept_client_versions(folder: Path) -> list[dict[int, int]] | None:
    """Client -> version of its own state, of each whole checkpoint below `folder`.

    None where one cannot be read now: nobody knows what it needs, so nothing may be deleted.
    """
    kept = []
    for path in list_checkpoints(folder):
        try:
            kept.append(_client_versions(_read_description(path)))
        except UnreadableError as error:
            logger.warning("no client's state is deleted this time: %s", error)
            return None
        except (*DAMAGE, _NewerFormatError) as error:
            logger.warning("checkpoint %s is damaged (%s)", path, _one_line(error))
    return kept


class CheckpointWriter:
    """Writes checkpoints one after another in a thread of its own, so that a round need not wait for the disk.

    A state of 133 MB takes 1.7 s on a virtual disk: 0.5 s to serialize, 0.2 s for the checksum, the rest to write and
    force out. One checkpoint at most is under way: the next one waits for it, and raises what went wrong with it. So
    the newest one on the disk is never older than the one before that which is under way.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._began = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[Path] | None = None

    def save(self, state: ServerState, keep_last: int) -> None:
        """As `save_checkpoint`, begun. Nobody may write into the tensors of `state`.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self.wait()
        on_cpu = state.to("cpu")
        # the folder is made once: a run whose folder is moved away meanwhile makes none in what takes its place
        self._under_way = self._thread.submit(
            save_checkpoint,
            on_cpu,
            self._folder,
            keep_last,
            make_folder=not self._began,
        )
        self._began = True

    def wait(self) -> None:
        """Until the checkpoint that is under way, if any, is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Let what is under way end, well or not. May be called twice."""
        self._thread.shutdown()


def _load(path: Path) -> ServerState:
    from safetensors import SafetensorError
    from safetensors.torch import load

    description = _read_description(path)
    with reading(path / TENSORS_FILE):
        data = (path / TENSORS_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != description["tensors_sha256"]:
        raise ValueError(f"{TENSORS_FILE} does not have its checksum")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    adapters = {
        name: AdapterState(
            {
                module: LoraFactors(
                    tensors[f"{name}|{module}|A"], tensors[f"{name}|{module}|B"], _scaling(scaling)
                )
                for module, scaling in modules.items()
            }
        )
        for name, modules in description["adapters"].items()
    }
    return ServerState(
        description["round_index"],
        AdapterState({}),
        client_versions=_client_versions(description),
        simulated_s=description.get("simulated_s", 0.0),  # absent before there was a clock
        best=_best(description),
    ).with_adapters(adapters)


def _read_description(path: Path) -> Mapping[str, Any]:
    """The content of `state.json`, which belongs to the folder `path` and is as it was written."""
    with reading(path / STATE_FILE):
        data = (path / STATE_FILE).read_bytes()
    description = json.loads(data)
    if not isinstance(description, dict):
        raise ValueError(f"{STATE_FILE} holds no JSON object")
    version = description.get("format_version")
    if version != WITHOUT_DIGEST or "sha256" in description:
        digest = description.pop("sha256", None)
        if digest != _digest(description):
            raise ValueError(f"{STATE_FILE} does not have its checksum")
        if version != FORMAT_VERSION:
            raise _NewerFormatError(
                f"{path} must have format version {FORMAT_VERSION} or {WITHOUT_DIGEST}, got {version}; go on with the "
                "fedsim version that wrote it"
            )
    if description["round_index"] != rounds_completed(path):
        raise ValueError(f"it holds the state after {description['round_index']} rounds")
    return description


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block a file is read of which something is concluded if it is damaged.

    Raises:
        UnreadableError: it is there and cannot be read, as over a network that is down.
    """
    try:
        yield
    except ABSENT:
        raise
    except OSError as error:
        raise UnreadableError(
            f"{path} is there and cannot be read ({error.strerror or error}); start again when it can, or delete it "
            "if it is lost"
        ) from error


def _digest(description: Mapping[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _scaling(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a scaling must be a finite number, got {value!r}")
    return value


def _client_versions(description: Mapping[str, Any]) -> dict[int, int]:
    versions = {int(client): int(version) for client, version in description["client_versions"].items()}
    if not all(0 <= number < LARGEST_INTEGER for pair in versions.items() for number in pair):
        raise ValueError("a client and its version must be integers in [0, 2**63)")
    return versions


def _best(description: Mapping[str, Any]) -> BestSoFar | None:
    best = description.get("best")
    if best is None:
        return None
    found = BestSoFar(float(best["score"]), int(best["rounds"]), int(best["waited"]))
    if not math.isfinite(found.score) or not (
        0 <= found.rounds < 10**18 and 0 <= found.waited < LARGEST_INTEGER
    ):
        raise ValueError(f"the best state so far must have a finite score and counts >= 0, got {best!r}")
    return found


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text[:297]}..." if len(text) > 300 else text or type(error).__name__
