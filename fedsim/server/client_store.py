"""What belongs to single clients and outlives a round: on disk, one file for each client and version.

A client's state is read by the process that trains it and written by it again, so that only the clients of a round are
ever in memory, whatever their number. A file is never changed: a round writes new versions beside the old ones, and the
server's state says which version of a client counts. A checkpoint therefore holds client -> version and copies nothing;
going back to it, on any number of processes, finds the files as they were. Versions that no checkpoint needs any more
are deleted. A file says in its header whose it is, and has a checksum of that and of its tensors.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fedsim.atomic import remove_unfinished, replace_file
from fedsim.comm.agree import all_or_none
from fedsim.comm.group import Group
from fedsim.errors import CheckpointError, RunFolderError
from fedsim.lora.plan import NO_STATE, ClientState
from fedsim.server.checkpoint import reading

logger = logging.getLogger(__name__)

CLIENTS_PER_FOLDER = 1000
CHECKSUM = "sha256"

_NAME = re.compile(r"client_(\d+)_round_(\d+)\.safetensors")


class ClientStore:
    """The clients' files below one folder, which all processes share.

    Args:
        folder: need not exist before the first `save`, but the folder it is in must.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._superseded: set[tuple[int, int]] = set()

    def load(self, client_id: int, versions: Mapping[int, int]) -> ClientState:
        """A client's state, on the CPU; empty if it has none.

        Args:
            client_id: whose.
            versions: client -> round that wrote the version that counts.

        Raises:
            CheckpointError: the file is missing or damaged.
            UnreadableError: it cannot be read now.
        """
        if client_id not in versions:
            return NO_STATE
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(client_id, versions[client_id])
        try:
            with reading(path):
                data = path.read_bytes()
            state: ClientState = load(data)
            if _checksum_in(data) not in (None, _checksum(client_id, versions[client_id], state)):
                raise ValueError("it does not have its checksum")
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} must hold the state of client {client_id}, and cannot be read ({error}); restore it, or "
                "delete the newest checkpoint to go on from the one before"
            ) from error
        return state

    def check(self, versions: Mapping[int, int]) -> None:
        """Read every client's state once, so that a damaged one shows before a run goes on and not at its end.

        Raises:
            CheckpointError: a file is missing, damaged, or cannot be read now.
        """
        for client_id in sorted(versions):
            self.load(client_id, versions)

    def save(self, client_id: int, round_index: int, state: ClientState) -> None:
        """Write the version of a round; on the disk when this returns.

        Raises:
            RunFolderError: the file cannot be written.
        """
        from safetensors.torch import save

        path = self._path(client_id, round_index)
        try:
            self._folder.mkdir(exist_ok=True)  # not its parents: a run folder that is gone is not made anew
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"{path.parent} must be writable ({error.strerror or error}); free space there or choose another "
                "run.output_dir"
            ) from error
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        checksum = _checksum(client_id, round_index, tensors)
        replace_file(path, save(tensors, metadata={CHECKSUM: checksum}))

    def supersede(self, client_ids: Iterable[int], versions: Mapping[int, int]) -> None:
        """Remember that these clients' versions no longer count for the state that comes next; for one process only."""
        self._superseded |= {(client, versions[client]) for client in client_ids if client in versions}

    def drop_superseded(self, kept: Iterable[Mapping[int, int]]) -> None:
        """Delete superseded versions that none of the kept checkpoints needs; for one process only."""
        needed = {pair for versions in kept for pair in versions.items()}
        for client_id, round_index in self._superseded - needed:
            _delete(self._path(client_id, round_index))
        self._superseded &= needed

    def drop_unknown(self, kept: Iterable[Mapping[int, int]]) -> None:
        """Delete all versions that none of the kept checkpoints needs; for one process, before a run is resumed."""
        needed = {pair for versions in kept for pair in versions.items()}
        for folder in (self._folder, *self._folder.glob("[0-9]*")):
            remove_unfinished(folder)
        for path in self._folder.glob("*/client_*_round_*.safetensors"):
            match = _NAME.fullmatch(path.name)
            if match and (int(match[1]), int(match[2])) not in needed:
                _delete(path)
            elif match:
                self._superseded.add((int(match[1]), int(match[2])))

    def check_shared(self, group: Group) -> None:
        """Check that all processes see one folder.

        Raises:
            PeerError: some process does not see what rank 0 wrote.
        """
        mark = self._folder / ".shared"
        with all_or_none(group, "opening the clients' states"):
            if group.rank == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                replace_file(mark, b"")
        with all_or_none(group, "opening the clients' states"):
            if not mark.exists():
                raise RunFolderError(
                    f"run.output_dir must be on a file system that all processes share with a strategy that keeps "
                    f"clients' states, and this process does not see {mark}; choose another run.output_dir"
                )

    def _path(self, client_id: int, round_index: int) -> Path:
        folder = self._folder / f"{client_id // CLIENTS_PER_FOLDER:06d}"
        return folder / f"client_{client_id:06d}_round_{round_index:06d}.safetensors"


def _delete(path: Path) -> None:
    """Delete a version that nobody will read; where that fails, it only takes room."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is no longer needed and cannot be deleted (%s)", path, error.strerror or error)


def _checksum(client_id: int, round_index: int, tensors: ClientState) -> str:
    """Of whose state it is, and of names, types, shapes and values."""
    digest = hashlib.sha256(f"{client_id} {round_index}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum_in(data: bytes) -> str | None:
    """What the header of a whole safetensors file says; None in one of format version 2, which says nothing."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    return None if metadata is None else str(metadata.get(CHECKSUM))
