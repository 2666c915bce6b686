"""What GPUs can do, as their makers' data sheets say, and what of it a run is assumed to reach."""

from dataclasses import dataclass
from itertools import pairwise

from fedsim.errors import ConfigError

GIB = 2**30

ACHIEVED_SHARE = 0.4
"""Share of a data sheet's rate that training is assumed to reach. Not measured: `--probe` replaces it."""

SECONDS_PER_OPERATION = 7.5e-6
"""Time in which the host starts one operation on a GPU, eager PyTorch. An assumption as well."""

CONTEXT_BYTES = int(0.6 * GIB)
"""Memory that CUDA's context and libraries take in each process before anything is allocated. An assumption."""

USABLE_SHARE = 0.92
"""Share of a GPU's memory that may be planned with; the rest is lost to the allocator's fragments."""


ALLOCATOR_FACTOR = {"cuda": 1.0, "cpu": 2.2}
"""Memory that a phase of a round takes, per byte that is in use at its height. Each packed row has its own length, and
a CPU's allocator keeps what was freed in pieces of other sizes. Fitted to runs, where it was 2.0, 2.3 and once 5
(docs/log.md). For GPUs see `USABLE_SHARE`."""

LOAD_BYTES_PER_S = 5e8
"""Rate at which a base is assumed to be read and moved where nothing was measured."""

EXCHANGE_BYTES_PER_S = 5e9
"""Rate of the exchange between processes, likewise."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        name: as `--gpu` takes it.
        memory_bytes: of one GPU.
        half_flops: dense matrix products in bfloat16, or in float16 where there is no bfloat16, in FLOP/s.
        single_flops: matrix products in float32 without TF32, which fedsim does not switch on, in FLOP/s.
        bandwidth: of its memory, in bytes/s.
        has_bfloat16: whether its matrix units take bfloat16.
    """

    name: str
    memory_bytes: int
    half_flops: float
    single_flops: float
    bandwidth: float
    has_bfloat16: bool = True


GPUS: tuple[Gpu, ...] = (
    Gpu("V100-16", 16 * GIB, 125e12, 15.7e12, 900e9, has_bfloat16=False),
    Gpu("V100-32", 32 * GIB, 125e12, 15.7e12, 900e9, has_bfloat16=False),
    Gpu("T4", 16 * GIB, 65e12, 8.1e12, 300e9, has_bfloat16=False),
    Gpu("A10", 24 * GIB, 125e12, 31.2e12, 600e9),
    Gpu("A40", 48 * GIB, 149.7e12, 37.4e12, 696e9),
    Gpu("A100-40", 40 * GIB, 312e12, 19.5e12, 1555e9),
    Gpu("A100-80", 80 * GIB, 312e12, 19.5e12, 2039e9),
    Gpu("L4", 24 * GIB, 121e12, 30.3e12, 300e9),
    Gpu("L40S", 48 * GIB, 362e12, 91.6e12, 864e9),
    Gpu("RTX3090", 24 * GIB, 71e12, 35.6e12, 936e9),
    Gpu("RTX4090", 24 * GIB, 165e12, 82.6e12, 1008e9),
    Gpu("H100", 80 * GIB, 989e12, 67e12, 3350e9),
    Gpu("H200", 141 * 10**9, 989e12, 67e12, 4800e9),
    Gpu("B200", 180 * 10**9, 2250e12, 80e12, 8000e9),
)
"""From the makers' public data sheets, the boards with the fastest interconnect where there are several; rates without
sparsity. Nothing here was measured."""


@dataclass(frozen=True, slots=True)
class Device:
    """What each process computes on.

    Attributes:
        kind: "cuda" or "cpu".
        text: in words.
        gpu: its data sheet, where known.
        capacity: bytes that a process may use; None where not known.
        world_size: number of processes.
    """

    kind: str
    text: str
    gpu: Gpu | None
    capacity: int | None
    world_size: int

    @property
    def usable(self) -> float:
        """Bytes that may be planned with; infinitely many where not known."""
        if self.capacity is None:
            return float("inf")
        return self.capacity * (USABLE_SHARE if self.kind == "cuda" else 1.0)


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, whatever its case, blanks and dashes.

    Raises:
        ConfigError: the table does not have it.
    """
    for gpu in GPUS:
        if _plain(gpu.name) == _plain(name):
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise ConfigError(f"--gpu must be one of {known}, got {name!r}")


def recognise_gpu(name: str, memory_bytes: int) -> Gpu | None:
    """The entry for a GPU that the driver calls `name`; of boards with several sizes, the nearest in memory.

    Args:
        name: such as "NVIDIA A100-SXM4-80GB".
        memory_bytes: that the driver reports.
    """
    models = [gpu for gpu in GPUS if _plain(gpu.name.partition("-")[0]) in _words(name)]
    return min(models, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes), default=None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.upper() if letter.isalnum())


def _words(name: str) -> set[str]:
    """Words of a driver's name, and neighbouring ones joined: "RTX 4090" is RTX4090."""
    words = [_plain(word) for word in name.replace("-", " ").split()]
    return {*words, *(first + second for first, second in pairwise(words))}
