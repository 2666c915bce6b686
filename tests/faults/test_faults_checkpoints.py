"""Checkpoints under SIGKILL and full disks: what was on the disk before is there afterwards, to the bit."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import CheckpointError
from fedsim.server.checkpoint import list_checkpoints, load_newest_checkpoint, save_checkpoint
from tests.faults.harness import _on_a_full_disk, kill_while_writing, state_after

KILLS = 8
"""Of a process in the middle of a checkpoint; `python -m benchmarks.soak` tries more."""


def test_sigkill_in_a_checkpoint_costs_no_more_than_that_checkpoint(
    tmp_path: Path, draw: np.random.Generator
) -> None:
    for trial in range(KILLS):
        report = kill_while_writing(tmp_path / f"{trial}", draw)
        assert report.problem is None, report


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_full_disk_leaves_the_checkpoints_as_they_were(share: float, tmp_path: Path) -> None:
    """The write that fails ends halfway, as it does on a disk with that much room."""
    for index in (1, 2):
        save_checkpoint(state_after(index), tmp_path, keep_last=2)
    size = (tmp_path / "round_000002" / "state.safetensors").stat().st_size
    with pytest.raises(
        CheckpointError, match=r"cannot write the checkpoint .*round_000003: .*File too large"
    ):
        _on_a_full_disk(int(share * size), save_checkpoint, state_after(3), tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000001", "round_000002"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.adapter.equal(state_after(2).adapter)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one and a half checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(folder)], capture_output=True, check=False
    ) if os.geteuid() == 0 else None  # fmt: skip
    if made is None or made.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_and_one_that_turns_read_only(small_disk: Path) -> None:
    save_checkpoint(state_after(1), small_disk, keep_last=1)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        save_checkpoint(state_after(2), small_disk, keep_last=1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EROFS)):
        save_checkpoint(state_after(2), small_disk, keep_last=1)
    assert [path.name for path in small_disk.iterdir()] == ["round_000001"]
    loaded = load_newest_checkpoint(small_disk)
    assert loaded is not None
    assert loaded.adapter.equal(state_after(1).adapter)
