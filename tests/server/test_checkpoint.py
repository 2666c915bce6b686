"""Checkpoints: exact, whole, and honest about damage."""

import json

import pytest
import torch

from fedsim.errors import CheckpointError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.server.checkpoint import list_checkpoints, load_newest_checkpoint, save_checkpoint


def adapter(seed: int, dtype: torch.dtype = torch.float32) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            name: LoraFactors(
                torch.randn(r, 5, generator=generator).to(dtype),
                torch.randn(4, r, generator=generator).to(dtype),
                16 / r,
            )
            for name, r in (("z.q_proj", 3), ("a.v_proj", 2))
        }
    )


def state(round_index: int) -> ServerState:
    return ServerState(
        round_index,
        adapter(round_index),
        {"client/000003": adapter(99, torch.float64)},
        adapter(round_index + 50),
        {3: 1, 70000: 2},
        simulated_s=12.75,
    )


def same(one: ServerState, other: ServerState) -> bool:
    return (
        one.round_index == other.round_index
        and one.client_versions == other.client_versions
        and one.simulated_s == other.simulated_s
        and one.base_update.equal(other.base_update)
        and one.adapter.equal(other.adapter)
        and list(one.strategy_state) == list(other.strategy_state)
        and all(entry.equal(other.strategy_state[name]) for name, entry in one.strategy_state.items())
    )


def test_round_trip_is_exact(tmp_path):
    save_checkpoint(state(4), tmp_path / "checkpoints", keep_last=2)
    loaded = load_newest_checkpoint(tmp_path / "checkpoints")
    assert loaded is not None
    assert same(loaded, state(4))
    assert list(loaded.adapter) == ["z.q_proj", "a.v_proj"], "the order of modules is kept"
    assert loaded.strategy_state["client/000003"]["z.q_proj"].A.dtype == torch.float64


def test_only_the_newest_are_kept(tmp_path):
    for index in range(1, 6):
        save_checkpoint(state(index), tmp_path, keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000004", "round_000005"]


def test_nothing_there_is_no_error(tmp_path):
    assert load_newest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "no-json", "no-tensors"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(damage, tmp_path):
    save_checkpoint(state(1), tmp_path, keep_last=5)
    newest = save_checkpoint(state(2), tmp_path, keep_last=5)
    tensors, description = newest / "state.safetensors", newest / "state.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(bytes(data))
    elif damage == "no-json":
        description.write_text("{", encoding="utf-8")
    else:
        tensors.unlink()
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert same(loaded, state(1))


def test_no_readable_checkpoint_is_an_error(tmp_path):
    newest = save_checkpoint(state(1), tmp_path, keep_last=5)
    (newest / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is readable.*delete the folder"):
        load_newest_checkpoint(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    newest = save_checkpoint(state(1), tmp_path, keep_last=5)
    description = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**description, "format_version": 99}))
    with pytest.raises(CheckpointError, match="format version 2, got 99"):
        load_newest_checkpoint(tmp_path)


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path):
    save_checkpoint(state(1), tmp_path, keep_last=5)
    (tmp_path / ".round_000002-abc").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000001"]


def test_a_disk_that_does_not_take_it_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save_checkpoint(state(1), tmp_path / "checkpoints", keep_last=2)
