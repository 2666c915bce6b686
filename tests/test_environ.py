"""The mapping of Slurm's variables to those of torch, on environments recorded on a Slurm (22.05) of two nodes."""

import json
import subprocess
from pathlib import Path

import pytest

from fedsim.comm.group import World, world_from_environment
from fedsim.environ import NUM_PORTS, host_names, map_environment, step_port, tasks_per_node
from fedsim.errors import ConfigError

RECORDED = Path(__file__).parent / "golden" / "slurm_environments.json"


def recorded(name: str) -> dict[str, str]:
    environment: dict[str, str] = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    return environment


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("step, task 3 of 4", World(3, 1, 4, 2)),
        ("step of 3, task 1", World(1, 1, 3, 2)),
        ("step of 3, task 2", World(2, 0, 3, 1)),
        ("step with PMI-2, task 0", World(0, 0, 4, 2)),
        ("array element, task 1 of 2", World(1, 1, 2, 2)),
    ],
)
def test_a_task_of_a_step_gets_its_place(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*arguments: object, **named: object) -> None:
        raise AssertionError("containers have no scontrol")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    environment = recorded(name)
    map_environment(environment)
    assert world_from_environment(environment) == world
    assert environment["MASTER_ADDR"] == "n1"
    assert 20000 <= int(environment["MASTER_PORT"]) < 32768


@pytest.mark.parametrize("name", ["batch script", "salloc shell", "interactive step", "step of one task"])
def test_one_process_stays_alone(name: str) -> None:
    """Job values say 4 tasks in the first three of them, and only one process runs."""
    environment = recorded(name)
    before = dict(environment)
    map_environment(environment)
    assert environment == before
    assert world_from_environment(environment) == World()


def test_what_a_launcher_has_set_stands() -> None:
    environment = recorded("torchrun inside srun, rank 3")
    before = dict(environment)
    map_environment(environment)
    assert environment == before
    assert world_from_environment(environment) == World(3, 1, 4, 2)


def test_an_address_that_is_set_stands() -> None:
    environment = recorded("step, task 3 of 4") | {"MASTER_ADDR": "ib-n1", "MASTER_PORT": "1234"}
    map_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("ib-n1", "1234")


def test_all_tasks_of_a_step_meet_at_one_place_and_steps_and_jobs_do_not() -> None:
    three = [recorded("step of 3, task 1"), recorded("step of 3, task 2")]
    for environment in three:
        map_environment(environment)
    assert three[0]["MASTER_PORT"] == three[1]["MASTER_PORT"]
    ports = [step_port(job, step) for job in range(1000, 1000 + NUM_PORTS // 97) for step in range(97)]
    assert len(set(ports)) == len(ports)
    assert step_port(2**31, 4294967290) < 29000


def test_a_stale_half_of_a_world_does_not_count() -> None:
    environment = recorded("step, task 3 of 4") | {"WORLD_SIZE": "1"}
    map_environment(environment)
    assert world_from_environment(environment) == World(3, 1, 4, 2)


@pytest.mark.parametrize(
    ("name", "changes", "fragments"),
    [
        ("step, task 3 of 4", {"RANK": "0", "WORLD_SIZE": "1"}, ["4 tasks", "WORLD_SIZE=1", "srun python -m"]),
        (
            "torchrun inside srun, rank 3",
            {"GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "2", "RANK": "1"},
            ["2 tasks", "GROUP_WORLD_SIZE=1", "--nnodes N"],
        ),
        ("step, task 3 of 4", {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, ["must fit each other", "2(x3)"]),
        ("step, task 3 of 4", {"SLURM_STEP_TASKS_PER_NODE": "two"}, ["must read like 2(x3),1, got 'two'"]),
        ("step, task 3 of 4", {"SLURM_STEP_NODELIST": "n[1-"}, ["must read like n[01-03,7],login"]),
        ("step, task 3 of 4", {"SLURM_PROCID": "x"}, ["SLURM_PROCID to a whole number, got 'x'"]),
        ("step, task 3 of 4", {"SLURM_NODEID": ""}, ["SLURM_NODEID", "got nothing"]),
        ("step, task 3 of 4", {"OMPI_COMM_WORLD_SIZE": "8"}, ["MPI launcher", "OMPI_COMM_WORLD_SIZE=8"]),
        ("batch script", {"OMPI_COMM_WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_SIZE=2", "torchrun or srun"]),
        ("salloc shell", {"PMI_SIZE": "4"}, ["PMI_SIZE=4"]),
    ],
)  # fmt: skip
def test_processes_that_would_run_apart_are_refused(
    name: str, changes: dict[str, str], fragments: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        map_environment(recorded(name) | changes)
    for fragment in fragments:
        assert fragment in str(refused.value)


@pytest.mark.parametrize("changes", [{"OMPI_COMM_WORLD_SIZE": "1"}, {"PMI_SIZE": ""}, {}])
def test_one_process_of_mpi_is_one_process(changes: dict[str, str]) -> None:
    environment = dict(changes)
    map_environment(environment)
    assert environment == changes


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", "login"),
        ("n[01-03,7],gpu-a[1-2]b,login", "n01 n02 n03 n7 gpu-a1b gpu-a2b login"),
        ("n[9-11],b[007]", "n9 n10 n11 b007"),
        ("rack[1-2]node[01-02]", "rack1node01 rack1node02 rack2node01 rack2node02"),
        ("a,b,c-3.cluster", "a b c-3.cluster"),
    ],
)
def test_node_lists(text: str, hosts: str) -> None:
    """The second but for its `b`, the third and the fourth as `scontrol show hostnames` writes them."""
    assert host_names(text) == hosts.split()


@pytest.mark.parametrize("text", ["", ",", "a,", "a,,b", "n[", "n]1", "n[]", "n[a-b]", "n[3-1]", "n[[1]]"])
def test_what_is_no_node_list(text: str) -> None:
    with pytest.raises(ConfigError, match="must read like"):
        host_names(text)


def test_counts_of_tasks() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("1,2(x2),1") == [1, 2, 2, 1]
    for wrong in ("", "2(x3", "2,", "-1"):
        with pytest.raises(ConfigError):
            tasks_per_node(wrong)
