"""Checkpoints: exact, whole, and honest about damage."""

import errno
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsim.errors import CheckpointError, UnreadableError, is_user_error
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import BestSoFar, ServerState
from fedsim.server.checkpoint import (
    CheckpointWriter,
    kept_client_versions,
    list_checkpoints,
    load_newest_checkpoint,
    prune_checkpoints,
    rounds_completed,
    save_checkpoint,
)
from tests.faults.damage import rewrite_state


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
    with pytest.raises(CheckpointError, match="no checkpoint in .* is readable.*delete the run folder"):
        load_newest_checkpoint(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    save_checkpoint(state(1), tmp_path, keep_last=5)
    newest = save_checkpoint(state(2), tmp_path, keep_last=5)
    rewrite_state(newest, format_version=99, something_new=[1])
    with pytest.raises(CheckpointError, match=r"format version 3 or 2, got 99; go on with the fedsim"):
        load_newest_checkpoint(tmp_path)


def test_a_flipped_version_is_damage_and_no_later_format(tmp_path):
    save_checkpoint(state(1), tmp_path, keep_last=5)
    path = save_checkpoint(state(2), tmp_path, keep_last=5) / "state.json"
    for version in (2, 7):
        path.write_text(re.sub(r'"format_version": \d+', f'"format_version": {version}', path.read_text()))
        loaded = load_newest_checkpoint(tmp_path)
        assert loaded is not None
        assert same(loaded, state(1))


def test_the_format_before_is_still_read(tmp_path):
    newest = save_checkpoint(state(1), tmp_path, keep_last=5)
    description = json.loads((newest / "state.json").read_text())
    del description["sha256"]
    (newest / "state.json").write_text(json.dumps({**description, "format_version": 2}))
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert same(loaded, state(1))


WRONG: dict[str, dict[str, object]] = {
    "round of another checkpoint": {"round_index": 1},
    "round that is no number": {"round_index": "2"},
    "adapters in a list": {"adapters": []},
    "modules in a list": {"adapters": {"adapter": ["q_proj"]}},
    "adapter without factors": {"adapters": {"adapter": {"../../q_proj": 1.0}}},
    "scaling that is a text": {"adapters": {"adapter": {"z.q_proj": "8"}}},
    "no adapter": {"adapters": {}},
    "no versions": {"client_versions": None},
    "client below zero": {"client_versions": {"-1": 1}},
    "client with a path": {"client_versions": {"../1": 1}},
    "client of thousands of digits": {"client_versions": {"1" * 5000: 1}},
    "version beyond all rounds": {"client_versions": {"1": 2**64}},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_description_that_makes_no_sense_is_damage(case, tmp_path, caplog):
    """Values that fit their checksum, as somebody who means harm would write them."""
    save_checkpoint(state(1), tmp_path, keep_last=5)
    rewrite_state(save_checkpoint(state(2), tmp_path, keep_last=5), **WRONG[case])
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert same(loaded, state(1))
    assert "round_000002 cannot be used" in caplog.text
    assert len(kept_client_versions(tmp_path)) <= 2


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_no_single_bit_goes_unnoticed(name, tmp_path):
    """Each byte of the newest checkpoint in turn; what is loaded is the one before, never something else."""
    save_checkpoint(state(1), tmp_path, keep_last=5)
    path = save_checkpoint(state(2), tmp_path, keep_last=5) / name
    whole = path.read_bytes()
    unnoticed = []
    for index in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(bytes(damaged))
        loaded = load_newest_checkpoint(tmp_path)
        assert loaded is not None
        if loaded.round_index == 2:
            unnoticed.append(index)
            assert same(loaded, state(2)), "a blank between values may turn into another one, a value may not"
    assert not unnoticed or name == "state.json"


def test_a_checkpoint_beyond_the_record_is_passed_over(tmp_path, caplog):
    for index in (1, 2):
        save_checkpoint(state(index), tmp_path, keep_last=5)
    loaded = load_newest_checkpoint(tmp_path, recorded_rounds=1)
    assert loaded is not None
    assert loaded.round_index == 1
    assert "whole up to round 1 only" in caplog.text
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl and clients\.parquet.*up to round 0 only"):
        load_newest_checkpoint(tmp_path, recorded_rounds=0)


def with_best(index: int, best: int) -> ServerState:
    return replace(state(index), best=BestSoFar(0.25, best, index - best))


def test_the_best_checkpoint_stays(tmp_path):
    for index in range(1, 8):
        save_checkpoint(with_best(index, min(index, 3)), tmp_path, keep_last=2)
    assert [rounds_completed(path) for path in list_checkpoints(tmp_path)] == [3, 6, 7]
    newest = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.best == BestSoFar(0.25, 3, 4)
    prune_checkpoints(tmp_path, keep_last=1)
    assert [rounds_completed(path) for path in list_checkpoints(tmp_path)] == [3, 7], "the best is kept"


def test_checkpoints_are_in_the_order_of_rounds(tmp_path):
    for name in ("round_1000000", "round_999999", "round_000002", "round_12a", "round_2", "round_0000001x"):
        (tmp_path / name).mkdir()
    (tmp_path / "round_000009").write_text("a file")
    assert [rounds_completed(path) for path in list_checkpoints(tmp_path)] == [2, 999_999, 1_000_000]


def test_the_writer_writes_what_save_checkpoint_writes(tmp_path):
    for name in ("apart", "together"):
        (tmp_path / name).mkdir()
    writer = CheckpointWriter(tmp_path / "apart")
    for index in range(1, 5):
        writer.save(with_best(index, 1), keep_last=2)
        save_checkpoint(with_best(index, 1), tmp_path / "together", keep_last=2)
    writer.wait()
    writer.close()
    files = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).glob("*/*")}
        for name in ("apart", "together")
    }
    assert len(files["apart"]) == 6
    assert files["apart"] == files["together"]


