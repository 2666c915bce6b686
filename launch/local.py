"""`python -m launch local`: check the configuration once, then run it on this machine by torchrun."""

import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedsim.config.loader import parse_command_line
from fedsim.config.schema import Config
from fedsim.errors import ConfigError
from launch.arguments import Parser, positive

TORCHRUN = "torch.distributed.run"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""What a launcher around this one may have left in the environment."""


@dataclass(frozen=True)
class Machine:
    """What this machine offers.

    Attributes:
        num_gpus: GPUs that a process started here would see.
        num_cores: CPU cores that this process may use.
    """

    num_gpus: int
    num_cores: int


@dataclass(frozen=True)
class Plan:
    """A command, ready to be executed.

    Attributes:
        argv: program and arguments, with torchrun where there are several processes.
        environment: variables to set, on top of those that are there.
        reason: why so many processes, in words.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    reason: str

    def as_text(self) -> str:
        """The command as a line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.argv)])

    @property
    def executed(self) -> tuple[str, ...]:
        """`argv` with `launch.agent` in torchrun's place."""
        return tuple("launch.agent" if word == TORCHRUN else word for word in self.argv[:3]) + self.argv[3:]


def main(arguments: Sequence[str]) -> int:
    """Check, plan, and replace this process by the run; with --print, print its command instead.

    Raises:
        ConfigError: the configuration, or what it asks of this machine, is wrong.
    """
    own, extra = split_arguments(arguments)
    options = _parser().parse_intermixed_args(own)
    run_arguments = list(options.rest)
    if options.threads is not None:
        run_arguments.append(f"run.threads_per_process={options.threads}")
    config = parse_command_line([*run_arguments, *extra]).config
    machine = Machine(count_gpus(os.environ), count_cores())
    plan = plan_local(config, machine, [*run_arguments, *extra], options.processes)
    idle = None if options.processes is None else idle_note(config, options.processes)
    if idle is not None:
        sys.stderr.write(f"launch: note: {idle}\n")
    if options.print:
        print(plan.as_text())
        return 0
    return _become(plan)


def plan_local(
    config: Config,
    machine: Machine,
    run_arguments: Sequence[str],
    processes: int | None = None,
    python: str = sys.executable,
) -> Plan:
    """The command that runs `config` on `machine`. Pure.

    Args:
        config: what `run_arguments` say, checked.
        machine: to run on.
        run_arguments: of fedsim.main.
        processes: how many; None decides, see `choose_processes`.
        python: interpreter of the run.

    Raises:
        ConfigError: run.device is cuda, no GPU is found and `processes` does not say how many there are.
    """
    threads = config.run.threads_per_process
    if processes is None:
        processes, reason = choose_processes(config, machine)
    else:
        reason = "as asked for"
    program = ["-m", "fedsim.main", *run_arguments]
    if processes > 1:
        torchrun = ["-m", TORCHRUN, "--standalone", "--nproc_per_node", str(processes)]
        program = [*torchrun, *program]
    return Plan((python, *program), {"OMP_NUM_THREADS": str(threads)}, f"{_count(processes)}: {reason}")


def choose_processes(config: Config, machine: Machine) -> tuple[int, str]:
    """(number of processes, why): one a GPU, else one for every `run.threads_per_process` cores; never more than packs.

    The result of a run does not depend on this number, its duration does.

    Raises:
        ConfigError: run.device is cuda and no GPU is found.
    """
    threads = config.run.threads_per_process
    if config.run.device != "cpu" and machine.num_gpus > 0:
        offered, reason = machine.num_gpus, f"one for each of {machine.num_gpus} visible GPUs"
    elif config.run.device == "cuda":
        raise ConfigError(
            "--processes must be given when run.device is cuda and no GPU is found under /dev, got none; "
            "or set run.device=auto"
        )
    else:
        offered = max(1, machine.num_cores // threads)
        reason = f"{machine.num_cores} cores, {threads} a process"
    useful = num_packs(config)
    if offered > useful:
        return useful, f"a round has no more packs than that; there is room for {offered} ({reason})"
    return offered, reason


def count_gpus(environment: Mapping[str, str], device_folder: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started here would see, found without asking the driver.

    Where CUDA_VISIBLE_DEVICES is set, as Slurm sets it, its entries are counted up to the first that hides what
    follows (-1 or nothing), which is how CUDA reads it. Elsewhere the device files nvidia0, nvidia1, ... are counted.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        entries = [entry.strip() for entry in visible.split(",")]
        ends = [index for index, entry in enumerate(entries) if entry in ("", "-1", "NoDevFiles")]
        return ends[0] if ends else len(entries)
    try:
        names = [path.name for path in device_folder.iterdir()]
    except OSError:
        return 0
    return sum(re.fullmatch(r"nvidia[0-9]+", name) is not None for name in names)


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_packs(config: Config) -> int:
    """Packs of a round, at most: what there is to deal out to processes."""
    if config.strategy.name == "centralized":
        return 1  # one virtual client
    if config.cohort.sampling == "poisson":  # any number of clients may be drawn
        return config.training.pack.num_packs
    size = config.cohort.clients_a_round(config.data.partition.num_clients)
    return min(math.ceil(size), config.training.pack.num_packs)


def idle_note(config: Config, processes: int) -> str | None:
    """That some of so many processes will have nothing to do, in words; None if all have."""
    packs = num_packs(config)
    if processes <= packs:
        return None
    return (
        f"{processes} processes share out {packs} packs a round, so that {processes - packs} will idle; "
        "raise training.pack.num_packs or cohort.size"
    )


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first `--`."""
    if "--" not in arguments:
        return list(arguments), []
    at = list(arguments).index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


def _become(plan: Plan) -> NoReturn:
    sys.stderr.write(f"launch: {plan.reason}\n")
    sys.stderr.flush()
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    os.execve(plan.executed[0], plan.executed, {**environment, **plan.environment})


def _parser() -> Parser:
    parser = Parser(
        prog="python -m launch local",
        description="Check the configuration once, then run it on this machine with as many processes as fit it.",
        epilog="`python -m launch local -- --help` explains the keys.",
        allow_abbrev=False,
    )
    parser.elsewhere = "those of fedsim.main stand behind --"
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="processes; default: the visible GPUs (CUDA_VISIBLE_DEVICES, else /dev/nvidia0, ...), without any the "
        "usable cores divided by run.threads_per_process; at most the packs of a round",
    )
    parser.add_argument("--threads", type=positive, metavar="T", help="the same as run.threads_per_process=T")
    parser.add_argument("--print", action="store_true", help="print it as a command of torchrun, and stop")
    parser.add_argument(
        "rest",
        nargs="*",
        metavar="CONFIG.yaml | KEY=VALUE | -- OPTION",
        help="as for fedsim.main; its options, such as --dry-run, stand behind --",
    )
    return parser


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
