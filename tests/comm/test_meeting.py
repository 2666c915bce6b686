"""Processes that die before all have met: the others end within the stated time, and say who is missing."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

JOIN_S, PATIENCE_S, SHORT_S = 4.0, 2.0, 1.0
BOUND_S = 60.0
"""A process that keeps to its limits needs less than 10 s, on a busy machine a few times that; the limits it must not
wait for, those of the library or of the case, are of `FOREVER_S`."""

FOREVER_S = 1000.0

PROGRAM = f"""
import logging, os, signal, sys, time
import torch
from fedsim.comm import meeting
from fedsim.comm.group import join_group
from fedsim.errors import ConfigError, LostRankError

meeting.PATIENCE_S, meeting.SHORT_S = {PATIENCE_S}, {SHORT_S}
logging.basicConfig(level=logging.ERROR, format="%(message)s")
rank, world_size, method, fate = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
join_s = {FOREVER_S} if fate.startswith("says ") else {JOIN_S}
if fate == "dies after joining":
    meeting.MeetingPoint(method, rank, world_size).wait_for_all({JOIN_S})
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "dies with the store":
    store = meeting.MeetingPoint(method, rank, world_size)._open({JOIN_S}, may_hold=True)
    store.wait(["joined/1"])
    os.kill(os.getpid(), signal.SIGKILL)
print("began", flush=True)
try:
    if fate.startswith("says "):
        meeting.MeetingPoint(method, rank, world_size).wait_for_all(join_s, fate.removeprefix("says "))
except ConfigError as error:
    print(f"ConfigError: {{error}}", file=sys.stderr)
    sys.exit(2)
try:
    join_group(rank, world_size, torch.device("cpu"), "gloo", {FOREVER_S}, method, join_timeout_s=join_s)
except LostRankError as error:
    print(f"LostRankError: {{error}}", file=sys.stderr)
    sys.exit(1)
sys.exit(0)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


STARTED: "list[subprocess.Popen[str]]" = []


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    """Processes that still wait when their test has failed end with it."""
    yield
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def start(rank: int, world_size: int, method: str, fate: str, port: int) -> "subprocess.Popen[str]":
    launcher = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world_size),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(rank), str(world_size), method, fate],
        env={**os.environ, **launcher},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def end_of(process: "subprocess.Popen[str]") -> tuple[int, str, float]:
    """Exit code, what it said, and seconds since it began to join."""
    assert process.stdout is not None
    assert process.stdout.readline() == "began\n"
    began = time.monotonic()
    _, said = process.communicate(timeout=2 * BOUND_S)
    return process.returncode, said, time.monotonic() - began


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_one_that_dies_between_joining_and_connecting(store: str, tmp_path: Path) -> None:
    port = free_port()
    method = f"file://{tmp_path / 'meet'}" if store == "file" else "env://"
    other = start(1, 2, method, "dies after joining", port)
    code, said, took_s = end_of(start(0, 2, method, "lives", port))
    other.communicate(timeout=60)

    assert code == 1, said
    assert took_s < BOUND_S, "the library alone would wait for comm.timeout_s"
    assert "the 2 processes must find each other" in said
    assert "comm.join_timeout_s" in said or "could not connect" in said, said


def test_the_store_dies_with_the_rank_that_holds_it() -> None:
    port = free_port()
    holder = start(0, 3, "env://", "dies with the store", port)
    code, said, took_s = end_of(start(1, 3, "env://", "lives", port))
    holder.communicate(timeout=60)

    assert code == 1, said
    assert took_s < BOUND_S
    assert "rank 0" in said


def test_one_that_never_comes_is_named() -> None:
    port = free_port()
    code, said, took_s = end_of(start(0, 2, "env://", "lives", port))

    assert code == 1, said
    assert JOIN_S / 2 < took_s < BOUND_S
    assert "rank 1 had not come" in said


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_processes_on_cpus_and_on_gpus_are_told_so(store: str, tmp_path: Path) -> None:
    """They would wait for each other until the time is over, and blame the network."""
    port = free_port()
    method = f"file://{tmp_path / 'meet'}" if store == "file" else "env://"
    fates = ["says cuda", "says cpu", "says cpu"]
    ends = [
        end_of(process) for process in [start(rank, 3, method, fate, port) for rank, fate in enumerate(fates)]
    ]

    for code, said, took_s in ends:
        assert code == 2, said
        assert (
            "run.device must come to the same on all processes, got the CPU on ranks 1, 2 and a GPU on the"
            in said
        )
        assert took_s < BOUND_S
