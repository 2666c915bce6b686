"""The command line of the report. Exit codes as in fedsim/main.py: 0, or 2 with one line on stderr."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedsim.config.yaml_text import read_yaml
from fedsim.errors import ConfigError, FedsimError

EXIT_USER = 2
DESCRIPTION = (
    "Figures (PNG and SVG), tables (Markdown) and one HTML page from run folders alone. Runs that differ in seed and "
    "name only are grouped: means, with the least and the most over seeds."
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a report; returns the exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        # drawing takes a second to import, which --help need not wait for
        from fedsim.report.build import check_out, make_report, write_report

        check_out(options.out)
        report = make_report(
            options.runs, options.clients, options.target_loss, options.modules, options.baseline
        )
        page = write_report(report, options.out)
    except FedsimError as error:
        sys.stderr.write(f"fedsim: {type(error).__name__}: {' '.join(str(error).split())}\n")
        return EXIT_USER
    sys.stdout.write(f"{page}: {len(report.pictures)} figures, {len(report.tables)} tables\n")
    for note in report.notes:
        sys.stdout.write(f"note: {note}\n")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m fedsim.report", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run folder, or a folder of run folders"
    )
    parser.add_argument(
        "--out", required=True, type=_folder, metavar="DIR", help="folder for the report; made if need be"
    )
    parser.add_argument(
        "--clients",
        type=_client_ids,
        metavar="ID,ID,...",
        help="clients whose test loss is drawn by round (default: the three that were tested most often)",
    )
    parser.add_argument(
        "--target-loss",
        type=_loss,
        metavar="LOSS",
        help="test loss for the table of rounds to a target, in nats per label token (arXiv 2402.11505: 2; default: "
        "the loss at 75%% of the way of the arm that improved least)",
    )
    parser.add_argument(
        "--modules",
        type=_names,
        default=(),
        metavar="NAME,NAME,...",
        help="modules whose singular values are drawn one by one, by dotted names or the ends of them (default: "
        "k_proj, or the first that is adapted); of many blocks the first, the middle and the last",
    )
    parser.add_argument(
        "--baseline",
        type=_values,
        metavar="KEY=VALUE,...",
        help="configuration that the differences of final losses are taken to, by values that no other has, such as "
        "data.partition.name=iid; keys may be short as in labels (default: the only IID one, else the first row)",
    )
    return parser.parse_args(arguments)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    return Path(text)


def _client_ids(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and part.isascii() for part in parts):
        raise argparse.ArgumentTypeError(f"must be client ids such as 0,3,7, got {text!r}")
    return sorted({int(part) for part in parts})


def _loss(text: str) -> float:
    try:
        loss = float(text)
    except ValueError:
        loss = math.nan
    if not 0 <= loss < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got {text!r}")
    return loss


def _values(text: str) -> dict[str, Any]:
    parts = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in parts]
    if not all(name and sign for name, sign, _ in parts) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"must be different keys with values such as strategy.name=fedavg,lora.rank=4, got {text!r}"
        )
    return {name: read_yaml(value, name) for name, _, value in parts}


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names such as k_proj,layers.0.fc1, got {text!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
