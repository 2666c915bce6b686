"""File locks, and file systems that have none."""

import errno
import fcntl
from pathlib import Path

import pytest
from filelock import Timeout

from fedsim.cache import CacheError, cached_folder
from fedsim.errors import RunFolderError
from fedsim.locks import NoLocksError, file_lock, take_lock
from fedsim.tracking.run_folder import open_run_folder
from launch.runs import is_in_use


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(Timeout):
        take_lock(tmp_path / "lock", timeout_s=0)
    take_lock(tmp_path / "lock", timeout_s=0).release()


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_refused_and_no_file_takes_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that stays behind a killed process would keep the run from going on."""
    with pytest.raises(NoLocksError):
        take_lock(tmp_path / "lock", timeout_s=0)
    with pytest.raises(RunFolderError, match=r"run\.output_dir must be on a file system with file locks"):
        open_run_folder(tmp_path / "run", {}, "", [], lambda tree: tree)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="must be on a file system with file locks"):
        cached_folder("kind", {"a": 1}, lambda folder: None)
    (tmp_path / "run.lock").touch()
    assert not is_in_use(tmp_path)


def test_what_a_killed_process_left_of_a_cache_entry_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))

    def killed(folder: Path) -> None:
        (folder / "weights").write_text("half")
        left = folder.with_name(f"{folder.name[:-8]}00000000")
        folder.rename(left)  # as if nobody had been there to take it away
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("kind", {"a": 1}, killed)
    assert len(list((tmp_path / "kind").glob(".*-00000000"))) == 1
    entry = cached_folder("kind", {"a": 1}, lambda folder: (folder / "weights").write_text("whole") and None)
    assert (entry / "weights").read_text() == "whole"
    assert sorted(path.name for path in (tmp_path / "kind").iterdir() if path.is_dir()) == [entry.name]
