"""Locks on files, which end with the process that holds them."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock

_ABSENT = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class NoLocksError(OSError):
    """The file system has no locks."""


def take_lock(path: Path, timeout_s: float = -1.0) -> BaseFileLock:
    """Take a lock of the operating system on a file.

    Never the file's mere presence instead, which newer versions of `filelock` fall back on where there are no such
    locks: that outlives a process that was killed.

    Args:
        path: of the file.
        timeout_s: how long to wait for it; below 0 without end.

    Raises:
        filelock.Timeout: another process holds it.
        NoLocksError: the file system has no locks.
        OSError: the file cannot be made.
    """
    try:
        lock = FileLock(path, timeout=timeout_s, fallback_to_soft=False)
    except TypeError:  # an older one has neither the argument nor what it forbids
        lock = FileLock(path, timeout=timeout_s)
    try:
        lock.acquire()
    except RuntimeError as error:  # so the older one
        raise NoLocksError(errno.ENOSYS, str(error)) from error
    except OSError as error:
        if error.errno in _ABSENT:
            raise NoLocksError(error.errno, "no file locks") from error
        raise
    return lock


@contextlib.contextmanager
def file_lock(path: Path, timeout_s: float = -1.0) -> Iterator[None]:
    """Hold the lock within the block; see `take_lock`."""
    lock = take_lock(path, timeout_s)
    try:
        yield
    finally:
        lock.release()
