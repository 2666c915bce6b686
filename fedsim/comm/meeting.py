"""Where the processes of a run find each other: a key-value store at MASTER_ADDR:MASTER_PORT, or in a file."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fedsim.errors import ConfigError, LostRankError

logger = logging.getLogger(__name__)

NETWORK_HINT = (
    "check that the nodes reach each other, and over which interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose "
    "one (names as in `ip addr`)"
)

PATIENCE_S = 10.0
"""How much longer than its time limit a meeting may take before the process ends itself."""

SHORT_S = 5.0
"""How long a look at the store may take when something is wrong already."""

LINGER_S = 2.0
"""How long rank 0, which may hold the store, stays for the others to read what is wrong."""

SHOWN = 8
"""Ranks that a message names."""


class MeetingPoint:
    """The store of a world, to be reached as often as needed.

    Args:
        init_method: `env://`, where rank 0 or torchrun holds the store at MASTER_ADDR:MASTER_PORT; or `file://` and a
            path.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the launcher's variables are missing or wrong.
    """

    def __init__(self, init_method: str, rank: int, world_size: int) -> None:
        self._path = init_method.removeprefix("file://") if init_method.startswith("file://") else None
        self._rank = rank
        self._world_size = world_size
        self._address, self._port = ("", 0) if self._path is not None else _address(rank, world_size)

    @property
    def who(self) -> str:
        """The processes and the place, for messages."""
        return _who(self._rank, self._world_size)

    @contextlib.contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """Around the whole meeting: it ends this process if the block takes `PATIENCE_S` longer than `timeout_s`.

        The library's own limits hold for each of its attempts and steps, of which there are several, and its calls
        cannot be interrupted from outside. The exit code is that of a `LostRankError`, whose text is logged.
        """
        timer = threading.Timer(timeout_s + PATIENCE_S, self._give_up, (timeout_s,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def wait_for_all(self, timeout_s: float, device_type: str = "cpu") -> Store:
        """The store, as soon as every process has come.

        Args:
            timeout_s: how long to wait.
            device_type: on what this process computes; those on CPUs and those on GPUs could not talk to each other.

        Raises:
            LostRankError: some have not come in time; names them.
            ConfigError: they compute on different types of devices.
        """
        end_s = time.monotonic() + timeout_s
        try:
            store = self._open(timeout_s, may_hold=True)
        except (RuntimeError, ValueError) as error:
            raise LostRankError(
                f"{self.who} could not reach it within {timeout_s:g} s ({first_line(error)}); start with torchrun, or "
                f"all tasks with srun, and check that rank 0 has started; {NETWORK_HINT}"
            ) from error
        keys = self._keys()
        store.set(keys[self._rank], device_type)
        try:
            store.wait(keys, timedelta(seconds=max(1.0, end_s - time.monotonic())))
            device_types = [store.get(key).decode() for key in keys]
        except RuntimeError as error:
            raise LostRankError(
                f"{self.who}, and {self._absent(store, keys)} after {timeout_s:g} s; check that they "
                f"have started, or set comm.join_timeout_s; {NETWORK_HINT}"
            ) from error
        if len(set(device_types)) > 1:
            if self._rank == 0:
                time.sleep(LINGER_S)
            on_cpu = [rank for rank, chosen in enumerate(device_types) if chosen == "cpu"]
            raise ConfigError(
                f"run.device must come to the same on all processes, got the CPU on {_ranks(on_cpu)} and a GPU on the "
                "others; check that every node shows a GPU for each of its processes, or set run.device=cpu"
            )
        return PrefixStore("fedsim", store)

    def connect(self) -> Store:
        """Another connection, whose waits are short."""
        return PrefixStore("marks", self._open(SHORT_S, may_hold=False))

    def _open(self, timeout_s: float, *, may_hold: bool) -> Store:
        if self._path is not None:
            # the number counts who must leave before the file is deleted
            return FileStore(self._path, self._world_size if may_hold else -1)
        held_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        return TCPStore(
            self._address,
            self._port,
            self._world_size,
            is_master=may_hold and self._rank == 0 and not held_by_launcher,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _keys(self) -> list[str]:
        """What each process writes when it comes."""
        return [f"joined/{rank}" for rank in range(self._world_size)]

    def _give_up(self, timeout_s: float) -> None:
        """End this process from another thread than the one that waits."""
        try:
            store = self._open(SHORT_S, may_hold=False)
            present = all(store.check([key]) for key in self._keys())
            absent = "some process has ended since" if present else self._absent(store, self._keys())
        except (RuntimeError, ValueError):
            absent = "the store, which rank 0 or the launcher holds, cannot be reached"
        logger.error(
            "LostRankError: %s, and %s, after %g s; check that all have started and are alive, or set "
            "comm.join_timeout_s; %s",
            self.who,
            absent,
            timeout_s,
            NETWORK_HINT,
        )
        os._exit(1)

    def _absent(self, store: Store, keys: list[str]) -> str:
        try:
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            return "rank 0, which holds it, has gone"
        return f"{_ranks(absent)} had not come"


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def _address(rank: int, world_size: int) -> tuple[str, int]:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"{_who(rank, world_size)} must be told an address and a port; start with torchrun, which sets both"
        )
    return address, int(port)


def _who(rank: int, world_size: int) -> str:
    where = " ".join(f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f"the {world_size} processes must find each other at {where}: rank {rank}"
