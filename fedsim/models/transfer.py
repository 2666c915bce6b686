"""From the host to a device."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[Any] | Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values on `device`, without waiting for what a GPU has to do before.

    From ordinary memory a copy to a GPU waits until all earlier work there is done; from pinned memory it is one more
    item of the queue. torch keeps the pinned block until the copy has been made.

    Args:
        values: on the host.
        device: of the result.
        dtype: of the result; 64-bit values are converted on the host, before they travel.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
