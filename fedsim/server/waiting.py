"""Where the updates of a process's clients wait until the round's last client is trained."""

import math
from typing import Literal

AUTO_SHARE = 1 / 16
"""Of a GPU's memory, for updates that wait on it."""


def most_waiting_bytes(keep_on: Literal["auto", "device", "cpu"], device_bytes: int | None) -> float:
    """Bytes of updates that wait on the device; what is beyond waits in main memory, with the same bits.

    Args:
        keep_on: `training.pack.keep_updates_on`.
        device_bytes: memory of the GPU; None where the device is a CPU, and nothing can be moved.
    """
    if device_bytes is None or keep_on == "device":
        return math.inf
    return 0.0 if keep_on == "cpu" else AUTO_SHARE * device_bytes
