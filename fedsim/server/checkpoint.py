"""Checkpoints: the server's state between two rounds, on disk whole or not at all."""

import hashlib
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsim.atomic import replace_folder
from fedsim.errors import CheckpointError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import BestSoFar, ServerState

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
STATE_FILE = "state.json"
TENSORS_FILE = "state.safetensors"


def save_checkpoint(state: ServerState, folder: Path, keep_last: int) -> Path:
    """Write `round_NNNNNN`, named after the rounds completed, below `folder`; then drop all but the newest `keep_last`.

    The best state that one of these knows of (`ServerState.best`) is kept as well.

    Raises:
        CheckpointError: the disk does not take it.
    """
    from safetensors.torch import save

    named = state.adapters()
    tensors = {
        f"{name}|{module}|{side}": getattr(factors, side).detach().cpu().contiguous()
        for name, adapter in named.items()
        for module, factors in adapter.items()
        for side in ("A", "B")
    }
    data = save(tensors)
    description = {
        "format_version": FORMAT_VERSION,
        "round_index": state.round_index,
        "adapters": {
            name: {module: factors.scaling for module, factors in adapter.items()}
            for name, adapter in named.items()
        },
        "client_versions": {str(client): version for client, version in state.client_versions.items()},
        "best": None if state.best is None else asdict(state.best),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }

    def build(unfinished: Path) -> None:
        (unfinished / TENSORS_FILE).write_bytes(data)
        (unfinished / STATE_FILE).write_text(json.dumps(description, indent=1), encoding="utf-8")

    target = checkpoint_path(folder, state.round_index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_folder(target, build)
        found = list_checkpoints(folder)
        best = {
            checkpoint_path(folder, known.rounds)
            for path in found[-keep_last:]
            if (known := saved_best(path))
        }
        for old in found[:-keep_last]:
            if old not in best:
                shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {error.strerror or error}") from error
    return target


def checkpoint_path(folder: Path, rounds: int) -> Path:
    """The checkpoint of the state after so many rounds."""
    return folder / f"round_{rounds:06d}"


def saved_best(path: Path) -> BestSoFar | None:
    """The best state that a checkpoint knows of; None if it knows of none, or is damaged."""
    try:
        return _best(json.loads((path / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("checkpoint %s is damaged (%s)", path, error)
        return None


def load_checkpoint(folder: Path, rounds: int) -> ServerState:
    """The state after so many rounds, on the CPU.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = checkpoint_path(folder, rounds)
    try:
        return _load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} must be readable, since it holds the best state so far, and is not ({error}); get it "
            "back, or start again with early_stopping.export=last"
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("round_[0-9]*") if path.is_dir())


def load_newest_checkpoint(folder: Path) -> ServerState | None:
    """The newest readable checkpoint, on the CPU; None if there is none at all.

    A damaged newest checkpoint is reported and the one before it is used.

    Raises:
        CheckpointError: there are checkpoints, but none is readable, or the newest is of a later fedsim.
    """
    found = list_checkpoints(folder)
    problems = []
    for path in reversed(found):
        try:
            return _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(f"{path.name}: {error}")
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
    if found:
        raise CheckpointError(
            f"no checkpoint in {folder} is readable ({'; '.join(problems)}); delete the folder to start again"
        )
    return None


def _load(path: Path) -> ServerState:
    from safetensors import SafetensorError
    from safetensors.torch import load

    description: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if description["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} must have format version {FORMAT_VERSION}, got {description['format_version']}; "
            "go on with the fedsim version that wrote it"
        )
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
                module: LoraFactors(tensors[f"{name}|{module}|A"], tensors[f"{name}|{module}|B"], scaling)
                for module, scaling in modules.items()
            }
        )
        for name, modules in description["adapters"].items()
    }
    return ServerState(
        description["round_index"],
        AdapterState({}),
        client_versions=_client_versions(description),
        best=_best(description),
    ).with_adapters(adapters)


def kept_client_versions(folder: Path) -> list[dict[int, int]]:
    """Client -> version of its own state, of each readable checkpoint below `folder`."""
    kept = []
    for path in list_checkpoints(folder):
        try:
            kept.append(_client_versions(json.loads((path / STATE_FILE).read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("checkpoint %s is damaged (%s)", path, error)
    return kept


def _client_versions(description: dict[str, Any]) -> dict[int, int]:
    return {int(client): int(version) for client, version in description["client_versions"].items()}


def _best(description: dict[str, Any]) -> BestSoFar | None:
    best = description.get("best")
    return None if best is None else BestSoFar(float(best["score"]), int(best["rounds"]), int(best["waited"]))
