"""Jobs on a real Slurm: whatever happens to a job, the run ends with the bits of one process without Slurm."""

import json
import os
import sys
import time
from typing import Any

import pytest

from tests.slurm.jobs import ROOT, Job, Sbatch, Work, await_true, num_rounds, result_of, status_of
from tests.slurm.local_slurm import LocalSlurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROUNDS = 12
"""Enough that a job can be interrupted after its first rounds and is still at work."""

both_launchers = pytest.mark.parametrize("launcher", ["srun", "torchrun"])
full = pytest.mark.slurm_full


def assert_same_bits(job: Job, work: Work) -> None:
    """The run has finished as if nothing had happened."""
    assert status_of(job.run) == "finished"
    assert result_of(job.run) == work.alone(ROUNDS)


@both_launchers
def test_runs_to_its_end(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    job = sbatch(cluster, "end", ROUNDS, settings={"FEDSIM_LAUNCHER": launcher})
    job.wait()
    assert job.restarts == 0
    assert_same_bits(job, work)


@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=full)])
def test_usr1_to_the_script_requeues(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    """As Slurm sends it before the time limit."""
    job = sbatch(cluster, "usr1", ROUNDS, settings={"FEDSIM_LAUNCHER": launcher})
    job.await_rounds()
    with job.frozen():
        cluster.run("scancel", "--batch", "--signal=USR1", job.name)
        await_true("the signal", lambda: "SIGUSR1" in job.log(), tell=job.story)
    await_true("the stop", lambda: status_of(job.run) == "preempted", tell=job.story)
    job.wait()
    assert job.restarts == 1
    assert_same_bits(job, work)


@full
@both_launchers
@pytest.mark.parametrize("cluster_with", ["cluster", "plain_cluster"])
def test_preempted(
    launcher: str, cluster_with: str, work: Work, sbatch: Sbatch, request: pytest.FixtureRequest
) -> None:
    """With the job's own signal to its script, and with SIGTERM to the steps alone, as Slurm does by default."""
    cluster: LocalSlurm = request.getfixturevalue(cluster_with)
    job = sbatch(cluster, "preempted", ROUNDS, "--partition=spot", settings={"FEDSIM_LAUNCHER": launcher})
    job.await_rounds()
    with job.frozen():
        cluster.run("sbatch", "--nodes=2", "--exclusive", "--time=1", "--output=/dev/null", "--wrap=sleep 1")
        await_true("the preemption", lambda: job.was_preempted, tell=job.story)
    job.wait()
    assert job.restarts == 1
    assert_same_bits(job, work)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("srun", marks=full)])
