"""The command line: from arguments to a finished run.

Exit codes: 0 finished, 1 a bug or a machine's failure, 2 something the user can mend.
"""

import atexit
import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsim.config.loader import CommandLine, parse_command_line, to_yaml
from fedsim.errors import FedsimError, PeerError

if TYPE_CHECKING:
    from fedsim.comm.group import Group

EXIT_BUG = 1
EXIT_USER = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; every rank returns the same exit code."""
    try:
        # --help and --version print here: once, not once a rank
        with contextlib.redirect_stdout(sys.stdout if os.environ.get("RANK", "0") == "0" else io.StringIO()):
            command = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        return _with_group(command)
    except PeerError as error:
        _tell(error)
        if error.user_error:
            return EXIT_USER
        if error.failed_here and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return EXIT_BUG
    except FedsimError as error:
        _tell(error)
        return EXIT_USER
    except KeyboardInterrupt:
        sys.stderr.write("fedsim: interrupted; the same command resumes from the last checkpoint\n")
        return 130


def _tell(error: FedsimError) -> None:
    """One line on stderr; with several processes, each says who it is."""
    rank = os.environ.get("RANK")
    where = f" [rank {rank}]" if os.environ.get("WORLD_SIZE", "1") != "1" and rank is not None else ""
    text = " ".join(str(error).split())
    sys.stderr.write(f"fedsim{where}: {type(error).__name__}: {text}\n")
    sys.stderr.flush()


def _with_group(command: CommandLine) -> int:
    """Set this process up, join the others, and simulate."""
    # numpy's and scipy's BLAS read these when they are loaded, and bits depend on the number of threads
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(command.config.run.threads_per_process)
    import torch

    from fedsim.comm.group import choose_device, join_group, world_from_environment

    config = command.config
    world = world_from_environment()
    _quiet_libraries(world.rank)
    _configure_logging(world.rank)
    device = choose_device(config.run.device, world, torch.cuda.device_count())
    torch.set_num_threads(config.run.threads_per_process)
    group = join_group(world.rank, world.size, device, config.comm.backend, config.comm.timeout_s)
    code = _simulate(command, group)
    # not in a `finally`: a rank that failed must not wait for the others on its way out
    group.close()
    return code


def _simulate(command: CommandLine, group: "Group") -> int:
    from fedsim.simulation import dry_run, estimate, simulate

    if command.estimate is not None:
        text = estimate(command.config, group, command.estimate)
        if group.rank == 0:
            sys.stdout.write(f"{text}\n")
        return 0
    if command.dry_run:
        text = dry_run(command.config, group)
        if group.rank == 0:
            sys.stdout.write(f"{to_yaml(command.config)}\n{text}\n")
        return 0
    simulate(command.config, group)
    return 0


def _configure_logging(rank: int) -> None:
    """Rank 0 tells what happens, the others only what is wrong."""
    logging.basicConfig(
        level=logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("fedsim").setLevel(logging.INFO if rank == 0 else logging.WARNING)


def _quiet_libraries(rank: int) -> None:
    """Set before they are imported; what the user has set stands."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # the default, said aloud: no warning at a fork
    if rank > 0:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _leave(code: int) -> None:
    """End the process with `code`, at once.

    What Python has registered for the end is run, and nothing after that: of processes that had been in a gloo group,
    about one in twenty aborted while the libraries' own threads were taken down, with all work done.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())
