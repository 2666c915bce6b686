"""The runs of a sweep: what differs between them, and what they are called."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedsim.config.schema import Config
from fedsim.errors import ConfigError

KEY = r"[a-z_0-9]+(\.[a-z_0-9]+)+"


@dataclass(frozen=True)
class Arm:
    """Overrides that make one point of a sweep, and what to call it.

    Attributes:
        name: part of the run's name; empty for the configuration as it is.
        overrides: KEY=VALUE.
    """

    name: str
    overrides: tuple[str, ...]


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
        if not re.fullmatch(KEY, key) or not values:
            raise ConfigError(f"--grid must be KEY=VALUE,VALUE,..., got '{grid}'")
        choices.append([f"{key}={value}" for value in _split(values)])
    points = [list(point) for point in itertools.product(*choices)] if choices else []
    for arm in extra:
        points.append(_split(arm))
        if not all(re.fullmatch(f"{KEY}=.+", override, re.DOTALL) for override in points[-1]):
            raise ConfigError(f"--arm must be KEY=VALUE[,KEY=VALUE...], got '{arm}'")
    if any(override.startswith("run.name=") for point in points for override in point):
        raise ConfigError(
            "run.name must not differ between arms, which get names of their own; leave it out of --grid"
        )
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds must hold each seed once, got {','.join(map(str, seeds))}")
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


def _split(text: str) -> list[str]:
    """The parts between commas, but for those inside of brackets, braces or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _short(override: str) -> str:
    """A part of a run's name: the last part of the key and the value, in characters that a name may have."""
    key, _, value = override.partition("=")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_")


def arm_arguments(run_arguments: Sequence[str], arm: Arm, base: Config) -> list[str]:
    """The arguments of fedsim.main for one arm. Without a W&B group of its own it gets the sweep's name for one.

    Args:
        run_arguments: common to all arms.
        arm: see `make_arms`.
        base: the configuration without arms; its name is the sweep's, and the first part of the run's.
    """
    common = [argument for argument in run_arguments if not argument.startswith("run.name=")]
    name = f"{base.run.name}-{arm.name}" if arm.name else base.run.name
    group = [] if base.tracking.wandb.group else [f"tracking.wandb.group={json.dumps(base.run.name)}"]
    return [*common, *arm.overrides, *group, f"run.name={name}"]
