"""Runs of one configuration with several seeds, what tells groups apart, and their mean and spread."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fedsim.config.checks_data import USERS_OF_KEYS, uses_key
from fedsim.config.keys import all_keys, show
from fedsim.config.loader import SAFE_KEYS
from fedsim.config.model_section import Distribution
from fedsim.errors import ConfigError
from fedsim.report.folders import RunRecord

LENGTH = ("run.rounds", "early_stopping.patience")
"""What a resumed run may change, and is another experiment all the same: it decides how long a run goes on."""

IGNORED = ("run.seed", "run.seeds", "run.name", *(key for key in SAFE_KEYS if key not in LENGTH))
"""Keys that do not make another configuration: the seed, names, and what else a resumed run may change."""

ALWAYS_SHOWN = 3
"""A label shows every key that differs where no more than this many do."""

LONGEST_VALUE = 36
PARTITION = "data.partition.name"
DIRICHLET_ALPHA = "data.partition.dirichlet_alpha"
STRATEGY = "strategy.name"
DISTRIBUTION = "lora.distribution"
DISTRIBUTIONS: tuple[str, ...] = get_args(Distribution)
"""Resource distributions in the paper's order."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over the seeds of a group; `std` is the sample standard deviation, None for one run."""

    mean: float
    low: float
    high: float
    std: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Series:
    """A metric by rounds completed, over the runs that have it: mean, least, most, number of runs.

    `num_seeds` are those that have it in any round.
    """

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    count: NDArray[np.int64]
    num_seeds: int


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in seed and name only.

    Attributes:
        label: what tells it from the other groups of the report.
        runs: those that count, by seed: the finished ones or, where none is, all that have a round.
        left_out: the others.
    """

    label: str
    runs: tuple[RunRecord, ...]
    left_out: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        """The counted run of the lowest seed."""
        return self.runs[0]

    @property
    def num_seeds(self) -> int:
        """Seeds of the counted runs."""
        return len({run.seed for run in self.runs})

    @property
    def is_finished(self) -> bool:
        """Whether its figures are those of finished runs."""
        return all(run.is_finished for run in self.runs)

    def series(self, key: str, initial_key: str | None = None) -> Series | None:
        """A metric of `metrics.jsonl` by rounds completed, None where no run has it.

        Args:
            key: of the metric; its value after round_index r stands at r + 1 rounds completed.
            initial_key: of the value before training, which the first record holds; it stands at 0.
        """

        def by_rounds_completed(run: RunRecord) -> dict[int, float]:
            found = {index + 1: value for index, value in run.values(key).items()}
            before = run.values(initial_key) if initial_key else {}
            return {0: before[0], **found} if found and 0 in before else found

        return self.series_of(by_rounds_completed)

    def series_of(self, values: Callable[[RunRecord], Mapping[int, float]]) -> Series | None:
        """What `values` gives for each run, rounds completed -> value; None where no run has any."""
        by_round: dict[int, list[float]] = {}
        seeds = set()
        for run in self.runs:
            for index, value in values(run).items():
                by_round.setdefault(index, []).append(value)
                seeds.add(run.seed)
        if not by_round:
            return None
        rounds = sorted(by_round)
        found = [by_round[index] for index in rounds]
        return Series(
            x=np.array(rounds, dtype=np.float64),
            mean=np.array([np.mean(at) for at in found]),
            low=np.array([min(at) for at in found]),
            high=np.array([max(at) for at in found]),
            count=np.array([len(at) for at in found]),
            num_seeds=len(seeds),
        )

    def spread(self, figure: Callable[[RunRecord], float | None]) -> Spread | None:
        """A figure of a run over the counted runs that have it; None where none has."""
        return _spread_of([value for value in map(figure, self.runs) if value is not None])

    def seeds_with(self, figure: Callable[[RunRecord], float | None]) -> int:
        """Seeds of the counted runs that have a figure."""
        return len({run.seed for run in self.runs if figure(run) is not None})

    def difference(self, other: "Group", figure: Callable[[RunRecord], float | None]) -> Spread | None:
        """A figure minus that of another group at the same seed, over the seeds that stand for one run in both.

        A seed decides the test set where that is drawn at random, so runs of one seed are alike in what differs
        between seeds. None where no seed is shared.
        """
        mine, theirs = self._by_seed(figure), other._by_seed(figure)
        values = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
        return _spread_of(values)

    def _by_seed(self, figure: Callable[[RunRecord], float | None]) -> dict[int, float]:
        seeds = [run.seed for run in self.runs]
        found = {run.seed: figure(run) for run in self.runs if seeds.count(run.seed) == 1}
        return {seed: value for seed, value in found.items() if value is not None}


def group_runs(records: Sequence[RunRecord]) -> list[Group]:
    """Runs with at least one round, grouped by configuration; ordered by the keys in which the groups differ."""
    by_config: dict[str, list[RunRecord]] = {}
    for record in records:
        if record.metrics:
            by_config.setdefault(_identity(record.config), []).append(record)
    members = list(by_config.values())
    configs = [compared(runs[0].config) for runs in members]
    keys = _keys_that_differ(configs)
    labels = _labels(configs, members)
    groups = []
    for place in sorted(range(len(members)), key=lambda index: _sort_key(configs[index], keys)):
        runs = sorted(members[place], key=lambda run: (run.seed, run.name))
        finished = tuple(run for run in runs if run.is_finished)
        left_out = tuple(run for run in runs if finished and not run.is_finished)
        groups.append(Group(labels[place], finished or tuple(runs), left_out))
    return groups


def _spread_of(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), min(values), max(values), std, len(values))


def seed_of(run: RunRecord) -> str:
    """`(seed 0)`, in one piece where a line is broken."""
    return f"(seed\u00a0{run.seed})"


def most_seeds(groups: Sequence[Group]) -> int:
    """Seeds of the group that has most."""
    return max((group.num_seeds for group in groups), default=0)


def with_seeds(label: str, num_seeds: int, most: int) -> str:
    """`label (1 of 2 seeds)` where a line or point is over fewer seeds than there are, else the label alone."""
    return label if num_seeds >= most else f"{label} ({num_seeds} of {most} seeds)"


def compared(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that make it another one, without those that its partitioner does not use."""
    unused = {f"data.partition.{key}" for key in USERS_OF_KEYS if not uses_key(config[PARTITION], key)}
    return {key: value for key, value in config.items() if key not in unused and not _is_ignored(key)}


