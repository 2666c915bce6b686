"""Real processes of fedsim that are hurt on purpose, and what must be equal afterwards.

A process is forked from a server that has imported everything, as in `tests.helpers`, and calls `fedsim.main` as
`python -m fedsim.main` does. What hurts it is an `Injection`, which the process itself carries out when it comes to a
given call of a given function, or a signal from outside, at any moment.
"""

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load

from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.server.checkpoint import list_checkpoints, load_newest_checkpoint, save_checkpoint
from tests.helpers import _preloaded_context

INHERITED = ("FEDSIM_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "WANDB_MODE")
TIMED = ("time/", "ranks/", "train/tokens_per_s", "train/clients_per_s")


@dataclass(frozen=True)
class Injection:
    """What happens to one process.

    Attributes:
        target: the function, as module:name or module:class.name, where it is looked up.
        action: raise, exit, kill, term, usr1, stop, or kill_later: SIGKILL `value` seconds after the call has begun; or
            full: from the call on until its end no file can grow beyond `value` bytes.
        rank: of the process.
        call: which call, from 1.
        after: after the call instead of before it.
        value: for actions that need a number.
    """

    target: str
    action: str
    rank: int = 0
    call: int = 1
    after: bool = False
    value: float = 0.0


class HurtOnPurposeError(Exception):
    """Stands for a bug, or a machine's failure, in one process."""


SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "stop": signal.SIGSTOP,
}


@dataclass
class Ended:
    """How a process ended: exit code (None: it had to be ended by us) and standard error."""

    code: int | None
    errors: str


class Started:
    """Processes of one run.

    Attributes:
        processes: in rank order.
        began_s: when they were started, of the monotonic clock.
    """

    def __init__(self, processes: Sequence[Any], outputs: Sequence[Path]) -> None:
        self.processes = processes
        self.began_s = time.monotonic()
        self._outputs = outputs

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, or to all, that are still there."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait_first(self, timeout_s: float) -> None:
        """Until one process has ended."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout_s)

    def wait(self, timeout_s: float) -> list[Ended]:
        """Until all have ended, or for `timeout_s`, after which those that are left are killed."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in self._outputs]
        return [Ended(code, text) for code, text in zip(codes, texts, strict=True)]


