"""`python -m launch COMMAND ...`."""

import sys
from collections.abc import Callable, Mapping, Sequence

from fedsim.errors import FedsimError
from launch import check, local, sweep

COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "local": local.main,
    "sweep": sweep.main,
    "check": check.main,
}

USAGE = """\
usage: python -m launch COMMAND ...

  local   run on this machine: one process a GPU, or one for every few cores
  sweep   run several values of some keys, and several seeds, one after another

`python -m launch COMMAND --help` explains a command.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; 2 is the exit code of anything the user can mend."""
    if not arguments or arguments[0] in ("-h", "--help"):
        (sys.stdout if arguments else sys.stderr).write(USAGE)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        sys.stderr.write(f"launch: unknown command '{command}'; commands are {', '.join(COMMANDS)}\n")
        return 2
    try:
        return COMMANDS[command](rest)
    except FedsimError as error:
        sys.stderr.write(f"launch: {type(error).__name__}: {' '.join(str(error).split())}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
