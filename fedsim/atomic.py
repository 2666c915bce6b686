"""Files and folders that appear whole or not at all.

Each is written beside its place under a hidden temporary name, forced to the disk, and renamed. A process
that dies in between leaves the old content in place. Temporary names begin with a dot, so that a reader who
lists the folder can skip them.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fedsim.errors import RunFolderError


def write_text_atomic(path: Path, text: str) -> None:
    """As `replace_file`, with text in UTF-8."""
    replace_file(path, text.encode("utf-8"))


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` into the file `path`, new or not; its folder must exist.

    Raises:
        RunFolderError: the file cannot be written; the old one, if any, is unchanged.
    """
    with replacing_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and is deleted if the block fails.

    Raises:
        RunFolderError: the file cannot be written; the old one, if any, is unchanged. Errors of the block other than
            OSError pass.
    """
    unfinished = _unfinished_name(path)
    with _as_run_folder_error(path):
        try:
            with unfinished.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def replace_folder(path: Path, build: Callable[[Path], None]) -> None:
    """Put what `build` writes into the folder `path`, in place of a folder that is there.

    Where `path` does not exist, as with a new checkpoint, one rename does it. Where it does, it is moved
    aside just before the new one is moved in, and deleted afterwards, because not every file system can
    exchange two folders in one step.

    Args:
        path: the folder; its parent must exist.
        build: writes files and folders into the empty folder it is given.

    Raises:
        RunFolderError: something cannot be written; the old folder, if any, is unchanged. Errors of `build`
            other than OSError pass.
    """
    unfinished = _unfinished_name(path)
    with _as_run_folder_error(path):
        try:
            unfinished.mkdir()
            build(unfinished)
            open_files_as_folder(unfinished)
            sync_tree(unfinished)
            _move_into_place(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Delete the folder `path`, of which nobody sees half: it takes a hidden temporary name first.

    Raises:
        RunFolderError: it cannot be deleted; it is whole, or `remove_unfinished` finds what is left of it.
    """
    aside = _unfinished_name(path)
    with _as_run_folder_error(path):
        path.rename(aside)
        shutil.rmtree(aside)


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that died left half-written, or half deleted, in `folder`; for its only writer.

    Raises:
        RunFolderError: something cannot be deleted.
    """
    if not folder.is_dir():
        return
    with _as_run_folder_error(folder):
        for path in folder.iterdir():
            if re.fullmatch(r"\..+-[0-9a-f]{8}", path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def open_files_as_folder(folder: Path) -> None:
    """Let those read and write the files in `folder` who may read and write it, by the user's umask.

    safetensors makes files that their owner alone may read, so that nobody of a group could use an adapter.
    """
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # not every file system knows permissions
                (Path(root) / name).chmod(mode)


def _move_into_place(folder: Path, path: Path) -> None:
    if not path.exists():
        folder.rename(path)
        return
    aside = _unfinished_name(path)
    path.rename(aside)
    try:
        folder.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _unfinished_name(path: Path) -> Path:
    """A free hidden name beside `path`. Not made by `tempfile`, whose files only their owner may read."""
    return path.with_name(f".{path.name}-{secrets.token_hex(4)}")


def sync_tree(folder: Path) -> None:
    """Force the files below a folder, and its lists of names, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    """Force a folder's list of names to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse this call for folders; the rename itself has happened by now.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _as_run_folder_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path} must be writable ({error.strerror or error}); "
            "free space there or choose another run.output_dir"
        ) from error
