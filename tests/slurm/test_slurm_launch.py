"""`python -m launch` against a real Slurm: submit, status, logs, cancel, chains, and a sweep as a job array."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.jobs import ROOT, Job, Work, await_true, result_of, status_of
from tests.slurm.local_slurm import ClusterError, LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROUNDS = 12
SWEEP_ROUNDS = 4
ON_TWO_NODES = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1", "--time", "10"]

Launch = Callable[..., str]

full = pytest.mark.slurm_full


@pytest.fixture
def launch(cluster: LocalSlurm, work: Work) -> Launch:
    """Call `python -m launch`; standard output. Jobs find the package as these tests do."""

    def call(*words: str) -> str:
        work.runs.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "launch", *words]
        return cluster.run(*command, extra={"PYTHONPATH": str(ROOT)}, cwd=work.runs)

    return call


def submitted(told: str, cluster: LocalSlurm, run: Path) -> list[Job]:
    """The jobs that `submit` or `sweep` says it has submitted."""
    assert told.startswith("submitted "), told
    return [Job(cluster, name, run) for name in told.removeprefix("submitted ").partition(":")[0].split(", ")]


def test_trial_submits_nothing(launch: Launch, cluster: LocalSlurm, work: Work) -> None:
    told = launch("submit", *work.arguments("trial", ROUNDS), *ON_TWO_NODES, "--test")
    assert "n[1-2]" in told
    with pytest.raises(ClusterError, match="Requested node configuration is not available"):
        launch("submit", *work.arguments("trial", ROUNDS), *ON_TWO_NODES, "--gpus-per-node", "3", "--test")
    assert cluster.run("squeue", "-h") == ""
    assert list(work.runs.iterdir()) == []


@full
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_submit_status_logs_cancel(launcher: str, launch: Launch, cluster: LocalSlurm, work: Work) -> None:
    words = [*work.arguments("one", ROUNDS), *ON_TWO_NODES, "--launcher", launcher]
    run = work.runs / "one"
    (job,) = submitted(launch("submit", *words), cluster, run)
    job.await_rounds()
    with job.frozen():
        line = launch("status", str(run)).splitlines()[-1]
        assert job.name in line
        assert "RUNNING" in line
        assert f"of {ROUNDS}" in line
        assert "rank 0 INFO" in launch("logs", str(run), "--all")
        with pytest.raises(ClusterError, match="has a job|in use"):
            launch("submit", *words)
        assert f"cancelled {job.name}" in launch("cancel", str(run))
    job.wait("CANCELLED")
    assert job.restarts == 0
    (again,) = submitted(launch("submit", *words), cluster, run)
    again.wait()
    assert f"{ROUNDS} of {ROUNDS}" in launch("status", str(run))
    assert result_of(run) == work.alone(ROUNDS)
    with pytest.raises(ClusterError, match=f"is finished after {ROUNDS} rounds"):
        launch("submit", *words)


@full
def test_chain_goes_on_where_requeue_is_forbidden(launch: Launch, cluster: LocalSlurm, work: Work) -> None:
    run = work.runs / "chain"
    jobs = submitted(
        launch("submit", *work.arguments("chain", ROUNDS), *ON_TWO_NODES, "--chain", "3"), cluster, run
    )
    jobs[0].await_rounds()
    with jobs[0].frozen():
        cluster.run("scancel", "--batch", "--signal=USR1", jobs[0].name)
        await_true("the signal", lambda: "SIGUSR1" in jobs[0].log(), tell=jobs[0].story)
    for job in jobs[1:]:
        job.wait()
    assert [job.restarts for job in jobs] == [0, 0, 0]
    assert "nothing to do" in jobs[2].log()
    assert result_of(run) == work.alone(ROUNDS)


def test_sweep_with_a_failing_element(launch: Launch, cluster: LocalSlurm, work: Work) -> None:
    """Three elements of an array; one is killed, and --resubmit sends that one alone."""
    words = [
        *work.arguments("seeds", SWEEP_ROUNDS),
        "--seeds",
        "0,1,2",
        "--nodes",
        "1",
        "--cpus-per-task",
        "1",
    ]
    words += ["--time", "10", "--max-failures", "0"]
    runs = [work.runs / f"seeds-seed_{seed}" for seed in range(3)]
    (array,) = submitted(launch("sweep", *words), cluster, runs[0])
    elements = [Job(cluster, f"{array.name}_{index}", run) for index, run in enumerate(runs)]
    elements[1].kill_rank(0)
    for element, state in zip(elements, ("COMPLETED", "FAILED", "COMPLETED"), strict=True):
        element.wait(state)
        assert element.restarts == 0
    with pytest.raises(ClusterError, match="was submitted before"):
        launch("sweep", *words)
    told = launch("sweep", *words, "--resubmit")
    assert "1 of 3 runs" in told
    (array,) = submitted(told, cluster, runs[1])
    Job(cluster, f"{array.name}_0", runs[1]).wait()
    for seed, run in enumerate(runs):
        assert result_of(run) == work.alone(SWEEP_ROUNDS, f"run.seed={seed}")
    assert launch("status", str(work.runs / "seeds.sweep")).count("finished") == 3


@full
@pytest.mark.parametrize("how", ["stop file", "signal to the ranks"])
def test_person_stops_a_run(how: str, launch: Launch, cluster: LocalSlurm, work: Work) -> None:
    """It stays stopped, and counts as complete, until somebody submits it again."""
    run = work.runs / "stopped"
    words = [*work.arguments("stopped", ROUNDS), *ON_TWO_NODES, "--launcher", "srun"]
    (job,) = submitted(launch("submit", *words), cluster, run)
    job.await_rounds()
    with job.frozen():
        if how == "stop file":
            (run / "stop").touch()
        else:
            cluster.run("scancel", "--signal=USR1", job.name)
    await_true("the stop", lambda: status_of(run) == "preempted", tell=job.story)
    job.wait()
    assert job.restarts == 0
    assert "preempted" in launch("status", str(run))
    (again,) = submitted(launch("submit", *words), cluster, run)
    again.wait()
    assert result_of(run) == work.alone(ROUNDS)
