"""What belongs to single clients: versions on disk, whatever the number of processes."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedsim.comm.group import Group, SoloGroup
from fedsim.errors import CheckpointError, PeerError, RunFolderError, UnreadableError
from fedsim.lora.factors import AdapterState
from fedsim.lora.state import ServerState
from fedsim.server.checkpoint import save_checkpoint
from fedsim.server.client_store import ClientStore
from tests.helpers import run_ranks


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"B|q_proj|B": torch.full((2, 3), value), "ranks": torch.tensor([4, 2])}


def files(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("client_*"))


def test_versions_are_kept_apart_and_read_back_exactly(tmp_path):
    store = ClientStore(tmp_path / "clients")
    for round_index in (0, 3):
        store.save(17, round_index, tensors(round_index + 0.1))
    store.save(123_456, 3, tensors(7.0))
    for round_index in (0, 3):
        loaded = store.load(17, {17: round_index})
        assert loaded["ranks"].tolist() == [4, 2]
        assert torch.equal(loaded["B|q_proj|B"], torch.full((2, 3), round_index + 0.1))
    assert store.load(5, {17: 3}) == {}, "a client without a version has no state"
    assert (tmp_path / "clients" / "000123" / "client_123456_round_000003.safetensors").exists()


def test_a_resumed_run_drops_what_was_half_written(tmp_path):
    store = ClientStore(tmp_path)
    store.save(1, 0, tensors(1.0))
    for place in (tmp_path, tmp_path / "000000"):
        (place / ".shared-0123abcd").write_text("of a process that was killed")
    store.drop_unknown([{1: 0}])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == files(tmp_path)


def test_a_damaged_or_exchanged_state_is_refused(tmp_path):
    """A flipped bit, another client's file, an older version: each a valid safetensors file."""
    store = ClientStore(tmp_path)
    for client_id, round_index in ((1, 3), (2, 3), (1, 2)):
        store.save(client_id, round_index, tensors(float(client_id)))
    path = tmp_path / "000000" / "client_000001_round_000003.safetensors"
    whole = path.read_bytes()
    others = [(path.with_name(name)).read_bytes() for name in files(tmp_path) if name != path.name]
    flipped = [bytearray(whole) for _ in range(8, len(whole), 5)]
    for index, data in zip(range(8, len(whole), 5), flipped, strict=True):
        data[index] ^= 1
    unnoticed = 0
    for data in [*others, whole[:-3], b"", *map(bytes, flipped)]:
        path.write_bytes(data)
        try:
            loaded = store.load(1, {1: 3})
        except CheckpointError:
            continue
        unnoticed += 1  # the padding of the header may change
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1.0).items())
    assert unnoticed <= 2
    path.write_bytes(whole)
    assert torch.equal(store.load(1, {1: 3})["B|q_proj|B"], torch.full((2, 3), 1.0))


def test_tensors_of_a_checkpoint_are_no_state_of_a_client(tmp_path):
    """Which may lack a checksum, as `test_a_state_without_checksum_is_read_as_before` has it."""
    store = ClientStore(tmp_path / "clients")
    store.save(3, 0, tensors(1.0))
    saved = save_checkpoint(ServerState(1, AdapterState({})), tmp_path / "checkpoints", keep_last=1)
    (path,) = tmp_path.rglob("client_*")
    path.write_bytes((saved / "state.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        store.load(3, {3: 0})


def test_a_state_without_checksum_is_read_as_before(tmp_path):
    store = ClientStore(tmp_path)
    store.save(1, 3, tensors(1.0))
    (tmp_path / "000000" / files(tmp_path)[0]).write_bytes(save(tensors(2.0)))
    assert torch.equal(store.load(1, {1: 3})["B|q_proj|B"], torch.full((2, 3), 2.0))


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path):
    store = ClientStore(tmp_path / "run" / "clients")
    with pytest.raises(RunFolderError, match="No such file or directory"):
        store.save(1, 0, tensors(1.0))
    assert not (tmp_path / "run").exists()


def test_only_versions_that_a_checkpoint_needs_survive(tmp_path):
    store = ClientStore(tmp_path)
    versions: dict[int, int] = {}
    history = []
    for round_index in range(4):
        store.save(1, round_index, tensors(round_index))
        store.supersede([1], versions)
        versions = {**versions, 1: round_index}
        history.append(versions)
        store.drop_superseded(history[-2:])  # as with checkpoint.keep_last=2
    assert files(tmp_path) == [
        "client_000001_round_000002.safetensors",
        "client_000001_round_000003.safetensors",
    ]


def test_a_resumed_run_drops_what_no_checkpoint_knows(tmp_path):
    before = ClientStore(tmp_path)
    for client_id, round_index in ((1, 0), (1, 4), (2, 4), (3, 5)):
        before.save(client_id, round_index, tensors(1.0))
    after = ClientStore(tmp_path)
    after.drop_unknown([{1: 4, 2: 4}, {1: 0}])
    assert len(files(tmp_path)) == 3
    after.drop_superseded([{1: 4, 2: 4}])
    assert files(tmp_path) == [
        "client_000001_round_000004.safetensors",
        "client_000002_round_000004.safetensors",
    ]


def test_a_damaged_or_missing_file_is_named(tmp_path):
    store = ClientStore(tmp_path)
    store.save(2, 1, tensors(1.0))
    path = next(tmp_path.rglob("client_*"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="state of client 2"):
        store.load(2, {2: 1})
    with pytest.raises(CheckpointError, match="client_000002_round_000009"):
        store.load(2, {2: 9})


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "clients").write_text("in the way", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"run\.output_dir"):
        ClientStore(tmp_path / "clients").save(0, 0, tensors(0.0))


def check_apart(group: Group, folder) -> str:
    """Each rank looks into a folder of its own."""
    try:
        ClientStore(folder / f"rank{group.rank}").check_shared(group)
    except PeerError as error:
        return str(error)
    return "no error"


def check_together(group: Group, folder) -> str:
    ClientStore(folder / "clients").check_shared(group)
    return "fine"


def test_processes_must_share_the_folder(tmp_path):
    assert run_ranks(check_together, 2, tmp_path, tmp_path) == ["fine"] * 2
    for message in run_ranks(check_apart, 2, tmp_path, tmp_path):
        assert "run.output_dir must be on a file system that all processes share" in message
    check_together(SoloGroup(), tmp_path)


def test_a_state_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch):
    store = ClientStore(tmp_path / "clients")
    store.save(3, 0, tensors(1.0))

    def stale(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(UnreadableError, match="is there and cannot be read"):
        store.load(3, {3: 0})
