"""`python -m launch status`: what Slurm and the run folders say about runs."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsim.errors import SchedulerError
from launch import records, slurm
from launch.arguments import Parser
from launch.runs import read_run
from launch.slurm import JobState
from launch.targets import find_targets

HEADER = ("run", "job", "slurm", "status", "round", "")


def main(arguments: Sequence[str]) -> int:
    """Print a line for each run: squeue first, then sacct where it keeps records, then the run's own files.

    Raises:
        RunFolderError: a folder is neither a run nor a sweep.
    """
    options = _parser().parse_args(list(arguments))
    runs = list(dict.fromkeys(run for target in find_targets(options.folders) for run in target.runs))
    jobs = {run: records.submitted_jobs(run) for run in runs}
    known: Mapping[str, JobState] | None = None
    if shutil.which("squeue"):
        try:
            known = slurm.job_states([job for run in runs for job in jobs[run]])
        except SchedulerError as error:
            print(f"jobs are not known: {error}", file=sys.stderr)
    rows = [HEADER, *(describe(run, jobs[run], known) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def describe(run: Path, jobs: Sequence[str], known: Mapping[str, JobState] | None) -> tuple[str, ...]:
    """The cells of a run's line.

    Args:
        run: its folder.
        jobs: its ids, the newest last.
        known: what Slurm says of jobs; None where there is no Slurm to ask.
    """
    of_run = [known[job] for job in jobs if job in known] if known else []
    active = [job for job in of_run if job.is_active]
    state = read_run(run)
    status, reason = state.status or ("submitted" if jobs else "new"), state.reason or ""
    if state.status == "running" and jobs and known is not None and not active:
        status, reason = "cut off", "no job of it runs; the same command, or --resubmit, goes on"
    job = active[0] if active else of_run[-1] if of_run else None
    waiting = len(active) - 1
    more = f" +{waiting}" if waiting > 0 else ""
    return (
        os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run),
        (job.job_id if job else jobs[-1] if jobs else "-") + more,
        f"{job.state} {job.detail}".strip() if job else "-",
        status,
        f"{state.round} of {'?' if state.rounds is None else state.rounds}",
        " ".join(reason.split())[:100],
    )


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch status",
        description="Say what became of runs: what Slurm knows of their jobs, and how far they are.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a run, of a sweep, or one that holds them"
    )
    return parser
