"""Site profiles: where they are found, and what is refused."""

from pathlib import Path

import pytest
import yaml

from fedsim.errors import ConfigError
from launch.profile import SiteProfile, find_profile, load_profile
from launch.script import Container
from tests.launch.test_launch_script import job_of

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_profile_is_a_file_or_a_name_that_is_searched_for(tmp_path: Path) -> None:
    home, first, second = tmp_path / "home", tmp_path / "first", tmp_path / "second"
    at_home = write(home / ".config/fedsim/sites/alps.yaml", "")
    in_second = write(second / "alps.yaml", "")
    variables = {"FEDSIM_SITES": f"{first}:{second}"}

    assert find_profile("alps", {}, home) == at_home
    assert find_profile("alps", variables, home) == in_second
    assert find_profile(str(at_home), variables, home) == at_home
    with pytest.raises(
        ConfigError, match=r"unknown profile 'alsp': no alsp\.yaml in .*; did you mean 'alps'\?"
    ):
        find_profile("alsp", variables, home)
    with pytest.raises(ConfigError, match="known are alps"):
        find_profile("jupiter", variables, home)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partiton: gpu", "unknown key partiton; did you mean 'partition'"),
        ("gpus-per-node: 4", "unknown key gpus-per-node; did you mean 'gpus_per_node'"),
        ("container: {image: a, bind: []}", r"unknown key container\.bind; did you mean 'binds'"),
        ("container: {}", r"container\.image: field required"),
        ("time: 4:00:00", "time: input should be a valid string, got 14400"),
        ("gpus_per_node: '4'", "gpus_per_node: input should be a valid integer"),
        ("launcher: mpirun", "launcher: input should be 'torchrun' or 'srun'"),
        ("modules: cuda", "modules: input should be a valid tuple"),
        ("environment: {A B: c}", "environment"),
        ("scratch: /scratch/$NO_SUCH", r"uses \$NO_SUCH, and that variable is not set"),
        ("[gpu]", "must hold keys such as 'partition: gpu'"),
        ("a: [", "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_profile_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "site.yaml", text)

    with pytest.raises(ConfigError, match=message):
        load_profile(path, {})


def test_variables_become_what_they_are_when_it_is_read(tmp_path: Path) -> None:
    text = "{scratch: '/s/$USER', venv: '${HOME}/v', environment: {A: $USER-1}, setup: [echo $USER]}"
    profile = load_profile(write(tmp_path / "site.yaml", text), {"USER": "ada", "HOME": "/home/ada"})

    assert (profile.scratch, profile.venv, dict(profile.environment)) == (
        "/s/ada",
        "/home/ada/v",
        {"A": "ada-1"},
    )
    assert profile.setup == ("echo $USER",)  # for the job's own shell


def test_options_win_over_the_profile(tmp_path: Path) -> None:
    text = (
        "{partition: gpu, time: '60', gpus_per_node: 4, launcher: srun, signal_lead: 100, max_failures: 9, "
        "extra: ['--mail-type END'], container: {image: /a.sif, runtime: pyxis, binds: [/data]}}"
    )
    site = str(write(tmp_path / "site.yaml", text))

    job = job_of(["--profile", site])
    assert (job.resources.partition, job.resources.time, job.launcher) == ("gpu", "60", "srun")
    assert (job.restarts.signal_lead, job.restarts.max_failures) == (100, 9)
    assert job.container == Container("/a.sif", "pyxis", ("/data",))

    given = ["--partition", "cpu", "--gpus-per-node", "0", "--launcher", "torchrun", "--max-failures", "0"]
    job = job_of(["--profile", site, *given, "--container", "/b.sif", "--extra", "--exclusive"])
    assert (job.resources.partition, job.resources.gpus_per_node, job.launcher) == ("cpu", 0, "torchrun")
    assert job.restarts.max_failures == 0
    assert job.resources.extra == ("--mail-type END", "--exclusive")
    assert job.container == Container("/b.sif", "pyxis", ("/data",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time: soon", "--time must be minutes"),
        ("container: {image: a, binds: ['/a,/b']}", r"container\.binds must be folders without commas"),
        ('partition: "a\\nb"', "partition must be one line of printable text"),
    ],
)
def test_values_of_a_profile_are_checked_as_options_are(tmp_path: Path, text: str, message: str) -> None:
    site = str(write(tmp_path / "site.yaml", text))

    with pytest.raises(ConfigError, match=message):
        job_of(["--profile", site])


def test_the_example_names_every_key_and_is_accepted() -> None:
    path = ROOT / "slurm" / "sites" / "example.yaml"
    text = path.read_text(encoding="utf-8")

    profile = load_profile(path, {"USER": "ada", "HOME": "/home/ada"})

    assert profile.scratch == "/tmp/ada"
    assert [
        name for name in SiteProfile.model_fields if f"\n{name}:" not in text and f"# {name}:" not in text
    ] == []
    commented = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if line.startswith(("# container", "#   "))
    )
    hidden = yaml.safe_load(commented.partition("container:")[2].join(["container:", ""]))
    assert (
        SiteProfile.model_validate({"container": {**hidden["container"], "binds": ("/data",)}}).container
        is not None
    )
