"""The group of processes that run one simulation."""

import contextlib
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fedsim.comm.marks import Marks
from fedsim.comm.meeting import NETWORK_HINT, MeetingPoint, first_line
from fedsim.errors import ConfigError, LostRankError

logger = logging.getLogger(__name__)


class Group(Protocol):
    """What fedsim asks of its processes.

    A method is collective unless it says that it is not: every rank calls it, in the same order.
    """

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

    def start_gather(self, tensor: Tensor, root: int) -> Callable[[], list[Tensor]]:
        """Begin to send every rank's tensor to one rank; all of one shape and dtype. Several may be under way.

        Returns:
            A function that waits for the end of it, to be called once: on rank `root` every rank's tensor, in rank
            order; elsewhere nothing. Ends are awaited in the order of the beginnings.
        """
        ...

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Rank `source`'s tensor on every rank; others pass one of the same shape and dtype, which is overwritten."""
        ...

    def exchange(self, *, of_all: bool = True) -> contextlib.AbstractContextManager[None]:
        """Around an exchange that is made by other means than these methods. Not collective by itself.

        Args:
            of_all: every rank takes part in it, in the same order among the others; else some do.

        Raises:
            LostRankError: within the block the connection broke, or the time was over.
        """
        ...

    def note(self, what: str) -> None:
        """What this process does from now on, for messages. Not collective."""
        ...

    def note_part(self, part: str) -> None:
        """Which part of what it noted last. Not collective."""
        ...

    @property
    def place(self) -> str:
        """What was noted last, in words. Not collective."""
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
        self.place = "starting"

    def gather_objects(self, value: Any) -> list[Any]:
        """[value]."""
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        """The value itself."""
        return value

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """[tensor]."""
        return [tensor]

    def start_gather(self, tensor: Tensor, root: int) -> Callable[[], list[Tensor]]:  # noqa: ARG002
        """[tensor]."""
        return lambda: [tensor]

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:  # noqa: ARG002
        """The tensor itself."""
        return tensor

    def exchange(self, *, of_all: bool = True) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Nobody is missing."""
        return contextlib.nullcontext()

    def note(self, what: str) -> None:
        """See `Group`."""
        self.place = what

    def note_part(self, part: str) -> None:
        """Nobody waits for a part."""

    def close(self) -> None:
        """Nothing to leave."""


class TorchGroup:
    """The default process group of torch.distributed, and the marks of its processes.

    After an exchange has failed every later one fails at once, with the same error.

    Args:
        device: see `Group`.
        marks: where the processes are.
        timeout_s: after which an exchange fails.
        asked_to_end: whether a signal asks this process to end.
    """

    def __init__(
        self,
        device: torch.device | str,
        marks: Marks,
        timeout_s: float,
        asked_to_end: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = torch.device(device)
        self._marks = marks
        self._timeout_s = timeout_s
        self._asked_to_end = asked_to_end
        self._lost: LostRankError | None = None
        self._has_gathered = False
        marks.each_beat(self._end_if_stuck)

    def gather_objects(self, value: Any) -> list[Any]:
        """See `Group`."""
        values: list[Any] = [None] * self.world_size
        with self.exchange():
            dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """See `Group`."""
        box = [value]
        with self.exchange():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `Group`."""
        received = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self.exchange():
            dist.all_gather(received, tensor)
            self._settle()
        return received

    def start_gather(self, tensor: Tensor, root: int) -> Callable[[], list[Tensor]]:
        """See `Group`."""
        received = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == root else []
        if self.device.type == "cuda" and not self._has_gathered:
            torch.cuda.empty_cache()  # NCCL takes memory for the connections of a gather at the first one
        self._has_gathered = True
        with self.exchange():
            work = dist.gather(tensor, received or None, dst=root, async_op=True)

        def finish() -> list[Tensor]:
            with self.exchange():
                work.wait()
                self._settle()
            return received

        return finish

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """See `Group`."""
        with self.exchange():
            dist.broadcast(tensor, src=source)
            self._settle()
        return tensor

    def note(self, what: str) -> None:
        """See `Group`."""
        self._marks.note(what)

    def note_part(self, part: str) -> None:
        """See `Group`."""
        self._marks.note_part(part)

    @property
    def place(self) -> str:
        """See `Group`."""
        return self._marks.place

    def close(self) -> None:
        """Destroy the process group."""
        self._marks.stop(failed=False)
        dist.destroy_process_group()

    def _settle(self) -> None:
        """Wait until the exchange is over: NCCL's calls return when it is in the GPU's queue.

        Without that, a rank that is missing would be noticed outside the exchange, where nobody says who it is.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @contextlib.contextmanager
    def exchange(self, *, of_all: bool = True) -> Iterator[None]:
        """See `Group`: says who is missing if it fails."""
        if self._lost is not None:
            raise self._lost
        try:
            with self._marks.exchange(counts=of_all):
                yield
        except RuntimeError as error:
            if not re.search(_BROKEN, str(error), re.IGNORECASE):
                raise
            self._lost = LostRankError(self._marks.explain(self._timeout_s))
            self._marks.stop(failed=True)
            if self.rank == 0:
                time.sleep(_LINGER_S)
            raise self._lost from error

    def _end_if_stuck(self) -> None:
        """End a process whose main thread waits for what will not come; called with each mark, in another thread.

        The launcher has told it to end because another process has; or the library does not keep the time limit.
        """
        if self._asked_to_end() and (silent := self._marks.silent()):
            logger.warning(
                "%s: ending as asked, since rank %s has ended or is stopped", self.place, silent[0]
            )
            os._exit(128 + signal.SIGTERM)
        if self._marks.waited_s > self._timeout_s + _PATIENCE_S:
            logger.error("%s", self._marks.explain(self._timeout_s))
            os._exit(1)


_BROKEN = r"timed? ?out|connect|peer|socket|broken pipe|network|reset|remote"
"""In the text of an error of gloo, NCCL or their store: it is about the other processes. Others are bugs."""

_PATIENCE_S = 10.0
"""How much later than the library the process itself ends an exchange."""

_LINGER_S = 2.0
"""How long rank 0, which may hold the marks of all, stays for the others to read them."""


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


def sees_only_its_own_gpus(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether Slurm shows each task of a step other GPUs, as with --gpus-per-task; by number they all begin at 0."""
    if "SLURM_STEP_ID" not in environment or "GROUP_WORLD_SIZE" in environment:
        return False  # torchrun hands what its one task sees to all its processes
    _, _, per_task = environment.get("SLURM_GPUS_PER_TASK", "").rpartition(":")  # 1, or as in a100:1
    binding = environment.get("SLURM_GPU_BIND", "").removeprefix("verbose,")
    bound = binding.startswith(("single:", "per_task:", "map_gpu:", "mask_gpu:"))
    return bound or per_task.isdecimal() or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")


