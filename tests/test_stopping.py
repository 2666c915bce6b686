"""Requests to stop, without a run: signals as they come, the limit on wall time, and the order of reasons."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.comm.agree import first_reason
from fedsim.comm.group import Group, SoloGroup
from fedsim.stopping import SAME_REQUEST_S, StopRequests, StopWatch, TimeBudget, signals_noted
from tests.helpers import run_ranks


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def deliver(*signals: tuple[float, signal.Signals], failing: bool = False) -> tuple[str | None, list[int]]:
    """What is noted, and the exit codes with which the process would have ended."""
    clock, ended = Clock(), list[int]()
    requests = StopRequests(ended.append, clock)
    if failing:
        requests.failing()
    for at_s, number in signals:
        clock.now_s = 100.0 + at_s
        requests.got(number)
    return requests.reason, ended


def test_signals() -> None:
    usr1, usr2, term, interrupt = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT
    assert deliver() == (None, [])
    assert deliver((0, usr1), (1, usr1), (60, usr2)) == ("SIGUSR1", [])
    assert deliver((0, term)) == ("SIGTERM", [])
    # the terminal or Slurm, and then the launcher, which passes it on
    assert deliver((0, interrupt), (0.1, interrupt), (0.2, term)) == ("SIGINT", [])
    assert deliver((0, term), (SAME_REQUEST_S, term)) == ("SIGTERM", [128 + 15])
    assert deliver((0, interrupt), (0.1, interrupt), (5, interrupt)) == ("SIGINT", [130])
    # the warning before a time limit, and then the first SIGTERM
    assert deliver((0, usr1), (300, term)) == ("SIGUSR1", [])
    assert deliver((0, usr1), (300, term), (330, term)) == ("SIGUSR1", [143])
    assert deliver((0, term), failing=True)[1] == [143]


def test_signals_are_noted_though_the_main_thread_is_busy() -> None:
    requests = StopRequests()
    before = signal.getsignal(signal.SIGTERM)
    with signals_noted(requests):
        os.kill(os.getpid(), signal.SIGUSR2)
        deadline = time.monotonic() + 60
        while requests.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert requests.reason == "SIGUSR2"
    assert signal.getsignal(signal.SIGTERM) == before


STUCK = """
import os, sys, threading
from fedsim.stopping import StopRequests, signals_noted
requests = StopRequests()
with signals_noted(requests):
    if sys.argv[1] == "failing":
        requests.failing()
    os.write(1, b"ready\\n")
    # as in a collective: the main thread does not come back to the interpreter. A read of a pipe that Python's own
    # os.read would repeat; libc's is repeated by the kernel.
    import ctypes
    ends = os.pipe()
    ctypes.CDLL(None).read(ends[0], ctypes.create_string_buffer(1), 1)
"""


def test_a_process_that_hangs_in_a_library_ends_at_a_signal_once_it_fails() -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK, "failing"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM


FORKED = """
import os, signal, time
from fedsim.stopping import StopRequests, signals_noted
requests = StopRequests()
with signals_noted(requests):
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say, b"x")
        time.sleep(30)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.2)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "lived", requests.reason)
"""


def test_a_signal_to_a_forked_process_is_not_one_to_its_parent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "15 None\n"


def test_a_limit_on_wall_time_is_judged_by_the_longest_round() -> None:
    clock = Clock()
    budget = TimeBudget(600.0, 100.0, clock)
    clock.now_s = 200.0  # set-up
    budget.rounds_begin()
    assert budget.reason() is None
    for ends_s, fits in ((300, True), (450, True), (500, True), (550, True), (551, False)):
        clock.now_s = float(ends_s)
        if ends_s != 551:
            budget.round_over()
        assert (budget.reason() is None) == fits, ends_s  # 100 + 600 - 150 = 550
    assert str(budget.reason()).startswith("run.max_minutes=10: 7.52 are spent")
    assert TimeBudget(None, 0.0, clock).reason() is None
    late = TimeBudget(10.0, 0.0, clock)
    assert late.reason() is not None, "set-up alone has taken longer"


def test_reasons_and_the_files_behind_them(tmp_path: Path) -> None:
    requests, ours, theirs = StopRequests(), tmp_path / "run" / "stop", tmp_path / "batch.stop"
    watch = StopWatch(requests, ours, [theirs], TimeBudget(None, 0.0))
    assert watch.reason() is None
    theirs.touch()
    assert watch.reason() == f"the stop file {theirs}"
    watch.obeyed()
    assert theirs.exists(), "it belongs to the batch script"
    ours.parent.mkdir()
    ours.touch()
    assert watch.reason() == f"the stop file {ours}"
    watch.obeyed()
    assert not ours.exists()
    requests.got(signal.SIGUSR1)
    assert watch.reason() == "SIGUSR1"


def exchange_reasons(group: Group, reasons: list[str | None]) -> str | None:
    return first_reason(group, reasons[group.rank])


@pytest.mark.parametrize(
    ("reasons", "agreed"),
    [
        ([None, None], None),
        ([None, "SIGUSR1"], "SIGUSR1 on rank 1"),
        (["SIGTERM", "SIGTERM"], "SIGTERM"),
    ],
)
def test_ranks_agree(reasons: list[str | None], agreed: str | None, tmp_path: Path) -> None:
    assert run_ranks(exchange_reasons, 2, tmp_path, reasons) == [agreed] * 2
    assert first_reason(SoloGroup(), reasons[0]) == reasons[0]
