"""The launcher for one machine: what it would execute, word for word, and what it refuses."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.config.loader import load_config
from fedsim.errors import ConfigError
from fedsim.stopping import LAUNCHER_STOP_FILE_VARIABLE, SAME_REQUEST_S
from launch.local import Machine, choose_processes, count_cores, count_gpus, main, plan_local

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch_local.txt"

CPU = Machine(num_gpus=0, num_cores=8)
GPUS = Machine(num_gpus=4, num_cores=64)

CASES = [
    ("embedded quick start, 8 cores", CPU, [], None),
    ("2 threads a process, 8 cores", CPU, ["run.threads_per_process=2"], None),
    ("4 GPUs", GPUS, ["run.rounds=20"], None),
    ("4 GPUs, but the CPU is wanted", GPUS, ["run.device=cpu"], None),
    ("3 processes by request", CPU, [], 3),
    ("1 process by request: no torchrun", CPU, ["run.name=alone"], 1),
    ("more cores than threads", Machine(0, 2), ["run.threads_per_process=16"], None),
    ("a cohort smaller than the machine", GPUS, ["cohort.size=2"], None),
    ("a fraction of the clients", Machine(0, 64), ["cohort.fraction=0.25"], None),
    ("a fraction that is rounded down", Machine(0, 64), ["cohort.fraction=0.18"], None),
    ("any number of clients", Machine(0, 64), ["cohort.fraction=0.18", "cohort.sampling=poisson"], None),
    ("a fixed cohort in packs", Machine(0, 64), ["cohort.client_ids=[1,2,5]", "training.pack.num_packs=2"], None),
    ("centralized: one virtual client", GPUS, ["strategy.name=centralized"], None),
    ("words that a shell would read", CPU, ["lora.target_modules=[fc1, fc2]", "data.source=./my data/$x.jsonl"], None),
]  # fmt: skip


def as_text(case: str, machine: Machine, arguments: list[str], processes: int | None) -> str:
    plan = plan_local(load_config(None, arguments), machine, arguments, processes, python="python")
    return f"# {case}\n# {plan.reason}\n{plan.as_text()}\n"


def test_commands_are_those_of_the_golden_file(refresh_golden: bool) -> None:
    text = "\n".join(as_text(*case) for case in CASES)
    if refresh_golden:
        GOLDEN.write_text(text, encoding="utf-8")

    assert GOLDEN.exists(), f"{GOLDEN} is missing; pytest --refresh-golden writes it"
    assert GOLDEN.read_text(encoding="utf-8") == text


def test_the_printed_line_gives_a_shell_the_same_words() -> None:
    arguments = ["lora.target_modules=[q_proj, v_proj]", "data.source=./my data/$x.jsonl"]
    plan = plan_local(load_config(None, arguments), CPU, arguments, python="/opt/a python")

    words = shlex.split(plan.as_text())

    assert words == ["OMP_NUM_THREADS=1", *plan.argv]


def test_cuda_without_a_gpu_needs_a_number() -> None:
    config = load_config(None, ["run.device=cuda"])

    with pytest.raises(ConfigError, match=r"--processes must be given when run\.device is cuda"):
        choose_processes(config, CPU)
    assert "--nproc_per_node 2" in plan_local(config, CPU, ["run.device=cuda"], 2).as_text()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("0", 1), ("0,1,3", 3), ("GPU-8a1b, MIG-77", 2), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,-1,2", 1)],
)
def test_gpus_are_counted_as_cuda_reads_its_variable(visible: str, expected: int, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()

    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == expected


def test_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia0p1", "sda1"):
        (tmp_path / name).touch()

    assert count_gpus({}, tmp_path) == 3
    assert count_gpus({}, tmp_path / "absent") == 0


def test_at_least_one_core_is_there() -> None:
    assert count_cores() >= 1


def launch(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["lokal"], "unknown command 'lokal'; commands are local"),
        (["local", "lora.rnk=4"], "ConfigError: unknown key lora.rnk; did you mean 'lora.rank'?"),
        (["local", "cohort.size=50"], "ConfigError: cohort.size must be in"),
        (["local", "--threads", "2", "run.threads_per_process=1"], "must be set once"),
        (["local", "--processes", "0"], "must be a whole number in [1, 999999], got '0'"),
        (["local", "--dry-run"], "unrecognized arguments: --dry-run; those of fedsim.main stand behind --"),
        (["local", "--", "--no-such-option"], "unknown option '--no-such-option'"),
        (["local", "no-such-file.yaml"], "configuration file 'no-such-file.yaml' does not exist"),
    ],
)
def test_what_is_wrong_is_said_once_before_anything_starts(arguments: list[str], complaint: str) -> None:
    done = launch(*arguments)

    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_print_prints_the_command_and_starts_nothing() -> None:
    done = launch("local", "--print", "--processes", "2", "--threads", "3", "lora.rank=4", "--", "--dry-run")

    assert done.returncode == 0
    assert done.stdout == (
        f"OMP_NUM_THREADS=3 {shlex.quote(sys.executable)} -m torch.distributed.run --standalone --nproc_per_node 2 "
        "-m fedsim.main lora.rank=4 run.threads_per_process=3 --dry-run\n"
    )


def test_the_process_becomes_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    # variables of a launcher around this one would make a single process wait for others
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "OMP_NUM_THREADS": "9", "MY_OWN": "kept"}.items():
        monkeypatch.setenv(name, value)

    main(["--processes", "1", "lora.rank=4"])

    ((program, argv, environment),) = started
    assert (program, *argv) == (sys.executable, sys.executable, "-m", "fedsim.main", "lora.rank=4")
    assert not {"RANK", "WORLD_SIZE"} & set(environment)
    assert (environment["OMP_NUM_THREADS"], environment["MY_OWN"]) == ("1", "kept")
    assert capsys.readouterr().err == "launch: 1 process: as asked for\n"


WORKER = """
import os, pathlib, signal, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
{what}
"""


def agent(folder: Path, what: str) -> "subprocess.Popen[str]":
    """`launch.agent` with two processes that do `what`, once both are there."""
    (folder / "worker.py").write_text(WORKER.format(what=what))
    (folder / "there").mkdir()
    words = ["-m", "launch.agent", "--standalone", "--nproc_per_node", "2"]
    started = subprocess.Popen(
        [sys.executable, *words, str(folder / "worker.py"), str(folder / "there")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list((folder / "there").iterdir())) < 2:
        assert started.poll() in (None, 2), started.communicate()
        time.sleep(0.1)
    return started


def test_the_code_is_that_of_the_processes_without_a_report_of_torchrun(tmp_path: Path) -> None:
    ended = agent(tmp_path, "time.sleep(2); sys.stderr.write('one line\\n'); sys.exit(2)")

    _, told = ended.communicate(timeout=60)
    assert (ended.returncode, set(told.splitlines())) == (2, {"one line"})


def test_a_process_that_was_killed_is_named(tmp_path: Path) -> None:
    ended = agent(tmp_path, "os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)")

    _, told = ended.communicate(timeout=60)
    assert ended.returncode == 137
    assert "launch: rank 1 was ended by SIGKILL; the machine may have run out of memory" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_asks_the_run_to_stop(number: signal.Signals, tmp_path: Path) -> None:
    what = (
        f"while not os.path.exists(os.environ[{LAUNCHER_STOP_FILE_VARIABLE!r}]): time.sleep(0.1)\n"
        "time.sleep(1); sys.exit(75)"
    )
    stopped = agent(tmp_path, what)

    stopped.send_signal(number)

    _, told = stopped.communicate(timeout=60)
    assert (stopped.returncode, told) == (75, "")


def test_a_second_signal_ends_the_run(tmp_path: Path) -> None:
    stubborn = agent(tmp_path, "time.sleep(100)")
    stubborn.send_signal(signal.SIGTERM)
    time.sleep(SAME_REQUEST_S + 0.5)
    assert stubborn.poll() is None
    stubborn.send_signal(signal.SIGTERM)

    _, told = stubborn.communicate(timeout=60)
    assert (stubborn.returncode, "Traceback" in told) == (128 + signal.SIGTERM, False), told
