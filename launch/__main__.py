"""`python -m launch COMMAND ...`."""

import sys
from collections.abc import Callable, Mapping, Sequence

from fedsim.errors import FedsimError
from launch import cancel, check, local, logs, status, submit, sweep

COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "local": local.main,
    "submit": submit.main,
    "sweep": sweep.main,
    "status": status.main,
    "cancel": cancel.main,
    "logs": logs.main,
    "check": check.main,
}

USAGE = """\
usage: python -m launch COMMAND ...

  local   run on this machine: one process a GPU, or one for every few cores
  submit  run as a Slurm job that goes on after its time limit, preemption and failures
  sweep   run several values of some keys, and several seeds: here one after another, or as a Slurm array
  status  what Slurm and the run folders say about runs
  cancel  end the jobs of runs
  logs    the newest output of runs
  check   is this configuration right, and which run is it?

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
