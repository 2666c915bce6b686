"""Slurm's commands, by their text output, which hardly changes from release to release."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import SchedulerError
from launch.local import LAUNCHER_VARIABLES

DEFAULT_MAX_ARRAY_SIZE = 1001
"""What Slurm has unless its slurm.conf says otherwise."""

ACTIVE_UNKNOWN = "Invalid job id specified"
TIMEOUT_S = 60


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        job_id: such as 123 or 123_4.
        state: such as PENDING, RUNNING, COMPLETED, CANCELLED.
        detail: nodes or, while it waits, why; an exit code once it has ended.
        is_active: whether it waits, runs or is about to end.
    """

    job_id: str
    state: str
    detail: str
    is_active: bool


def require(*programs: str, remedy: str = "") -> None:
    """Check that these programs are there.

    Args:
        programs: of Slurm.
        remedy: what to do else, for the message.

    Raises:
        SchedulerError: one is not.
    """
    for program in programs:
        if shutil.which(program) is None:
            raise SchedulerError(
                f"{program} must be on PATH, and is not: call this on a login node of a Slurm cluster"
                f"{f'; {remedy}' if remedy else ''}"
            )


def submit(script: Path, options: Sequence[str], arguments: Sequence[str] = ()) -> str:
    """Hand a script to sbatch and return the job's id.

    Raises:
        SchedulerError: sbatch refuses.
    """
    environment = environment_for(script.read_text(encoding="utf-8"), os.environ)
    done = _run(submit_command(script, options, arguments), environment=environment)
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode != 0 or not re.fullmatch(r"[0-9]+", job_id):
        raise SchedulerError(f"sbatch refused the job: {_told(done) or f'code {done.returncode}'}")
    return job_id


def submit_command(script: Path, options: Sequence[str], arguments: Sequence[str] = ()) -> list[str]:
    """The command that submits a script."""
    return ["sbatch", "--parsable", *options, str(script), *arguments]


def test_only(script: str, options: Sequence[str]) -> str:
    """What sbatch says of a script without taking it: when and where it would start.

    Raises:
        SchedulerError: it would be refused.
    """
    environment = environment_for(script, os.environ)
    done = _run(["sbatch", "--test-only", *options], stdin=script, environment=environment)
    if done.returncode != 0:
        raise SchedulerError(f"sbatch would refuse the job: {_told(done) or f'code {done.returncode}'}")
    return _told(done)


def job_states(job_ids: Sequence[str]) -> dict[str, JobState]:
    """The jobs that Slurm still knows: from squeue, and from sacct where that keeps records.

    Args:
        job_ids: such as 123, which stands for all elements of an array too, or 123_4.

    Raises:
        SchedulerError: squeue fails.
    """
    if not job_ids:
        return {}
    found = _queue(job_ids)
    missing = [job_id for job_id in job_ids if job_id not in found]
    return {**_accounting(missing), **found}


def active_jobs(job_ids: Sequence[str]) -> list[JobState]:
    """Those that wait, run or are about to end.

    Raises:
        SchedulerError: squeue fails.
    """
    return [job for job in _queue(job_ids).values() if job.is_active] if job_ids else []


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs.

    Raises:
        SchedulerError: scancel refuses.
    """
    done = _run(["scancel", *job_ids])
    if done.returncode != 0:
        raise SchedulerError(f"scancel failed: {_told(done)}")


def max_array_size() -> int:
    """Slurm's MaxArraySize, the largest index of an array plus one."""
    if shutil.which("scontrol") is None:
        return DEFAULT_MAX_ARRAY_SIZE
    found = re.search(
        r"^MaxArraySize\s*=\s*([0-9]+)", _run(["scontrol", "show", "config"]).stdout, re.MULTILINE
    )
    return int(found[1]) if found else DEFAULT_MAX_ARRAY_SIZE


def _queue(job_ids: Sequence[str]) -> dict[str, JobState]:
    asked = ",".join(_whole_jobs(job_ids))
    done = _run(["squeue", "--noheader", "--array", f"--jobs={asked}", "--format=%i|%T|%R"])
    if done.returncode != 0 and ACTIVE_UNKNOWN not in done.stderr:
        raise SchedulerError(f"squeue failed: {_told(done)}")
    rows = [line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2]
    wanted = set(job_ids)
    ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY")
    return {
        job_id: JobState(job_id, state, detail.strip(), is_active=state not in ended)
        for job_id, state, detail in rows
        if _is_asked(job_id, wanted)
    }


def _accounting(job_ids: Sequence[str]) -> dict[str, JobState]:
    """From sacct; nothing where the site keeps no accounts."""
    if not job_ids or shutil.which("sacct") is None:
        return {}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode"]
    try:
        done = _run([*command, f"--jobs={','.join(_whole_jobs(job_ids))}"])
    except SchedulerError:  # it is slow, or down; squeue and the run folders say enough
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2]
    if done.returncode != 0:
        return {}
    wanted = set(job_ids)
    return {
        job_id: JobState(job_id, state.split()[0] if state else "", f"code {code}", is_active=False)
        for job_id, state, code in rows
        if _is_asked(job_id, wanted)
    }


def _whole_jobs(job_ids: Sequence[str]) -> list[str]:
    """The ids without array indices, each once: a sweep of thousands would not fit a command line."""
    return list(dict.fromkeys(job_id.partition("_")[0] for job_id in job_ids))


def _is_asked(job_id: str, wanted: Set[str]) -> bool:
    return job_id in wanted or job_id.partition("_")[0] in wanted


def _told(done: "subprocess.CompletedProcess[str]") -> str:
    return " ".join((done.stderr or done.stdout).split())


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables without those of a job or a launcher that this process runs in, which a new job would inherit."""
    foreign = set(LAUNCHER_VARIABLES)
    if "SLURM_JOB_ID" in environment:
        foreign |= {name for name in environment if name.startswith(("SLURM_", "SLURMD_", "SRUN_"))} - {
            "SLURM_CONF"
        }
    return {name: value for name, value in environment.items() if name not in foreign}


OTHER_NAMES = {
    "time": ("TIMELIMIT",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "requeue": ("NO_REQUEUE",),
    "no-requeue": ("REQUEUE",),
    "gpus-per-node": ("GPUS",),
}
"""Option of sbatch -> variables, behind SBATCH_, that mean or contradict it, besides the one of its own name."""


def environment_for(script: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for sbatch: those of `outside_of_jobs`, without what would override an option in the script.

    sbatch lets `SBATCH_ACCOUNT` and the like go before the lines of a script. What the script does not say, they may.
    """
    given = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    names = {
        name for option in given for name in (option.upper().replace("-", "_"), *OTHER_NAMES.get(option, ()))
    }
    overriding = {f"SBATCH_{name}" for name in names}
    return {name: value for name, value in outside_of_jobs(environment).items() if name not in overriding}


def _run(
    command: Sequence[str], stdin: str = "", environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            input=stdin,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        raise SchedulerError(f"{command[0]} must be on PATH, and is not") from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{command[0]} did not answer within {TIMEOUT_S} s; is Slurm down?") from error
