"""`python -m launch check`: is a configuration right, and which run is it? Batch scripts ask first."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import Parser
from launch.manifest import read_element
from launch.runs import refuse_unusable, run_folder
from launch.submit import checked_config

PATIENCE_S = 60
"""How long the processes of a job's earlier start may take to let go of the run folder."""


def main(arguments: Sequence[str]) -> int:
    """Say which run it is and whether it is finished; nothing is written.

    Raises:
        ConfigError: the configuration, or the manifest, is wrong.
        RunFolderError: the run cannot use its folder.
    """
    options, rest = _parser().parse_known_args(list(arguments))
    if options.element is not None:
        path, index = options.element
        rest = [*read_element(Path(path), index), *rest]
    config = checked_config(rest)
    state = refuse_unusable(config, PATIENCE_S if options.fields else 0)
    folder, verdict = run_folder(config), "finished" if state.is_finished(config) else "ready"
    if options.fields:
        fields = ["fedsim-check", str(folder), verdict, str(config.run.threads_per_process), *rest]
        sys.stdout.write("".join(f"{field}\0" for field in fields))
    else:
        print(f"{folder}: {verdict}, round {state.round} of {config.run.rounds}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch check",
        description="Check the arguments of fedsim.main; say which run folder they mean and whether it is finished.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--element",
        nargs=2,
        metavar=("MANIFEST", "INDEX"),
        help="take the arguments from a line of a manifest, counted from 0",
    )
    parser.add_argument(
        "--fields", action="store_true", help="answer in fields that end with a null byte, for scripts"
    )
    return parser
