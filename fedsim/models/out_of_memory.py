"""What to do when memory does not suffice: recognise it, and do the work in smaller parts."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from fedsim.errors import ModelError

CPU_MESSAGES = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")
CUDA_MESSAGES = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # what it says where there is no memory left for its handle
    "CUSOLVER_STATUS_ALLOC_FAILED",
)

ROUNDING = "results stay the same to rounding, which from here on depends on this machine's memory"

REMEDIES = (
    "lower training.batch_size (and raise training.gradient_accumulation_steps instead) or data.max_tokens, set "
    "training.gradient_checkpointing=true, or make the base smaller with model.dtype=bfloat16, model.quantization "
    "or more GPUs"
)

W = TypeVar("W")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine has no memory left for what was asked."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(part in text for part in CPU_MESSAGES + CUDA_MESSAGES)


def free_cached(device: torch.device) -> None:
    """Give back what the failed work has left; call it outside the `except` block, whose traceback holds tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class SmallerParts:
    """Does work without gradients, in halves where memory does not suffice for the whole.

    The size that failed is remembered, so later work is cut before it fails.

    Args:
        what: is done, for messages, such as "a test batch".
        device: on which it is done.
        keys: of the configuration that make it smaller.
    """

    def __init__(self, what: str, device: torch.device, keys: str) -> None:
        self._what = what
        self._device = device
        self._keys = keys
        self._most: int | None = None

    def run(
        self,
        work: W,
        size: Callable[[W], int],
        measure: Callable[[W], list[R]],
        halves: Callable[[W], tuple[W, W] | None],
    ) -> list[R]:
        """`measure(work)`, or that of its halves one after another.

        Args:
            work: to do.
            size: of some work, in tokens.
            measure: does it; the results of both halves together must be those of the whole.
            halves: of some work; None if it cannot be cut.

        Raises:
            ModelError: what cannot be cut any further does not fit.
        """
        tokens = size(work)
        problem = ""
        if self._most is None or tokens <= self._most:
            try:
                return measure(work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = first_line(error)
        cut = halves(work)
        if problem:
            free_cached(self._device)
            if cut is None:
                raise ModelError(
                    f"{self._what} of one sequence ({tokens} tokens) does not fit this {place(self._device)} "
                    f"({problem}); lower {self._keys}, or make the base smaller with model.dtype=bfloat16, "
                    "model.quantization or more GPUs"
                )
            self._most = max(1, tokens // 2)
            logger.warning(
                "out of memory: %s of %d tokens does not fit this %s; from here on at most %d at once; %s",
                self._what,
                tokens,
                place(self._device),
                self._most,
                ROUNDING,
            )
        if cut is None:  # larger than what was found to fit, but indivisible: it may fit all the same
            self._most = tokens
            return self.run(work, size, measure, halves)
        return [result for half in cut for result in self.run(half, size, measure, halves)]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:160]


def place(device: torch.device) -> str:
    """Whose memory it is."""
    return "GPU" if device.type == "cuda" else "machine's memory"
