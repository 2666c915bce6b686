"""What a submission leaves in the run folder: script, library, configuration, state of the code, ids of the jobs.

Each has a folder of its own, `slurm/NNNN`, in the run folder or, for a sweep, in the sweep's folder and in short in
that of each run.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsim.errors import RunFolderError

LIBRARY = Path(__file__).with_name("lib.sh")
"""The library of the batch scripts: slurm/lib.sh of the repository."""

MANIFEST = "manifest.jsonl"
SCRIPT = "job.sbatch"
CONFIG = "config.yaml"
RECORD = "submission.json"
LARGEST_DIFF = 1 << 20


@dataclass(frozen=True)
class Submission:
    """Jobs that were submitted together.

    Attributes:
        time: when, in UTC.
        command: the command line of the launcher.
        jobs: ids, the first one first; such as 123 or, for a run of a sweep, 123_4.
        logs: their outputs, absolute; those of arrays hold Slurm's patterns.
    """

    time: str
    command: tuple[str, ...]
    jobs: tuple[str, ...]
    logs: tuple[str, ...]


def next_submission_folder(folder: Path) -> Path:
    """Where the next submission's files go; not created."""
    numbers = [int(path.name) for path in folder.glob("slurm/[0-9]*") if path.name.isdecimal()]
    return folder / "slurm" / f"{max(numbers, default=0) + 1:04d}"


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Create the folder of a submission with these files.

    Raises:
        RunFolderError: it exists, or cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        (folder.parent.parent / "logs").mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"{folder} must be new and writable ({error.strerror or error}); choose another run.output_dir"
        ) from error


def code_files() -> dict[str, str]:
    """The library of the script, and the state of the code, as files of a submission."""
    return {LIBRARY.name: LIBRARY.read_text(encoding="utf-8"), "git.txt": git_state(Path(__file__).parent)}


def remove_files(folder: Path) -> None:
    """Undo `write_files`, and the folders around it that are empty then."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in (folder.parent.parent / "logs", folder.parent, folder.parent.parent):
        try:
            path.rmdir()
        except OSError:
            continue


def record(folder: Path, jobs: Sequence[str], logs: Sequence[str]) -> None:
    """Write down which jobs a submission has become."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    submission = Submission(time, ("python", "-m", "launch", *sys.argv[1:]), tuple(jobs), tuple(logs))
    unfinished = folder / f".{RECORD}"
    unfinished.write_text(json.dumps(asdict(submission), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / RECORD)


def read_submissions(folder: Path) -> list[Submission]:
    """The submissions of a run or a sweep, the oldest first; what cannot be read is left out."""
    found = []
    for path in sorted(folder.glob(f"slurm/[0-9]*/{RECORD}")):
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found.append(
                Submission(fields["time"], *(tuple(fields[name]) for name in ("command", "jobs", "logs")))
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def submitted_jobs(folder: Path) -> list[str]:
    """Ids of all jobs of a run or a sweep, the newest last."""
    return [job for submission in read_submissions(folder) for job in submission.jobs]


def git_state(folder: Path) -> str:
    """Commit, branch and uncommitted changes of the repository around `folder`, or that there is none."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            raise OSError(done.stderr.decode("utf-8", "replace"))
        return done.stdout.decode("utf-8", "replace")

    try:
        head, status, diff = (
            git("rev-parse", "HEAD"),
            git("status", "--short", "--branch"),
            git("diff", "HEAD"),
        )
    except OSError:
        return f"{folder} is not in a git repository, or git is not installed\n"
    if len(diff) > LARGEST_DIFF:
        diff = f"the difference is {len(diff)} characters long and was left out\n"
    return f"commit {head}{status}\n{diff}"
