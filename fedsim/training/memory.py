"""Memory of this process."""

import contextlib
import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held since it started: torch's on a GPU, the resident set else.

    The kernel keeps the resident set's peak by memory map, so that what a parent held before it started this process is
    not in it, as it is in `getrusage`; that stands in where there is no /proc.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        (peak,) = (line for line in lines if line.startswith("VmHWM:"))
        return 1024 * int(peak.split()[1])
    except (OSError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class FreeMemory:
    """Gives memory that was freed back to the system from time to time.

    The C library keeps what was freed for later, cut up by whatever is still in use between, so that a process whose
    rounds differ a little in size holds more and more of it. Giving it back costs some milliseconds, hence not always.

    Args:
        period_s: between two times, at least.
    """

    def __init__(self, period_s: float = 2.0) -> None:
        self._period_s = period_s
        self._last_s = time.monotonic()
        self._trim = _heap_trim()

    def give_back(self) -> bool:
        """Do it if it is time; whether it was done. Nothing where the C library has no such function."""
        if self._trim is None or time.monotonic() - self._last_s < self._period_s:
            return False
        self._trim(0)
        self._last_s = time.monotonic()
        return True


@contextlib.contextmanager
def long_lived_set_aside() -> Iterator[None]:
    """Let Python look for unreachable objects among those alone that are made within.

    It looks through the old ones only when a quarter as many new ones have lived for a while, and libraries, model and
    data are nearly two million. What rounds leave behind in cycles, with its tensors, would wait for as long as that.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # of next to nothing: it is then that the old ones are counted
    try:
        yield
    finally:
        gc.unfreeze()


def _heap_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None elsewhere."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return trim
