"""`python -m launch logs`: the newest output of a run's jobs and processes."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedsim.errors import RunFolderError
from launch import records
from launch.arguments import Parser, positive
from launch.targets import find_targets

LARGEST_TAIL = 1 << 20
POLL_S = 0.5


def main(arguments: Sequence[str]) -> int:
    """Print the end of the newest log, or of all, and with --follow what is written after that.

    Raises:
        RunFolderError: a folder is neither a run nor a sweep, or there is no log yet.
    """
    options = _parser().parse_args(list(arguments))
    runs = list(dict.fromkeys(run for target in find_targets(options.folders) for run in target.runs))
    logs = find_logs(runs, options.all)
    if not logs and not options.follow:
        raise RunFolderError(
            f"{', '.join(str(run) for run in runs[:3])} has no log yet; a job that waits has written none"
        )
    for path in logs if options.all else logs[-1:]:
        sys.stdout.write(f"==> {path} <==\n{tail(path, options.lines)}")
    sys.stdout.flush()
    if options.follow:
        try:
            for text in follow(lambda: find_logs(runs, options.all), lambda: time.sleep(POLL_S)):
                sys.stdout.write(text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
    return 0


def find_logs(runs: Sequence[Path], every: bool = True) -> list[Path]:
    """Outputs of the jobs of these runs, and what each process wrote; the newest last.

    Args:
        runs: run folders.
        every: also what the processes of a run wrote that has a job's output; most of that stands there too.
    """
    paths: set[Path] = set()
    for run in runs:
        logs = {Path(log) for submission in records.read_submissions(run) for log in submission.logs}
        outputs = {log for log in logs if log.is_file()}
        paths |= outputs
        if every or not outputs:
            paths |= {path for path in (run / "logs").rglob("*") if path.is_file()}
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path))


def tail(path: Path, lines: int) -> str:
    """The last lines of a file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LARGEST_TAIL))
        found = file.read().decode("utf-8", "replace").splitlines()[-lines:]
    return "".join(f"{line}\n" for line in found)


def follow(find: Callable[[], list[Path]], pause: Callable[[], None]) -> Iterator[str]:
    """What is written to logs from now on, with a heading where it comes from another file than before.

    Args:
        find: the logs, which may become more.
        pause: waits between two looks.
    """
    seen = {path: path.stat().st_size for path in find()}
    told = next(reversed(seen), None)
    while True:
        pause()
        for path in find():
            start, size = seen.get(path, 0), path.stat().st_size
            if size < start:
                start = 0  # somebody emptied it
            if size > start:
                with path.open("rb") as file:
                    file.seek(start)
                    text = file.read(size - start).decode("utf-8", "replace")
                yield text if path == told else f"==> {path} <==\n{text}"
                told = path
            seen[path] = size


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch logs",
        description="Print the end of the newest log of a run, or of the runs of a sweep.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of a run, of a sweep, or one that holds them"
    )
    parser.add_argument("--lines", type=positive, default=40, metavar="N", help="of each log; default: 40")
    parser.add_argument(
        "--all", action="store_true", help="all logs, those of single processes too; the newest last"
    )
    parser.add_argument("--follow", action="store_true", help="go on with what is written, until interrupted")
    return parser
