"""`python -m launch sweep`: one configuration with several values of some keys and several seeds.

On this machine run after run, or as a job array of Slurm: an option that only Slurm understands decides.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fedsim.config.loader import parse_command_line
from fedsim.errors import ConfigError
from fedsim.stopping import EXIT_PREEMPTED
from launch.arguments import Parser, positive
from launch.arms import Arm, arm_arguments, make_arms
from launch.array import submit_sweep
from launch.local import LAUNCHER_VARIABLES, Machine, Plan, count_cores, count_gpus, plan_local
from launch.options import add_slurm_options, parse_options


def main(arguments: Sequence[str]) -> int:
    """Check every configuration, then run or submit them; 0 if all of them finished, or were taken.

    Raises:
        ConfigError: a configuration, or what it asks of this machine, is wrong; nothing has been started then.
        RunFolderError: with Slurm: a run cannot use its folder, or the sweep was submitted before.
        SchedulerError: Slurm is not there, or refuses the jobs.
    """
    parser, slurm_options = _parser()
    options = parse_options(parser, arguments)
    arms = make_arms(options.grid, options.arm, options.seeds)
    if not (options.grid or options.arm or options.seeds):
        raise ConfigError(
            "a sweep needs --grid, --arm or --seeds; `python -m launch local` makes a single run"
        )
    for_slurm = [name for name in slurm_options if getattr(options, name) is not parser.get_default(name)]
    if for_slurm == ["dry_run"]:  # without any other option of Slurm, the runs would be made here
        options.print, for_slurm = True, []
    if for_slurm:
        local = [f"--{name}" for name in ("jobs", "processes", "print") if getattr(options, name)]
        if local:
            raise ConfigError(
                f"{' and '.join(local)} must be left out with {_as_option(for_slurm[0])}, which chooses Slurm; there "
                "--parallel says how many runs at a time, --processes-per-node how many processes, --dry-run shows it"
            )
        return submit_sweep(options, arms)
    jobs = options.jobs or 1
    machine = Machine(count_gpus(os.environ), max(1, count_cores() // jobs))
    plans = plan_sweep(options.rest, arms, machine, options.processes)
    if options.print:
        for plan in plans:
            print(plan.as_text())
        return 0
    return run_all(plans, [arm.name for arm in arms], jobs)


def plan_sweep(
    run_arguments: Sequence[str], arms: Sequence[Arm], machine: Machine, processes: int | None = None
) -> list[Plan]:
    """One command for each arm, all of them checked.

    Args:
        run_arguments: of fedsim.main, common to all; a name given there is the first part of every run's name.
        arms: see `make_arms`.
        machine: what each run may use.
        processes: of each run; None decides.

    Raises:
        ConfigError: a configuration is wrong.
    """
    base = parse_command_line(list(run_arguments)).config
    plans = []
    for arm in arms:
        whole = arm_arguments(run_arguments, arm, base)
        plans.append(plan_local(parse_command_line(whole).config, machine, whole, processes))
    return plans


def run_all(plans: Sequence[Plan], names: Sequence[str], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in order; say how each ended. 0, or the first code that is not.

    After SIGINT or SIGTERM, which the runs that are under way get as well, no other one is begun, and the code is 75.
    """
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    asked: list[int] = []
    children: set[subprocess.Popen[bytes]] = set()

    def stop(number: int, frame: object) -> None:  # noqa: ARG001
        asked.append(number)
        if number == signal.SIGTERM:  # a terminal's Ctrl-C reaches them by itself
            for child in list(children):
                child.send_signal(number)

    def run(item: tuple[int, Plan]) -> int:
        index, plan = item
        if asked:
            return EXIT_PREEMPTED
        child = subprocess.Popen(plan.executed, env={**environment, **plan.environment})
        children.add(child)
        if asked:
            child.send_signal(signal.SIGTERM)
        code = child.wait()
        children.discard(child)
        told = "finished" if code == 0 else f"ended with {code}"
        minutes = (time.monotonic() - began) / 60
        sys.stderr.write(
            f"launch: {index + 1} of {len(plans)}, {names[index]}: {told}, {minutes:.1f} min so far\n"
        )
        return code

    in_main = threading.current_thread() is threading.main_thread()
    before = (
        {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    )
    try:
        with ThreadPoolExecutor(jobs) as pool:
            codes = list(pool.map(run, enumerate(plans)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        sys.stderr.write(
            f"launch: stopped by {signal.Signals(asked[0]).name} with {codes.count(0)} of {len(plans)} runs finished; "
            "the same command goes on\n"
        )
        return EXIT_PREEMPTED
    return next((code for code in codes if code != 0), 0)


def _as_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> tuple[Parser, list[str]]:
    """The parser, and the names of the options that choose Slurm."""
    parser = Parser(
        prog="python -m launch sweep",
        description="Run a configuration with several values of some keys, and several seeds. Without options of Slurm "
        "the runs are made on this machine, one after another, and the same command again goes on where it stopped. "
        "With any of them, such as --nodes, --time, --partition, --profile or just --slurm, they are submitted as a "
        "job array. Each run has a folder of its own.",
        epilog="example: python -m launch sweep configs/quickstart.yaml --grid "
        "data.partition.dirichlet_alpha=0.1,1,100 --arm data.partition.name=iid --seeds 0,1,2",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values of a key; several grids are combined",
    )
    parser.add_argument(
        "--arm", action="append", default=[], metavar="KEY=V[,KEY=V]", help="one more point, beside the grid"
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=(), metavar="0,1,2", help="values of run.seed for every point"
    )
    local = parser.add_argument_group("this machine")
    local.add_argument("--jobs", type=positive, metavar="N", help="runs at the same time; default: 1")
    local.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="processes of each run; default: as `launch local` decides",
    )
    local.add_argument(
        "--print",
        action="store_true",
        help="print the commands, and stop; --dry-run without another option of Slurm is the same",
    )
    parser.add_argument("rest", nargs="*", metavar="CONFIG.yaml | KEY=VALUE", help="as for fedsim.main")
    names = {action.dest for action in parser._actions}
    group = add_slurm_options(parser)
    group.add_argument(
        "--slurm", action="store_true", help="submit, though no other option of Slurm is given"
    )
    group.add_argument(
        "--parallel", type=positive, metavar="M", help="elements of the array that run at a time"
    )
    group.add_argument(
        "--resubmit",
        action="store_true",
        help="a sweep that was submitted before: send what has not finished",
    )
    return parser, [action.dest for action in parser._actions if action.dest not in names]


def _seeds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}")
    return tuple(int(seed) for seed in text.split(","))
