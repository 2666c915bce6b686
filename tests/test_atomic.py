import os
import stat

import pytest

from fedsim.atomic import remove_unfinished, replace_file, replace_folder, write_text_atomic
from fedsim.cache import cached_folder
from fedsim.errors import RunFolderError


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, b"one")
    write_text_atomic(path, "zwölf")
    assert path.read_text(encoding="utf-8") == "zwölf"
    assert names(tmp_path) == ["a.json"]


def test_file_may_be_read_by_whom_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        replace_file(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_weights_may_be_read_by_whom_the_umask_allows(umask, mode, tmp_path, monkeypatch):
    """safetensors leaves them to their owner alone, whatever the umask."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))

    def weights(folder):
        (folder / "a.safetensors").touch(mode=0o600)

    def adapter(folder):
        weights(folder)
        (folder / "inner").mkdir()
        weights(folder / "inner")

    old = os.umask(umask)
    try:
        replace_folder(tmp_path / "adapter", adapter)
        entry = cached_folder("weights", {}, weights)
    finally:
        os.umask(old)
    made = [
        tmp_path / "adapter/a.safetensors",
        tmp_path / "adapter/inner/a.safetensors",
        entry / "a.safetensors",
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [mode] * 3


def test_old_file_survives_a_failing_disk(tmp_path, monkeypatch):
    path = tmp_path / "a"
    replace_file(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_missing_parent_is_one_line_naming_the_path(tmp_path):
    with pytest.raises(RunFolderError, match=r"none/a must be writable \(No such file or directory\)"):
        replace_file(tmp_path / "none" / "a", b"")


def test_folder_is_made_and_replaced_whole(tmp_path):
    path = tmp_path / "adapter"

    def first(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")

    def second(folder):
        assert path.exists(), "the old folder must stand while the new one is built"
        (folder / "y").write_text("2")

    replace_folder(path, first)
    assert (path / "sub" / "x").read_text() == "1"
    replace_folder(path, second)
    assert names(path) == ["y"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_folder_that_cannot_be_built_changes_nothing(tmp_path, error):
    path = tmp_path / "adapter"
    replace_folder(path, lambda folder: (folder / "x").touch())

    def failing(folder):
        (folder / "y").touch()
        raise error

    with pytest.raises(type(error)):
        replace_folder(path, failing)
    assert names(path) == ["x"]
    assert names(tmp_path) == ["adapter"]


def test_disk_error_while_building_names_the_folder(tmp_path):
    def failing(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFolderError, match=r"round_000001 must be writable \(No space left on device\)"):
        replace_folder(tmp_path / "round_000001", failing)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".adapter-0123abcd").mkdir()
    (tmp_path / ".adapter-0123abcd" / "file").touch()
    (tmp_path / ".config.yaml-89abcdef").touch()
    kept = ["round_000001", ".hidden", "adapter-0123abcd"]
    for name in kept:
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path)
    remove_unfinished(tmp_path / "not there")
    assert {path.name for path in tmp_path.iterdir()} == set(kept)