def choose_device(
    wanted: str, world: World, num_gpus: int, *, own_gpus: bool = False, in_job: bool = False
) -> torch.device:
    """The device of a process: the GPU of its local rank, or the CPU.

    "auto" takes GPUs only where each process of the node has one to itself, since NCCL does not let two share one.

    Args:
        wanted: "auto", "cpu" or "cuda".
        world: the place of the process.
        num_gpus: GPUs that it sees.
        own_gpus: the other processes of its node see other ones.
        in_job: GPUs have been asked for, and are paid for: "auto" does not leave them idle.

    Raises:
        ConfigError: cuda is wanted, or GPUs are paid for, and there is not one for each process of the node.
    """
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if num_gpus == 0:
        raise ConfigError("run.device must be cpu or auto where no GPU is visible, got 'cuda'")
    if own_gpus or world.local_size <= num_gpus:
        return torch.device("cuda", world.local_rank % num_gpus)
    shortage = f"{world.local_size} processes on a node with {num_gpus} visible GPUs"
    if wanted == "cuda" or in_job:
        raise ConfigError(
            f"run.device={wanted} needs a GPU for each process, got {shortage}; start {num_gpus} processes a node, or "
            "set run.device=cpu"
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
    *,
    join_timeout_s: float = 600.0,
    asked_to_end: Callable[[], bool] = lambda: False,
) -> Group:
    """Enter the group of `world_size` processes, or make the group of one.

    Args:
        rank: of this process.
        world_size: number of processes.
        device: of this process.
        backend: "gloo", "nccl", or "auto" for the one that fits the device.
        timeout_s: after which a collective fails, in seconds.
        init_method: `env://` for the launcher's variables, or `file://` and a path that all processes share.
        join_timeout_s: how long to wait for the others, in seconds.
        asked_to_end: whether a signal asks this process to end; then it does not wait for one that has ended already.

    Raises:
        ConfigError: nccl is asked for on a CPU, or gloo on a GPU; some processes compute on GPUs and some on CPUs; or
            the launcher's variables are wrong.
        LostRankError: the processes do not find each other.
    """
    fitting = "nccl" if device.type == "cuda" else "gloo"
    if backend not in ("auto", fitting):
        raise ConfigError(f"comm.backend must be auto or {fitting} on {device.type}, got '{backend}'")
    if world_size == 1:
        return SoloGroup(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    meeting = MeetingPoint(init_method, rank, world_size)
    # NCCL ends the process without a word when the time is over, so it gets more of it than `TorchGroup` gives
    library_timeout_s = timeout_s + (2 * _PATIENCE_S if fitting == "nccl" else 0.0)
    join_s = min(join_timeout_s, timeout_s)
    with meeting.within(join_s):
        store = meeting.wait_for_all(join_s, device.type)
        try:
            dist.init_process_group(
                fitting,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=library_timeout_s),
            )
        except RuntimeError as error:  # the store could be reached, the other processes cannot
            raise LostRankError(
                f"{meeting.who} could not connect ({first_line(error)}); {NETWORK_HINT}"
            ) from error
    return TorchGroup(device, Marks(meeting.connect, rank, world_size), timeout_s, asked_to_end)