def test_the_writer_tells_of_a_full_disk_at_the_next_occasion(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    writer = CheckpointWriter(tmp_path / "checkpoints")
    writer.save(state(1), keep_last=2)
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        writer.save(state(2), keep_last=2)
    writer.wait()
    writer.save(state(3), keep_last=2)
    with pytest.raises(CheckpointError, match="round_000003"):
        writer.wait()
    writer.close()


def test_the_folder_of_the_run_is_not_made_anew(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        save_checkpoint(state(1), tmp_path / "gone" / "checkpoints", keep_last=2)


def test_an_unfinished_folder_is_not_a_checkpoint(tmp_path):
    save_checkpoint(state(1), tmp_path, keep_last=5)
    (tmp_path / ".round_000002-abc").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000001"]


def test_a_disk_that_does_not_take_it_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        save_checkpoint(state(1), tmp_path / "checkpoints", keep_last=2)


def test_a_state_that_cannot_be_gone_on_from_is_passed_over(tmp_path, caplog):
    def refuse(found):
        if found.round_index > 1:
            raise CheckpointError("client 3 has lost its state")

    for index in (1, 2):
        save_checkpoint(state(index), tmp_path, keep_last=5)
    loaded = load_newest_checkpoint(tmp_path, check=refuse)
    assert loaded is not None
    assert loaded.round_index == 1
    assert "round_000002 cannot be used (client 3 has lost its state)" in caplog.text


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(name, tmp_path, monkeypatch, caplog):
    """A disk that does not answer says nothing of the checkpoint: nothing is passed over, and nothing deleted."""
    for index in (1, 2, 3):
        save_checkpoint(with_best(index, 1), tmp_path, keep_last=5)
    read = Path.read_bytes

    def stale(path: Path) -> bytes:
        if path == tmp_path / "round_000003" / name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        with pytest.raises(
            UnreadableError, match=f"{name} is there and cannot be read .Stale file handle"
        ) as error:
            load_newest_checkpoint(tmp_path)
        assert not is_user_error(error.value), "the job is to be tried again"
        if name == "state.json":
            assert kept_client_versions(tmp_path) is None
            prune_checkpoints(tmp_path, keep_last=1)
            assert "no older checkpoint is deleted this time" in caplog.text
    assert len(list_checkpoints(tmp_path)) == 3
    prune_checkpoints(tmp_path, keep_last=1)
    assert [rounds_completed(path) for path in list_checkpoints(tmp_path)] == [1, 3]