def start(
    arguments: Sequence[str],
    world_size: int,
    folder: Path,
    injections: Sequence[Injection] = (),
    environment: Mapping[str, str] | None = None,
) -> Started:
    """Start `world_size` processes of fedsim, as a launcher would; their standard error goes to files in `folder`."""
    context = _preloaded_context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {name: os.environ[name] for name in INHERITED if name in os.environ} | dict(environment or {})
    if world_size > 1:
        shared |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tag = os.urandom(4).hex()
    outputs = [folder / f"stderr-{tag}-{rank}" for rank in range(world_size)]
    processes = []
    for rank in range(world_size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        mine = [injection for injection in injections if injection.rank == rank]
        given = (list(arguments), {**shared, **own}, str(outputs[rank]), mine)
        outputs[rank].touch()
        processes.append(context.Process(target=_program, args=given, daemon=True))
    for process in processes:
        process.start()
    return Started(processes, outputs)


def run(
    arguments: Sequence[str],
    world_size: int,
    folder: Path,
    injections: Sequence[Injection] = (),
    timeout_s: float = 120.0,
) -> list[Ended]:
    """`start` and wait; how each rank ended."""
    return start(arguments, world_size, folder, injections).wait(timeout_s)


def _program(
    arguments: Sequence[str], environment: Mapping[str, str], output: str, injections: Sequence[Injection]
) -> None:
    os.environ.update(environment)
    with Path(output).open("ab") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    for injection in injections:
        _inject(injection)
    from fedsim.main import _leave, main

    _leave(main(arguments))


def _inject(injection: Injection) -> None:
    """Replace the target in this process by one that is hurt at the given call."""
    module, _, path = injection.target.partition(":")
    owner: Any = import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, name)
    calls = 0

    def hurt(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != injection.call:
            return function(*arguments, **named)
        if injection.action == "full":
            return _on_a_full_disk(int(injection.value), function, *arguments, **named)
        if not injection.after:
            _act(injection)
        result = function(*arguments, **named)
        if injection.after:
            _act(injection)
        return result

    setattr(owner, name, hurt)


def _act(injection: Injection) -> None:
    if injection.action == "raise":
        raise HurtOnPurposeError(f"{injection.target} was hurt on purpose")
    if injection.action == "exit":
        os._exit(9)
    if injection.action == "kill_later":
        killer = threading.Timer(injection.value, os.kill, (os.getpid(), signal.SIGKILL))
        killer.daemon = True
        killer.start()
    else:
        os.kill(os.getpid(), SIGNALS[injection.action])


def _on_a_full_disk(most_bytes: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function while the system refuses to let a file grow beyond so many bytes: a write ends halfway."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        return function(*arguments, **named)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves that two equal runs share: bits of adapters, record, client table, state."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    table = pq.ParquetFile(folder / "clients.parquet").read().to_pydict()
    state = load_newest_checkpoint(folder / "checkpoints")
    assert state is not None
    spectra = folder / "spectra.jsonl"
    tensors = {
        f"{name}|{module}|{side}": getattr(factors, side).numpy().tobytes()
        for name, adapter in state.adapters().items()
        for module, factors in adapter.items()
        for side in ("A", "B")
    }
    kept = {}
    for client, version in state.client_versions.items():
        path = (
            folder
            / "clients"
            / f"{client // 1000:06d}"
            / f"client_{client:06d}_round_{version:06d}.safetensors"
        )
        kept[client] = {name: tensor.numpy().tobytes() for name, tensor in load(path.read_bytes()).items()}
    return {
        "status": run["status"],
        "metrics": [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in records],
        "clients": {
            name: values for name, values in table.items() if name not in ("seconds", "process_rank")
        },
        "spectra": spectra.read_text() if spectra.exists() else None,
        "adapters": {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.glob("adapter*/**/*.safetensors"))
        },
        "state": (state.round_index, tensors, dict(state.client_versions), kept),
        "checkpoints": [path.name for path in list_checkpoints(folder / "checkpoints")],
        "left over": sorted(str(path.relative_to(folder)) for path in _left_over(folder)),
    }


def _left_over(folder: Path) -> list[Path]:
    """Half-written files and folders; W&B's own hidden files are not ours."""
    return [
        path
        for path in folder.rglob(".*")
        if "wandb" not in path.relative_to(folder).parts and path.name != ".shared"
    ]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what is not equal in two outcomes; files are named."""
    names = [name for name in one if one[name] != other[name]]
    return [f"left over: {one[name]}" if name == "left over" else name for name in names]


def state_after(round_index: int) -> ServerState:
    """A state of half a megabyte that is different after every round."""
    generator = torch.Generator().manual_seed(7)
    modules = {}
    for index in range(8):
        A, B = torch.randn(32, 256, generator=generator), torch.randn(256, 32, generator=generator)
        A[0, 0] = B[0, 0] = round_index
        modules[f"layers.{index}.q_proj"] = LoraFactors(A, B, 16 / 32)
    return ServerState(round_index, AdapterState(modules))


@dataclass(frozen=True)
class KilledWriter:
    """What a process left that was killed while it wrote checkpoints.

    Attributes:
        written: the last round whose checkpoint was there for certain.
        found: the round of the newest readable checkpoint.
        half_written: whether there was a checkpoint that was not yet whole.
        problem: what is wrong; None if nothing is.
    """

    written: int
    found: int | None
    half_written: bool
    problem: str | None


def kill_while_writing(folder: Path, draw: np.random.Generator) -> KilledWriter:
    """Kill -9 a process that does nothing but write a checkpoint for round after round, at a moment drawn at random."""
    folder.mkdir(parents=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = _preloaded_context().Process(target=_write_checkpoints, args=(str(folder), sender), daemon=True)
    process.start()
    sender.close()
    written = [receiver.recv() for _ in range(3)]
    began = time.monotonic()
    written.append(receiver.recv())
    one_write_s = time.monotonic() - began
    time.sleep(float(draw.uniform(0.0, 3.0)) * one_write_s)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        while True:
            written.append(receiver.recv())
    except EOFError:
        pass
    half_written = any(path.name.startswith(".") for path in folder.iterdir())
    state = load_newest_checkpoint(folder)
    problem = None
    if state is None or not written[-1] <= state.round_index <= written[-1] + 1:
        problem = "the newest readable checkpoint is older than one interval"
    elif not state.adapter.equal(state_after(state.round_index).adapter):
        problem = "the newest readable checkpoint holds something else"
    return KilledWriter(written[-1], None if state is None else state.round_index, half_written, problem)


def _write_checkpoints(folder: str, written: Any) -> None:
    torch.set_num_threads(1)
    round_index = 1
    while True:
        save_checkpoint(state_after(round_index), Path(folder), keep_last=2)
        written.send(round_index)
        round_index += 1
