"""`python -m launch cancel`: end the jobs that were submitted for runs."""

from collections.abc import Sequence

from launch import records, slurm
from launch.arguments import Parser
from launch.targets import find_targets


def main(arguments: Sequence[str]) -> int:
    """Cancel every job of these runs and sweeps that waits or runs, and say which.

    Raises:
        RunFolderError: a folder is neither a run nor a sweep.
        SchedulerError: Slurm is not there, or refuses.
    """
    options = _parser().parse_args(list(arguments))
    targets = find_targets(options.folders)
    slurm.require(
        "squeue",
        "scancel",
        remedy="a run on this machine is stopped by a file `stop` in its folder",
    )
    for target in targets:
        folders = dict.fromkeys((target.folder, *target.runs))
        active = slurm.active_jobs([job for folder in folders for job in records.submitted_jobs(folder)])
        if active:
            slurm.cancel([job.job_id for job in active])
        told = ", ".join(f"{job.job_id} (was {job.state})" for job in active)
        print(f"{target.folder}: {f'cancelled {told}' if told else 'no job waits or runs'}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch cancel",
        description="Cancel the jobs of runs and sweeps. A run that is cut off loses what it did since its newest "
        "checkpoint; to stop at the end of a round instead, make the file `stop` in its folder.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a run, of a sweep, or one that holds them"
    )
    return parser
