"""What the world does to a run: full disks, deleted folders, clocks that jump, W&B's process that dies, two at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.simulation import export, records, rounds
from fedsim.tracking import run_folder
from tests.faults.harness import Injection, _on_a_full_disk, differences, outcome, run, start

ROOT = Path(__file__).resolve().parents[2]

FULL: dict[str, tuple[str, Any, int, str]] = {
    "the record": ("append", records.MetricsLog, 2, "metrics.jsonl cannot be written"),
    "the client table": ("flush", records.ClientTable, 2, "clients.parquet must be writable"),
    "the adapter": ("_export", export, 1, "adapter must be writable"),
    "the end": ("finish", run_folder.RunFolder, 1, "run.json must be writable"),
}  # fmt: skip
"""What is written when the disk is full -> attribute, its owner, which call, what the message says."""


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_fills_up(
    case: str, program: Any, twin: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, owner, which, message = FULL[case]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, on_a_full_disk(getattr(owner, name), which))
        assert program.run() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "File too large" in line
    assert program.run() == 0
    assert differences(outcome(program.run_folder), twin()) == []


def on_a_full_disk(function: Callable[..., Any], which: int) -> Callable[..., Any]:
    """The function; its call number `which` finds room for ten bytes more than nothing."""
    calls = 0

    def call(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == which:
            return _on_a_full_disk(10, function, *arguments, **named)
        return function(*arguments, **named)

    return call


@pytest.mark.parametrize("strategy", ["fedavg", "fedsa"])
def test_a_run_folder_that_is_deleted(
    strategy: str, program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not made anew with a part of the record, and what somebody put in its place is not touched."""
    train = rounds.run_round

    def delete_and_train(state: Any, run: Any) -> Any:
        if state.round_index == 1:
            program.run_folder.rename(
                program.folder / "gone"
            )  # whole, since a checkpoint may be on its way into it
            shutil.rmtree(program.folder / "gone", ignore_errors=True)
        return train(state, run)

    monkeypatch.setattr(rounds, "run_round", delete_and_train)
    assert program.run(f"strategy.name={strategy}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert ("must stay where it is while a run uses it" in line) == (strategy == "fedavg"), line
    assert not program.run_folder.exists()


def test_a_run_folder_that_is_replaced(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = rounds.run_round

    def replace_and_train(state: Any, run: Any) -> Any:
        if state.round_index == 2:
            program.run_folder.rename(program.run_folder.with_name("moved"))
            program.run_folder.mkdir()
            (program.run_folder / "run.lock").touch()
        return train(state, run)

    monkeypatch.setattr(rounds, "run_round", replace_and_train)
    assert program.run() == 2
    assert "was deleted or moved; put it back" in capsys.readouterr().err
    assert [path.name for path in program.run_folder.iterdir()] == ["run.lock"]


def test_clocks_that_jump(program: Any, twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day goes back and forth by years between any two looks at it."""
    jumps = iter(range(1, 10_000))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 1e9 + (-1) ** next(jumps) * 1e8)
        patch.setattr(run_folder, "_now", lambda: f"19{70 + next(jumps) % 30}-01-01T00:00:00+00:00")
        assert program.run("run.rounds=2") == 0
        assert program.run() == 0
    assert differences(outcome(program.run_folder), twin()) == []


def children(parent: int) -> dict[int, str]:
    """Process id -> command line of the processes that a process has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue
    return found


def test_a_wandb_process_that_dies(
    program: Any, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any
) -> None:
    """The run goes on without its mirror, and says so once."""
    train = rounds.run_round
    killed = []

    def kill_and_train(state: Any, run: Any) -> Any:
        if state.round_index == 1:
            services = [pid for pid, command in children(os.getpid()).items() if "wandb-core" in command]
            for pid in services:
                os.kill(pid, signal.SIGKILL)
            killed.extend(services)
        return train(state, run)

    monkeypatch.setattr(rounds, "run_round", kill_and_train)
    assert program.run("tracking.wandb.mode=offline", "run.rounds=4") == 0
    assert killed
    assert caplog.text.count("is off for the rest of this run; its record is the run folder") == 1
    assert len(outcome(program.run_folder)["metrics"]) == 4
    assert "Traceback" not in capfd.readouterr().err


def test_two_runs_in_one_folder(program: Any) -> None:
    """The second one is told who holds the folder, and the first one is none the worse for it."""
    frozen = Injection("fedsim.simulation.rounds:run_round", "stop", call=2)
    first = start(program.arguments(), 1, program.folder, [frozen])
    deadline = time.monotonic() + 240
    while not (program.run_folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (second,) = run(program.arguments(["run.rounds=9"]), 1, program.folder, timeout_s=240)
    assert second.code == 2, second.errors
    assert (
        f"is in use by another process (host {os.uname().nodename}, pid {first.processes[0].pid}"
        in second.errors
    )
    first.signal(signal.SIGCONT)
    (ended,) = first.wait(240)
    assert ended.code == 0, ended.errors
    assert outcome(program.run_folder)["status"] == "finished"


def test_torchrun_starts_the_ranks_again(program: Any, twin: Any) -> None:
    """`--max-restarts` recovers from a killed rank if the new ranks do not read the dead ones' addresses in a store."""
    program.settings["comm.timeout_s"] = 60
    script = program.folder / "die_once.py"
    mark = program.folder / "died"
    script.write_text(
        "import os, pathlib, sys\n"
        "from fedsim.simulation import rounds\n"
        "from fedsim.main import _leave, main\n"
        "train, mark = rounds.run_round, pathlib.Path(sys.argv[1])\n"
        "def die(state, run):\n"
        "    if state.round_index == 1 and run.group.rank == 1 and not mark.exists():\n"
        "        mark.touch()\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return train(state, run)\n"
        "rounds.run_round = die\n"
        "_leave(main(sys.argv[2:]))\n"
    )
    torchrun = [
        "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=1",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(mark), *program.arguments()],
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert mark.exists()
    assert done.returncode == 0, done.stderr
    assert differences(outcome(program.run_folder), twin()) == []