def _is_ignored(key: str) -> bool:
    return any(key == name or (name.endswith(".*") and key.startswith(name[:-1])) for name in IGNORED)


def _identity(config: Mapping[str, Any]) -> str:
    return json.dumps(compared(config), sort_keys=True, default=str)


def _keys_that_differ(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of which the configurations that have them have several values, in the order of the configuration tree.

    One that only some partitioners use tells nothing beyond their names, if all that use it agree.
    """
    found = dict.fromkeys(key for config in configs for key in config)
    in_order = [
        *(key for key in all_keys() if key in found),
        *(key for key in found if key not in all_keys()),
    ]
    return [
        key for key in in_order if len({_key_text(config[key]) for config in configs if key in config}) > 1
    ]


def _key_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _sort_key(config: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[int, float, str]]:
    """Numbers by size, before texts; null first, an IID partition last: it is the limit of large alphas.

    Resource distributions have the order of the paper's table.
    """
    order = []
    for key in keys:
        value = config.get(key)
        if key == PARTITION and value == "iid":
            order.append((3, 0.0, ""))
        elif value is None:
            order.append((0, 0.0, ""))
        elif key == DISTRIBUTION and value in DISTRIBUTIONS:
            order.append((1, float(DISTRIBUTIONS.index(value)), ""))
        elif isinstance(value, int | float):
            order.append((1, float(value), ""))
        else:
            order.append((2, 0.0, str(value)))
    return order


def baseline_of(groups: Sequence[Group], wanted: Mapping[str, Any] | None = None) -> Group:
    """The group that others are compared with.

    Args:
        groups: of a report, at least one.
        wanted: key, dotted or as labels name it -> its value; None for the only IID group or, where there is not one,
            the first group.

    Raises:
        ConfigError: a key is none that groups have, or not one group has these values.
    """
    configs = [compared(group.first.config) for group in groups]
    if wanted is None:
        even = [group for group in groups if group.first.config[PARTITION] == "iid"]
        return even[0] if len(even) == 1 else groups[0]
    dotted = {name: key for key, name in _short_names(_keys_that_differ(configs)).items()}
    keys = {dotted.get(name, name): value for name, value in wanted.items()}
    for key in keys:
        if not any(key in config for config in configs):
            raise ConfigError(
                f"command line: --baseline must have keys that make configurations, or short ones that their labels "
                f"show, got {show(key)}"
            )
    found = [
        group
        for group, config in zip(groups, configs, strict=True)
        if all(key in config and _is_value(config[key], value) for key, value in keys.items())
    ]
    if len(found) != 1:
        given = ",".join(f"{name}={show(value)}" for name, value in wanted.items())
        which = "; ".join(group.label for group in found or groups)
        raise ConfigError(
            f"command line: --baseline {given} must hold for one configuration, got {len(found)} of {len(groups)}; "
            f"{'these' if found else 'there'} are: {which}"
        )
    return found[0]


def _is_value(value: Any, wanted: Any) -> bool:
    """Equal values, or a text that a label shows of a value: the last part of a path, 0.1 for 0.1."""
    return _key_text(value) == _key_text(wanted) or _value_text(value) == _value_text(wanted)


def labels_of(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each configuration what a reader needs of the keys in which they differ, with its values.

    Where that leaves two with one label they name all of these keys, and may be alike still: values are shortened.
    """
    keys = _keys_that_differ(configs)
    names = _short_names(keys)
    short = [_label(config, _shown_keys(config, configs, keys), names) for config in configs]
    whole = [_label(config, keys, names) for config in configs]
    return [one if short.count(one) == 1 else other for one, other in zip(short, whole, strict=True)]


def _labels(configs: Sequence[Mapping[str, Any]], members: Sequence[Sequence[RunRecord]]) -> list[str]:
    """A different text for each configuration."""
    if len(configs) == 1:
        return [runs[0].name if len(runs) == 1 else "all runs" for runs in members]
    labels = labels_of(configs)
    return [
        label if labels.count(label) == 1 else f"{label} ({runs[0].name})"
        for label, runs in zip(labels, members, strict=True)
    ]


def _shown_keys(
    config: Mapping[str, Any], configs: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> list[str]:
    """Of the keys that differ and that the configuration uses, those that a label needs.

    Where many differ, one is left out where it has the value of more than half of the groups, but for the strategy.
    Where alpha is shown the name of the only partition that has one adds nothing.
    """
    shown = []
    for key in keys:
        values = Counter(_key_text(other[key]) for other in configs if key in other)
        if key not in config:
            continue
        is_usual = values[_key_text(config[key])] > len(configs) / 2
        if len(keys) <= ALWAYS_SHOWN or key == STRATEGY or not is_usual:
            shown.append(key)
    with_alpha = {str(other[PARTITION]) for other in configs if DIRICHLET_ALPHA in other}
    if DIRICHLET_ALPHA in shown and len(with_alpha) == 1:
        return [key for key in shown if key != PARTITION]
    return shown


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """`lora.rank` -> `rank`, `strategy.name` -> `strategy`; the dotted key where that is not unique."""
    short = {}
    for key in keys:
        parent, _, last = key.rpartition(".")
        short[key] = parent.rpartition(".")[2] if last in ("name", "name_or_path") and parent else last
    counts = Counter(short.values())
    return {key: name if counts[name] == 1 else key for key, name in short.items()}


def _label(config: Mapping[str, Any], keys: Sequence[str], names: Mapping[str, str]) -> str:
    text = ", ".join(f"{names[key]}={_value_text(config[key])}" for key in keys if key in config)
    return text or "otherwise as usual"


def _value_text(value: Any) -> str:
    """A value in a label: short, one line."""
    if isinstance(value, str):
        text = value.rstrip("/").rpartition("/")[2]
    elif isinstance(value, list):
        text = "+".join(map(_value_text, value)) or "none"
    elif isinstance(value, dict):
        text = "/".join(_value_text(item) for item in value.values() if item not in ({}, [], None))
    else:
        text = f"{value:g}" if isinstance(value, float) else json.dumps(value, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
