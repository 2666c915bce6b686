"""`python -m launch sweep`: one configuration with several values of some keys and several seeds, run after run."""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fedsim.config.loader import parse_command_line
from fedsim.errors import ConfigError
from launch.local import LAUNCHER_VARIABLES, Machine, Plan, count_cores, count_gpus, plan_local, positive


@dataclass(frozen=True)
class Arm:
    """Overrides that make one point of a sweep, and what to call it.

    Attributes:
        name: part of the run's name; empty for the configuration as it is.
        overrides: KEY=VALUE.
    """

    name: str
    overrides: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    """Check every configuration, then run them; 0 if all of them finished.

    Raises:
        ConfigError: a configuration, or what it asks of this machine, is wrong; nothing has been started then.
    """
    options = _parser().parse_intermixed_args(list(arguments))
    arms = make_arms(options.grid, options.arm, options.seeds)
    machine = Machine(count_gpus(os.environ), max(1, count_cores() // options.jobs))
    plans = plan_sweep(options.rest, arms, machine, options.processes)
    if options.print:
        for plan in plans:
            print(plan.as_text())
        return 0
    return run_all(plans, [arm.name for arm in arms], options.jobs)


def make_arms(grids: Sequence[str], extra: Sequence[str], seeds: Sequence[int]) -> list[Arm]:
    """All combinations of the grids, then the extra arms; each of them with every seed.

    Args:
        grids: KEY=V1,V2,... each.
        extra: KEY=VALUE[,KEY=VALUE...] each.
        seeds: values of run.seed; none for the configuration's own.

    Raises:
        ConfigError: a grid has no value, or two arms would have one name.
    """
    choices = []
    for grid in grids:
        key, _, values = grid.partition("=")
        if not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)+", key) or not values:
            raise ConfigError(f"--grid must be KEY=VALUE,VALUE,..., got '{grid}'")
        choices.append([f"{key}={value}" for value in values.split(",")])
    points = [list(point) for point in itertools.product(*choices)] if choices else []
    points += [arm.split(",") for arm in extra]
    seeded = [
        [*point, *([] if seed is None else [f"run.seed={seed}"])]
        for point in points or [[]]
        for seed in (seeds or (None,))
    ]
    arms = [Arm("-".join(_short(override) for override in point), tuple(point)) for point in seeded]
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"every arm of a sweep must have a name of its own, got {', '.join(twice)} more than once"
        )
    return arms


def _short(override: str) -> str:
    """A part of a run's name: the last part of the key and the value, in characters that a name may have."""
    key, _, value = override.partition("=")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_")


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
    plans = []
    base = parse_command_line(list(run_arguments)).config.run.name
    common = [argument for argument in run_arguments if not argument.startswith("run.name=")]
    for arm in arms:
        name = f"{base}-{arm.name}" if arm.name else base
        whole = [*common, *arm.overrides, f"run.name={name}"]
        plans.append(plan_local(parse_command_line(whole).config, machine, whole, processes))
    return plans


def run_all(plans: Sequence[Plan], names: Sequence[str], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in order; say how each ended. 0, or the first code that is not."""
    began = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}

    def run(item: tuple[int, Plan]) -> int:
        index, plan = item
        code = subprocess.run(plan.argv, env={**environment, **plan.environment}, check=False).returncode
        told = "finished" if code == 0 else f"ended with {code}"
        minutes = (time.monotonic() - began) / 60
        sys.stderr.write(
            f"launch: {index + 1} of {len(plans)}, {names[index]}: {told}, {minutes:.1f} min so far\n"
        )
        return code

    with ThreadPoolExecutor(jobs) as pool:
        codes = list(pool.map(run, enumerate(plans)))
    return next((code for code in codes if code != 0), 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch sweep",
        description="Run a configuration with several values of some keys, and several seeds, one run after another. "
        "Each run has a folder of its own; the same command again goes on where it stopped.",
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
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs at the same time; default: 1"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        metavar="N",
        help="processes of each run; default: as `launch local` decides",
    )
    parser.add_argument("--print", action="store_true", help="print the commands, and stop")
    parser.add_argument("rest", nargs="*", metavar="CONFIG.yaml | KEY=VALUE", help="as for fedsim.main")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}")
    return tuple(int(seed) for seed in text.split(","))
