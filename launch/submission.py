"""From a rendered script to jobs: all of them, or none."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fedsim.errors import ConfigError, RunFolderError, SchedulerError
from launch import records, slurm
from launch.options import Job
from launch.script import Container, Restarts


@dataclass(frozen=True)
class Part:
    """A job, or a job array, of a submission; with a chain, so many of them.

    Attributes:
        array: value of --array; None for a single job.
        arguments: of the script.
    """

    array: str | None = None
    arguments: tuple[str, ...] = ()

    def options(self, job: Job, *after: str) -> list[str]:
        """Options of sbatch that do not stand in the script.

        Args:
            job: what is asked for, with its dependency.
            after: ids of jobs that must have ended as well.
        """
        terms = [job.dependency] if job.dependency else []
        if after:
            terms.append(f"afterany:{':'.join(after)}")
        array = [] if self.array is None else [f"--array={self.array}"]
        return [*array, *([f"--dependency={','.join(terms)}"] if terms else [])]


def submit_parts(
    place: Path, texts: Mapping[str, str], job: Job, parts: Sequence[Part], one_by_one: bool = False
) -> list[list[str]]:
    """Write the files of a submission and submit its parts; where one is refused, nothing is left of the others.

    Args:
        place: the submission's folder, new.
        texts: its files, the script among them.
        job: what is asked for.
        parts: at least one.
        one_by_one: each part waits for the one before.

    Returns:
        for each part the ids of its chain, the first one first.

    Raises:
        RunFolderError: the files cannot be written.
        SchedulerError: Slurm refuses a job. Nothing is left of the others, or the message names those that are.
    """
    records.write_files(place, {**texts, **records.code_files()})
    submitted: list[list[str]] = []
    try:
        for part in parts:
            before = submitted[-1][-1:] if submitted and one_by_one else []
            submitted.append([])
            for _ in range(job.chain):
                options = part.options(job, *before)
                before = [slurm.submit(place / records.SCRIPT, options, part.arguments)]
                submitted[-1] += before
    except BaseException as refused:
        taken = [job_id for chain in submitted for job_id in chain]
        try:
            if taken:
                slurm.cancel(taken)
        except SchedulerError as error:
            raise SchedulerError(
                f"{refused}; jobs {', '.join(taken)} were submitted before and could not be cancelled ({error}); "
                "scancel them"
            ) from refused
        finally:
            records.remove_files(place)
        raise
    return submitted


def commands(place: Path, job: Job, parts: Sequence[Part], one_by_one: bool = False) -> list[str]:
    """The commands of `submit_parts` as lines for a shell, with a word for ids that nobody knows yet."""
    lines, before = [], False
    for part in parts:
        before = before and one_by_one
        for _ in range(job.chain):
            options = part.options(job, *(["JOB_BEFORE"] if before else []))
            lines.append(shlex.join(slurm.submit_command(place / records.SCRIPT, options, part.arguments)))
            before = True
    return lines


def refuse_active(folder: Path) -> None:
    """Check that no job of this run, or sweep, waits or runs.

    Raises:
        RunFolderError: one does.
        SchedulerError: squeue is not there, or fails.
    """
    active = slurm.active_jobs(records.submitted_jobs(folder))
    if active:
        shown = ", ".join(f"{job.job_id} ({job.state})" for job in active[:3])
        raise RunFolderError(
            f"{folder} has a job already: {shown}; wait for it, or `python -m launch cancel {shlex.quote(str(folder))}`"
        )


def chain_name(job: Job, place: Path) -> Restarts:
    """The job's restarts, with a name for its chain if it is one."""
    if job.chain == 1:
        return job.restarts
    return replace(job.restarts, chain=f"{place.name}-{datetime.now(UTC):%Y%m%dT%H%M%S}")


def see_folder(container: Container | None, folder: Path) -> Container | None:
    """The container, with a folder that it sees besides the working folder.

    Raises:
        ConfigError: the folder's name would be read as several.
    """
    if container is None or folder.is_relative_to(Path.cwd()):
        return container
    if "," in str(folder) or ":" in str(folder):
        raise ConfigError(
            f"run.output_dir must be without ',' and ':' to be seen in a container, got {folder}"
        )
    return replace(container, binds=(*container.binds, str(folder)))
