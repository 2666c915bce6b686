"""The command line: from arguments to a finished run.

Exit codes: 0 finished, 1 a bug or a machine's failure, 2 something the user can mend, 75 stopped on request and to be
started again, 128 + n ended at once by signal n.
"""

import atexit
import contextlib
import io
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.environ import map_environment
from fedsim.errors import FedsimError, LostRankError, PeerError, is_user_error
from fedsim.stopping import EXIT_PREEMPTED, Preempted, StopRequests, signals_noted

if TYPE_CHECKING:
    from fedsim.comm.group import Group
    from fedsim.config.loader import CommandLine

EXIT_BUG = 1
EXIT_USER = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; every rank returns the same exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    requests = StopRequests()
    # what only prints ends at a signal, as every program does
    is_run = not any(argument.startswith("-") for argument in arguments)
    try:
        with signals_noted(requests) if is_run else contextlib.nullcontext():
            return _main(arguments, requests)
    except FedsimError as error:
        return _report(error)
    except Preempted as stop:
        text = f"stopped on request ({stop}); the same command goes on from there"
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"fedsim: {text}\n")
        _tell_torchrun(text)
        return 0 if _torchrun_would_restart() else EXIT_PREEMPTED
    except KeyboardInterrupt:
        sys.stderr.write("fedsim: interrupted; the same command resumes from the last checkpoint\n")
        return 130


def _main(arguments: Sequence[str], requests: StopRequests) -> int:
    map_environment()  # before any library looks for the launcher's variables
    from fedsim.config.loader import parse_command_line

    # --help and --version print here: once, not once a rank
    with contextlib.redirect_stdout(sys.stdout if os.environ.get("RANK", "0") == "0" else io.StringIO()):
        command = parse_command_line(arguments)
    return _with_group(command, requests)


def _tell_torchrun(text: str) -> None:
    """Put `text` into torchrun's own report, in place of its guess at a reason. See torch.distributed.elastic."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _torchrun_would_restart() -> bool:
    """Whether torchrun would take a code other than 0 as a reason to start the processes again, in spite of a stop."""
    names = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT")
    most, done = (os.environ.get(name, "0") for name in names)
    return most.isdecimal() and done.isdecimal() and int(most) > int(done)


def _report(error: FedsimError) -> int:
    """Say what happened, and return the exit code."""
    _tell(error)
    if is_user_error(error):
        return EXIT_USER
    failed_here = isinstance(error, PeerError | LostRankError) and error.failed_here
    if failed_here and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)
    return EXIT_BUG


def _tell(error: FedsimError) -> None:
    """One line on stderr; with several processes, each says who it is."""
    rank = os.environ.get("RANK")
    where = f" [rank {rank}]" if os.environ.get("WORLD_SIZE", "1") != "1" and rank is not None else ""
    text = " ".join(str(error).split())
    sys.stderr.write(f"fedsim{where}: {type(error).__name__}: {text}\n")
    sys.stderr.flush()
    _tell_torchrun(f"{type(error).__name__}: {text}")


def _with_group(command: "CommandLine", requests: StopRequests) -> int:
    """Set this process up, join the others, and simulate."""
    # read by libraries when they are loaded; bits depend on the number of threads, and srun would leave all cores
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(command.config.run.threads_per_process)
    # else a peer that has gone shows as pages of torch's own warnings; what it means is said in `LostRankError`
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from fedsim.comm.group import (
        choose_device,
        join_group,
        sees_only_its_own_gpus,
        world_from_environment,
    )

    config = command.config
    world = world_from_environment()
    _quiet_libraries(world.rank)
    _configure_logging(world.rank)
    own_gpus = sees_only_its_own_gpus()
    in_job = "SLURM_JOB_ID" in os.environ
    device = choose_device(
        config.run.device, world, torch.cuda.device_count(), own_gpus=own_gpus, in_job=in_job
    )
    torch.set_num_threads(config.run.threads_per_process)
    group = join_group(
        world.rank,
        world.size,
        device,
        config.comm.backend,
        config.comm.timeout_s,
        join_timeout_s=config.comm.join_timeout_s,
        asked_to_end=lambda: requests.asked_to_end,
    )
    code = _simulate(command, group, requests)
    # not in a `finally`: a rank that failed must not wait for the others on its way out
    group.close()
    return code


def _simulate(command: "CommandLine", group: "Group", requests: StopRequests) -> int:
    from fedsim.comm.agree import same_everywhere
    from fedsim.config.loader import config_hash, to_yaml
    from fedsim.simulation.entry import dry_run, estimate, simulate

    same_everywhere(group, "the configuration", config_hash(command.config))
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
    simulate(command.config, group, requests)
    return 0


def _configure_logging(rank: int) -> None:
    """On the console rank 0 tells what happens, the others only what is wrong; their own files get it all."""
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", "%H:%M:%S"))
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.basicConfig(level=logging.WARNING, handlers=[console])
    logging.getLogger("fedsim").setLevel(logging.DEBUG)


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


def _run_and_leave() -> None:
    """`main`, and the end of the process, also after a bug: libraries may wait for the other ranks on their way out."""
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        _leave(EXIT_BUG)
        raise
    _leave(code)


if __name__ == "__main__":
    _run_and_leave()
