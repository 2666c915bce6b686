"""`python -m launch sweep`: the arms, their names, and running them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim.errors import ConfigError
from launch.__main__ import main
from launch.local import Machine, Plan
from launch.sweep import make_arms, plan_sweep, run_all

ROOT = Path(__file__).resolve().parents[2]
ALPHAS = "data.partition.dirichlet_alpha=0.1,1"


def test_grids_are_combined_and_extra_arms_stand_beside_them():
    arms = make_arms([ALPHAS, "lora.rank=2,4"], ["data.partition.name=iid"], [0, 7])
    assert [arm.name for arm in arms] == [
        f"{point}-seed_{seed}"
        for point in (
            "dirichlet_alpha_0.1-rank_2", "dirichlet_alpha_0.1-rank_4", "dirichlet_alpha_1-rank_2",
            "dirichlet_alpha_1-rank_4", "name_iid",
        )
        for seed in (0, 7)
    ]  # fmt: skip
    assert arms[-1].overrides == ("data.partition.name=iid", "run.seed=7")


def test_without_any_point_the_seeds_remain():
    assert [arm.name for arm in make_arms([], [], [3, 4])] == ["seed_3", "seed_4"]
    assert [arm.name for arm in make_arms([], [], [])] == [""]


@pytest.mark.parametrize(
    ("grids", "arms", "message"),
    [
        (["lora.rank"], [], "KEY=VALUE"),
        (["rank=1"], [], "KEY=VALUE"),
        ([], ["lora.rank=2", "lora.rank=2"], "rank_2"),
        ([], ["foo"], r"--arm must be KEY=VALUE\[,KEY=VALUE...\], got 'foo'"),
        (["run.name=a,b"], [], "run.name must not differ between arms"),
    ],
)
def test_arms_that_cannot_be_told_apart_or_read_are_refused(grids, arms, message):
    with pytest.raises(ConfigError, match=message):
        make_arms(grids, arms, [])


def test_every_configuration_is_checked_before_anything_starts():
    machine = Machine(0, 2)
    plans = plan_sweep(["run.rounds=2"], make_arms([ALPHAS], [], [1]), machine)
    assert [plan.argv[-1] for plan in plans] == [
        "run.name=quickstart-dirichlet_alpha_0.1-seed_1", "run.name=quickstart-dirichlet_alpha_1-seed_1"
    ]  # fmt: skip
    named = plan_sweep(["run.name=mine"], make_arms([], [], [4]), machine)
    assert named[0].argv[-1] == "run.name=mine-seed_4"
    assert "run.name=mine" not in named[0].argv
    assert "--nproc_per_node" in plans[0].argv
    assert "--nproc_per_node" not in plan_sweep([], make_arms([], [], []), Machine(0, 1))[0].argv
    with pytest.raises(ConfigError, match=r"lora\.rank"):
        plan_sweep([], make_arms(["lora.rank=2,0"], [], []), machine)


@pytest.mark.parametrize("option", ["--print", "--dry-run"])
def test_print_shows_the_commands(option, capsys):
    """So does --dry-run where nothing else chooses Slurm."""
    assert main(["sweep", "--grid", ALPHAS, "--seeds", "0,1", option, "run.rounds=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("run.rounds=1" in line and "fedsim.main" in line for line in lines)


@pytest.mark.parametrize("jobs", [1, 3])
def test_all_runs_are_made_and_a_failure_is_told(tmp_path, capsys, jobs):
    def plan(index: int, code: int) -> Plan:
        text = f"import sys, pathlib; pathlib.Path(r'{tmp_path}', '{index}').touch(); sys.exit({code})"
        return Plan((sys.executable, "-c", text), {}, "test")

    codes = [0, 3, 0]
    assert run_all([plan(i, code) for i, code in enumerate(codes)], ["a", "b", "c"], jobs) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    told = capsys.readouterr().err
    assert "2 of 3, b: ended with 3" in told
    assert "3 of 3, c: finished" in told
    assert run_all([plan(9, 0)], ["a"], jobs) == 0


def test_lists_are_one_value():
    """Commas inside of brackets and quotes do not part."""
    grid = "lora.target_modules=[q_proj],[q_proj,v_proj]"
    arms = make_arms([grid], ["data.label_field='a,b',lora.rank=2"], [])
    assert [arm.overrides for arm in arms] == [
        ("lora.target_modules=[q_proj]",),
        ("lora.target_modules=[q_proj,v_proj]",),
        ("data.label_field='a,b'", "lora.rank=2"),
    ]
    assert [arm.name for arm in arms][:2] == ["target_modules__q_proj", "target_modules__q_proj_v_proj"]


def test_seeds_are_given_once():
    with pytest.raises(ConfigError, match="--seeds must hold each seed once, got 0,0"):
        make_arms([], [], [0, 0])


def test_a_sweep_of_nothing_is_refused(capsys):
    assert main(["sweep", "run.rounds=1"]) == 2
    assert "a sweep needs --grid, --arm or --seeds" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_stopped_begins_no_other_run(tmp_path, number):
    """And hands SIGTERM on; a Ctrl-C reaches the runs by itself."""
    work = (
        "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        f"pathlib.Path(r'{tmp_path}', sys.argv[1]).touch(); time.sleep(4 if {int(number)} == 2 else 30)"
    )
    program = (
        "import sys; from launch.local import Plan; from launch.sweep import run_all; "
        f"plans = [Plan((sys.executable, '-c', {work!r}, str(i)), {{}}, 'test') for i in range(3)]; "
        "sys.exit(run_all(plans, ['a', 'b', 'c'], 1))"
    )
    sweep = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "0").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep.send_signal(number)
    _, told = sweep.communicate(timeout=60)
    assert sweep.returncode == 75, told
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert f"launch: stopped by {number.name}" in told
    assert "Traceback" not in told