def test_scancel_is_final(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    job = sbatch(cluster, "cancelled", ROUNDS, settings={"FEDSIM_LAUNCHER": launcher})
    job.await_rounds()
    cluster.run("scancel", job.name)
    job.wait("CANCELLED")
    await_true(
        "the job's last process", lambda: not any(p.is_job for p in cluster.processes()), tell=job.story
    )
    time.sleep(2)  # a requeue shows at once
    assert (job.state, job.restarts) == ("CANCELLED", 0)
    assert status_of(job.run) != "finished"
    again = sbatch(cluster, "cancelled", ROUNDS, settings={"FEDSIM_LAUNCHER": launcher})
    again.wait()
    assert_same_bits(again, work)


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("srun", marks=full)])
def test_killed_rank(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    job = sbatch(cluster, "killed", ROUNDS, settings={"FEDSIM_LAUNCHER": launcher})
    job.await_rounds()
    job.kill_rank(1)
    job.wait()
    assert job.restarts == 1
    assert_same_bits(job, work)


@full
@both_launchers
def test_gives_up_without_progress(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    settings = {"FEDSIM_LAUNCHER": launcher, "FEDSIM_MAX_FAILURES": "1"}
    job = sbatch(cluster, "hopeless", ROUNDS, settings=settings)
    for restart in range(2):
        job.await_restart(restart)
        job.kill_rank(1)
    job.wait("FAILED")
    assert job.restarts == 1
    again = sbatch(cluster, "hopeless", ROUNDS, settings=settings)
    again.wait()
    assert_same_bits(again, work)


@full
@both_launchers
def test_mistake_is_not_tried_again(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    """One that only the run itself can see."""
    settings = {"FEDSIM_LAUNCHER": launcher}
    job = sbatch(cluster, "mistake", ROUNDS, settings=settings, overrides=["model.name_or_path=/nowhere"])
    job.wait("FAILED")
    assert job.restarts == 0
    assert "model.name_or_path" in job.log()
    mended = sbatch(cluster, "mistake", ROUNDS, settings=settings)
    mended.wait()
    assert_same_bits(mended, work)


@full
def test_wrong_key_starts_no_step(cluster: LocalSlurm, sbatch: Sbatch) -> None:
    job = sbatch(cluster, "wrong", ROUNDS, overrides=["lora.rnak=3"])
    job.wait("FAILED")
    assert job.restarts == 0
    assert "unknown key lora.rnak" in job.log()
    assert not job.run.exists()


@full
@both_launchers
def test_node_dies(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    job = sbatch(cluster, "crash", ROUNDS, settings={"FEDSIM_LAUNCHER": launcher})
    job.await_rounds()
    cluster.crash("n2")
    await_true("n2 to be given up", lambda: "down" in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T"))
    cluster.restore("n2")
    job.wait()
    # a minute later Slurm tells the node again to end the job, which on a slow machine hits the second start
    assert job.restarts >= 1
    assert_same_bits(job, work)


@full
@both_launchers
def test_time_limit_of_a_minute(launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    """Weeks on a partition of hours, in small: a run that does not fit in is asked to stop, and goes on, twice."""
    # the signal may come half a minute early, before a run on a busy machine has loaded its libraries
    is_busy = os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
    options = ["--time=2", "--signal=B:USR1@40"] if is_busy else ["--time=1", "--signal=B:USR1@20"]
    # on a slow machine some starts do not come to their first round
    settings = {"FEDSIM_LAUNCHER": launcher, "FEDSIM_MAX_FAILURES": "20"}
    job = sbatch(cluster, "limit", ROUNDS, *options, settings=settings)
    for restart in range(2):
        job.await_restart(restart)
        job.await_rounds(num_rounds(job.run))
        with job.frozen():
            await_true(
                "Slurm's signal", lambda seen=restart: job.log().count("SIGUSR1") > seen, tell=job.story
            )
    job.wait()
    assert job.restarts >= 2
    assert_same_bits(job, work)


@full
@both_launchers
def test_two_jobs_share_a_node(
    launcher: str, cluster: LocalSlurm, work: Work, sbatch: Sbatch, tmp_path: Any
) -> None:
    """Two processes each, at the same time, and both find the cache empty."""
    settings = {"FEDSIM_LAUNCHER": launcher, "FEDSIM_PROCESSES": "2", "FEDSIM_CACHE": str(tmp_path / "cache")}
    jobs = [
        sbatch(cluster, name, ROUNDS, "--nodelist=n1", template="single_node", settings=settings)
        for name in ("left", "right")
    ]
    await_true("all ranks of both", lambda: all(job.rank_pids(rank) for job in jobs for rank in (0, 1)))
    for job in jobs:
        job.wait()
        assert job.restarts == 0
        assert_same_bits(job, work)


@full
def test_second_job_on_a_run_folder_is_refused(cluster: LocalSlurm, work: Work, sbatch: Sbatch) -> None:
    first = sbatch(cluster, "shared", ROUNDS)
    first.await_rounds()
    with first.frozen():
        second = sbatch(cluster, "shared", ROUNDS)
        second.wait("FAILED")
    assert second.restarts == 0
    assert "in use" in second.log()
    first.wait()
    assert_same_bits(first, work)


@full
@pytest.mark.parametrize(
    "program",
    [
        pytest.param([sys.executable, "-m", "fedsim.main"], id="python"),
        pytest.param(
            [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--cpu",
                "--num_processes=1",
                "-m",
                "fedsim.main",
            ],
            id="accelerate",
        ),
    ],
)
def test_plain_srun(program: list[str], cluster: LocalSlurm, work: Work) -> None:
    """Two tasks on two nodes are one run of two processes, without any script of ours."""
    command = ["srun", "--nodes=2", *program, *work.arguments("plain", ROUNDS)]
    cluster.run(*command, extra={"PYTHONPATH": str(ROOT)}, cwd=ROOT, timeout_s=200)
    run = work.runs / "plain"
    assert json.loads((run / "run.json").read_text())["world_size"] == 2
    assert result_of(run) == work.alone(ROUNDS)
