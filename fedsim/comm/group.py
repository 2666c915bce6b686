"""The group of processes that run one simulation."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fedsim.errors import ConfigError

logger = logging.getLogger(__name__)


class Group(Protocol):
    """What fedsim asks of its processes. Each method is collective: every rank calls it, in the same order."""

    @property
    def rank(self) -> int:
        """Process rank, from 0; 0 is the server."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of this process, on which exchanged tensors live."""
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. For small Python objects."""
        ...

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank. For small Python objects."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; all of one shape and dtype."""
        ...

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Rank `source`'s tensor on every rank; others pass one of the same shape and dtype, which is overwritten."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class SoloGroup:
    """The group of one process, without torch.distributed."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def gather_objects(self, value: Any) -> list[Any]:
        """[value]."""
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        """The value itself."""
        return value

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """[tensor]."""
        return [tensor]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:  # noqa: ARG002
        """The tensor itself."""
        return tensor

    def close(self) -> None:
        """Nothing to leave."""


class TorchGroup:
    """The default process group of torch.distributed."""

    def __init__(self, device: torch.device | str) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = torch.device(device)

    def gather_objects(self, value: Any) -> list[Any]:
        """See `Group`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """See `Group`."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `Group`."""
        received = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(received, tensor)
        return received

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """See `Group`."""
        dist.broadcast(tensor, src=source)
        return tensor

    def close(self) -> None:
        """Destroy the process group."""
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among all.

    Attributes:
        rank: from 0.
        local_rank: index on its node.
        size: number of processes.
        local_size: number of processes on its node, as far as the launcher says.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """What torchrun and accelerate export; one process without a launcher.

    Raises:
        ConfigError: the launcher's variables contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return World()
    rank, size = _variable(environment, "RANK"), _variable(environment, "WORLD_SIZE")
    local_rank = _variable(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
    local_size = local_rank + 1
    if "LOCAL_WORLD_SIZE" in environment:
        local_size = _variable(environment, "LOCAL_WORLD_SIZE")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK must be in [0, WORLD_SIZE={size}), got {rank}")
    if not 0 <= local_rank < local_size:
        raise ConfigError(f"LOCAL_RANK must be in [0, LOCAL_WORLD_SIZE={local_size}), got {local_rank}")
    return World(rank, local_rank, size, local_size)


def _variable(environment: Mapping[str, str], name: str) -> int:
    """A whole number from the launcher."""
    try:
        return int(environment[name])
    except (KeyError, ValueError) as error:
        got = repr(environment[name]) if name in environment else "nothing"
        raise ConfigError(
            f"the launcher must set {name} to a whole number, got {got}; start with torchrun, or unset RANK, "
            "LOCAL_RANK and WORLD_SIZE to run one process"
        ) from error


def choose_device(wanted: str, world: World, num_gpus: int) -> torch.device:
    """The device of a process: the GPU of its local rank, or the CPU.

    "auto" takes GPUs only where each process of the node has one to itself, since NCCL does not let two share one.

    Args:
        wanted: "auto", "cpu" or "cuda".
        world: the place of the process.
        num_gpus: GPUs that it sees.

    Raises:
        ConfigError: cuda is wanted, and there is not a GPU for each process of the node.
    """
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise ConfigError("run.device must be cpu or auto where no GPU is visible, got 'cuda'")
    if world.local_size <= num_gpus:
        return torch.device("cuda", world.local_rank)
    shortage = f"{world.local_size} processes on a node with {num_gpus} visible GPUs"
    if wanted == "cuda":
        raise ConfigError(
            f"run.device=cuda needs a GPU for each process, got {shortage}; start {num_gpus} processes a node, or set "
            "run.device=cpu"
        )
    if world.rank == 0:
        logger.warning("run.device=auto: the CPU, for %s; start %d to use them", shortage, num_gpus)
    return torch.device("cpu")


def join_group(
    rank: int,
    world_size: int,
    device: torch.device,
    backend: str = "auto",
    timeout_s: float = 1800.0,
    init_method: str = "env://",
) -> Group:
    """Enter the group of `world_size` processes, or make the group of one.

    Args:
        rank: of this process.
        world_size: number of processes.
        device: of this process.
        backend: "gloo", "nccl", or "auto" for the one that fits the device.
        timeout_s: after which a collective fails, in seconds.
        init_method: rendezvous as in `torch.distributed.init_process_group`.

    Raises:
        ConfigError: nccl is asked for on a CPU, or gloo on a GPU; or the processes do not find each other.
    """
    fitting = "nccl" if device.type == "cuda" else "gloo"
    if backend not in ("auto", fitting):
        raise ConfigError(f"comm.backend must be auto or {fitting} on {device.type}, got '{backend}'")
    if world_size == 1:
        return SoloGroup(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            fitting,
            init_method=init_method,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (ValueError, dist.DistError) as error:  # a variable is missing or wrong; the others did not answer
        where = [f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT")]
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the {world_size} processes must find each other at {' '.join(where)}, and rank {rank} did not "
            f"({reason}); start with torchrun, which sets both, and check that every rank has started"
        ) from error
    return TorchGroup(device)
