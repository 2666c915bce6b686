"""Runs that are asked to stop: they leave a checkpoint, say so, and end with the bits of an uninterrupted run."""

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedsim.simulation import entry, prepare, rounds
from fedsim.stopping import EXIT_PREEMPTED, TimeBudget
from tests.e2e.conftest import small_program
from tests.e2e.test_e2e_run import adapter_bytes, client_columns, read_metrics, run_record, without_clock

ROUNDS = 10
COMMAND = [f"run.rounds={ROUNDS}", "training.optimizer.lr=0.05", "lora.dropout=0.1"]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path) -> Path:
    """The run folder of the same command, never interrupted."""
    program = small_program(tmp_path_factory.mktemp("twin"), model_folder, corpus_file)
    assert program.run(*COMMAND) == 0
    return program.run_folder


def check_resumes_to(twin: Path, program: Any, *extra: str) -> None:
    """The same command again, on one process, ends where the twin did."""
    assert program.run(*COMMAND, *extra) == 0
    folder = program.run_folder
    assert adapter_bytes(folder) == adapter_bytes(twin)
    assert without_clock(folder) == without_clock(twin)
    assert client_columns(folder) == client_columns(twin)
    record = run_record(folder)
    assert (record["status"], record["reason"], record["user_error"]) == ("finished", None, None)
    assert [start["status"] for start in record["history"]] == ["preempted"]


def in_mid_run(folder: Path, act: Callable[[list[int]], None]) -> Callable[[list[int]], None]:
    """Does `act` with the processes' ids when two rounds are recorded."""

    def wait_and_act(pids: list[int]) -> None:
        deadline = time.monotonic() + 180
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < deadline, "no round in three minutes"
            time.sleep(0.01)
        act(pids)

    return wait_and_act


def usr1_to_one(pids: list[int]) -> None:
    os.kill(pids[1], signal.SIGUSR1)


def term_to_all_twice(pids: list[int]) -> None:
    """As when Slurm signals every process, and torchrun passes on what it got."""
    for pid in [*pids, *pids]:
        os.kill(pid, signal.SIGTERM)


def stop_file(pids: list[int], folder: Path) -> None:
    (folder / "stop").touch()


@pytest.mark.parametrize("how", ["SIGUSR1 on rank 1", "SIGTERM", "the stop file"])
def test_two_processes_stop_together(how: str, program: Any, twin: Path) -> None:
    folder = program.run_folder
    act = {
        "SIGUSR1 on rank 1": usr1_to_one,
        "SIGTERM": term_to_all_twice,
        "the stop file": partial(stop_file, folder=folder),
    }[how]
    rarely = "checkpoint.every_rounds=100"  # so that the one at the stop is not due
    ended = program.start_ranks(2, *COMMAND, rarely, timeout_s=120, meanwhile=in_mid_run(folder, act))
    assert [code for code, _ in ended] == [EXIT_PREEMPTED] * 2, ended
    record = run_record(folder)
    done = len(read_metrics(folder))
    assert 2 <= done < ROUNDS
    assert (record["status"], record["user_error"]) == ("preempted", None)
    assert record["reason"].startswith(how)
    assert record["reason"].endswith(f", after round {done} of {ROUNDS}")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"round_{done:06d}"]
    assert not (folder / "stop").exists()
    told = ["stopped on request" in errors for _, errors in ended]
    assert told == [True, False], "one process speaks"
    check_resumes_to(twin, program, rarely)


def test_limit_on_wall_time(program: Any, twin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(0, 10**6, 60))  # a minute passes at each look at the clock

    def budget(max_s: float | None, began_s: float) -> TimeBudget:
        return TimeBudget(max_s, float(next(now_s)), lambda: float(next(now_s)))

    with monkeypatch.context() as patch:
        patch.setattr(entry, "TimeBudget", budget)
        assert program.run(*COMMAND, "run.max_minutes=13") == EXIT_PREEMPTED
    record = run_record(program.run_folder)
    done = len(read_metrics(program.run_folder))
    assert 1 < done < ROUNDS
    # two looks a round, so a round takes two minutes
    assert record["reason"].startswith("run.max_minutes=13: ")
    assert record["reason"].endswith(f"the longest round took 2, after round {done} of {ROUNDS}")
    check_resumes_to(twin, program)


