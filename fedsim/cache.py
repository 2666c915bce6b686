"""A folder of finished work, found by what it was made from.

An entry's name is a hash of everything that decides its content. Entries are written once: built in a temporary
folder, then renamed, under a file lock, so that several processes and several runs may ask for the same entry at once.
A manifest with checksums shows a damaged entry. The cache, or the folder of one kind of entry, may be a symbolic link
to another disk; an entry and its files may not, since a link's target can change unseen.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from fedsim.atomic import open_files_as_folder, sync_tree
from fedsim.errors import FedsimError
from fedsim.locks import NoLocksError, file_lock

MANIFEST = "manifest.json"


class CacheError(FedsimError):
    """The cache folder cannot be written, or an entry in it is damaged."""


def cache_root() -> Path:
    """FEDSIM_CACHE, else fedsim below XDG_CACHE_HOME, else ~/.cache/fedsim."""
    chosen = os.environ.get("FEDSIM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim"


def content_hash(content: object) -> str:
    """Hex digest of a JSON-like value, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cached_folder(kind: str, content: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """The folder of a cache entry, built first if it is not there yet.

    Args:
        kind: what the entry holds; part of its path.
        content: everything that decides the entry's files, as JSON-like values.
        build: writes the files into the empty folder it is given. Runs in one process at a time.

    Raises:
        CacheError: the cache cannot be written, or the entry's files are not those that were written.
    """
    entry = cache_root() / kind / content_hash(content)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(Path(f"{entry}.lock")):
            if not entry.exists() and not entry.is_symlink():
                _build_entry(entry, content, build)
    except NoLocksError as error:
        raise CacheError(
            f"the cache folder {cache_root()} must be on a file system with file locks (flock); set FEDSIM_CACHE to "
            "another folder"
        ) from error
    except OSError as error:
        raise CacheError(
            f"the cache folder {cache_root()} must be writable ({error.strerror or error}); "
            "set FEDSIM_CACHE to a folder that is"
        ) from error
    _check_entry(entry)
    return entry


def _build_entry(entry: Path, content: Mapping[str, object], build: Callable[[Path], None]) -> None:
    """Make the entry; for the process that holds its lock, so what others began of it they did not live to finish."""
    for left in entry.parent.glob(f".{entry.name}-*"):
        shutil.rmtree(left)
    unfinished = entry.with_name(f".{entry.name}-{secrets.token_hex(4)}")
    unfinished.mkdir()  # with the user's umask, so that a group can share a cache
    try:
        build(unfinished)
        open_files_as_folder(unfinished)
        files = {path.name: _checksum(path) for path in sorted(unfinished.iterdir())}
        manifest = {"content": dict(content), "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync_tree(unfinished)
        unfinished.rename(entry)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _check_entry(entry: Path) -> None:
    entries = [entry, *(entry.iterdir() if entry.is_dir() else ())]
    linked = [path.name for path in entries if path.is_symlink()]
    if linked:
        raise CacheError(
            f"the cache entry {entry} must be a folder of files, and {', '.join(linked)} is a symbolic link; delete it "
            "and start again"
        )
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        files = {Path(name).name: checksum for name, checksum in manifest["files"].items()}
        damaged = [name for name, checksum in files.items() if _checksum(entry / name) != checksum]
        if not damaged and content_hash(manifest["content"]) != entry.name:
            damaged = [MANIFEST]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        damaged = [MANIFEST]
    if damaged:
        raise CacheError(
            f"the cache entry {entry} is damaged ({', '.join(damaged)} changed or missing); delete that folder "
            "and start again"
        )


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