def test_no_time_even_to_begin(program: Any, twin: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert program.run(*COMMAND, "run.max_minutes=0.0001") == EXIT_PREEMPTED
    assert "fedsim: stopped on request (run.max_minutes=0.0001: " in capsys.readouterr().err
    assert run_record(program.run_folder)["status"] == "preempted"
    check_resumes_to(twin, program)


@pytest.mark.parametrize("stage", ["build_data", "build_base"])
def test_signal_during_the_start(
    stage: str, program: Any, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = getattr(prepare, stage)

    def build_and_get_a_signal(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return build(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, stage, build_and_get_a_signal)
        assert program.run(*COMMAND) == EXIT_PREEMPTED
    record = run_record(program.run_folder)
    when = {"build_data": "before the base was loaded", "build_base": "before round 1"}[stage]
    assert (record["status"], record["reason"]) == ("preempted", f"SIGTERM, {when}")
    assert not (program.run_folder / "metrics.jsonl").exists()
    check_resumes_to(twin, program)


@pytest.mark.parametrize("variable", ["FEDSIM_STOP_FILE", "FEDSIM_LAUNCHER_STOP_FILE"])
def test_stop_file_of_what_started_the_run(
    variable: str, program: Any, twin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = program.folder / "batch.stop"
    theirs.touch()
    with monkeypatch.context() as patch:
        patch.setenv(variable, str(theirs))
        assert program.run(*COMMAND) == EXIT_PREEMPTED
    assert theirs.exists()
    check_resumes_to(twin, program)


def test_a_stop_in_the_last_round_is_the_end(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = rounds.run_round

    def train_and_get_a_signal(state: Any, run: Any) -> Any:
        result = train(state, run)
        if state.round_index == 2:
            (program.run_folder / "stop").touch()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "run_round", train_and_get_a_signal)
        assert program.run() == 0
    assert run_record(program.run_folder)["status"] == "finished"
    assert not (program.run_folder / "stop").exists(), "else the run could not be extended"
    assert program.run("run.rounds=4") == 0
    assert len(read_metrics(program.run_folder)) == 4


def test_torchrun_does_not_restart_what_was_asked_to_stop(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = program.folder / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    for restarts, code in (("1", 0), ("2", EXIT_PREEMPTED)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert program.run("run.max_minutes=0.0001") == code
    assert "stopped on request (run.max_minutes" in json.loads(report.read_text())["message"]["message"]


def test_a_rank_that_is_killed(program: Any, twin: Path) -> None:
    folder = program.run_folder

    def kill_one(pids: list[int]) -> None:
        os.kill(pids[2], signal.SIGKILL)

    ended = program.start_ranks(3, *COMMAND, timeout_s=120, meanwhile=in_mid_run(folder, kill_one))
    assert [code for code, _ in ended] == [1, 1, -signal.SIGKILL], ended
    for rank, (_, errors) in enumerate(ended[:2]):
        lines = [line for line in errors.splitlines() if line.startswith("fedsim")]
        assert len(lines) == 1, errors
        assert lines[0].startswith(f"fedsim [rank {rank}]: LostRankError: ")
        assert "Traceback" not in errors
    assert ", round " in ended[0][1] or "recording round" in ended[0][1]
    assert "rank 2 (last seen at: " in ended[0][1]
    assert "ended or stopped" in ended[0][1]
    record = run_record(folder)
    assert (record["status"], record["user_error"]) == ("failed", False)
    assert "LostRankError" in (folder / "logs" / "rank_0001.log").read_text()
    assert program.run(*COMMAND) == 0
    assert adapter_bytes(folder) == adapter_bytes(twin)
    assert without_clock(folder) == without_clock(twin)


def test_told_to_end_while_it_waits_for_a_rank_that_hangs(program: Any) -> None:
    """As torchrun does it: one SIGTERM, because another process has failed. The limit of an exchange is far away."""

    def stop_one_end_the_other(pids: list[int]) -> None:
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(pids[0], signal.SIGTERM)
        deadline = time.monotonic() + 120
        while Path(f"/proc/{pids[0]}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(pids[1], signal.SIGKILL)

    meanwhile = in_mid_run(program.run_folder, stop_one_end_the_other)
    ended = program.start_ranks(2, *COMMAND, meanwhile=meanwhile)
    assert ended[0][0] == 128 + signal.SIGTERM, ended
    assert "ending as asked, since rank 1 has ended or is stopped" in ended[0][1]


def test_whose_fault_a_failure_is(program: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`user_error` says so, also of failures before the first record where the launcher has made the folder."""
    (program.run_folder / "slurm").mkdir(parents=True)
    assert program.run("data.text_field=body") == 2
    record = run_record(program.run_folder)
    assert (record["status"], record["user_error"]) == ("failed", True)
    assert record["reason"].startswith("DataError: ")

    def breaks(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "build_base", breaks)
        with pytest.raises(RuntimeError):
            program.run()
    record = run_record(program.run_folder)
    assert (record["status"], record["user_error"]) == ("failed", False)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "run_round", breaks)
        with pytest.raises(RuntimeError):
            program.run()
    assert run_record(program.run_folder)["user_error"] is False
    assert program.run("run.rounds=1") == 0
    assert [start["status"] for start in run_record(program.run_folder)["history"]] == ["failed"] * 3
    # what is finished stays so if it cannot be extended
    assert program.run("run.rounds=2", "lora.rank=3") == 2
    assert run_record(program.run_folder)["status"] == "finished"
