"""Groups as arms of one experiment on resource distributions, method by distribution (arXiv 2402.11505, table 2)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.report.groups import DISTRIBUTION, DISTRIBUTIONS, Group, compared, labels_of

HOMOGENEOUS = DISTRIBUTIONS[0]
"""The column that the others are compared with."""

OF_A_COLUMN = (DISTRIBUTION, "lora.tiers", "lora.rank", "lora.rank_scale")
"""Keys that say which LoRA ranks clients have."""

BASES = {"sgd": "FedAvg", "adamw": "FedIT"}
"""The paper's names: averaging of factors after local SGD is FedAvg, after AdamW FedIT."""

PLUGS = {
    "fedavg": "",
    "flexlora": "FlexLoRA",
    "hetlora": "HetLoRA",
    "hlora": "HLoRA",
    "flexlora_delta": "FlexLoRA (delta)",
    "flexlora_partitioned": "FlexLoRA (partitioned)",
    "hetlora_naive": "HetLoRA (naive)",
}
"""What is plugged into a base method; another strategy goes by its own name."""

BENCH = ("model.", "data.", "evaluation.")
"""Arms with equal keys below these are measured on the same things."""


@dataclass(frozen=True, slots=True)
class Row:
    """A method, and its arms.

    Attributes:
        label: of the method, different for each row.
        cells: column -> arm, in the order of the columns.
        homogeneous: what the others are compared with; None if there is no such run.
        borrowed: name of the method that `homogeneous` is an arm of, where that is not this one; else empty.
    """

    label: str
    cells: Mapping[str, Group]
    homogeneous: Group | None
    borrowed: str


def rows_of(groups: Sequence[Group]) -> tuple[list[str], list[Row]]:
    """Columns and rows; both empty where no run says how ranks are distributed.

    The arm that a row is compared with is its own homogeneous one, else that of plain averaging with the same
    optimizer, as in the paper, whose homogeneous clients average factors. A row of plain averaging whose only arm
    stands in other rows is left out.
    """
    if not any(_is_distributed(group.first.config) for group in groups):
        return [], []
    dropped, members = _members(groups)
    labels = _row_labels([next(iter(cells.values())) for cells in members], dropped)
    own = [_own_homogeneous(cells) for cells in members]
    families = [_family(next(iter(cells.values())).first.config, dropped) for cells in members]
    plain = {
        family: (label, group)
        for family, label, group, cells in zip(families, labels, own, members, strict=True)
        if group is not None and not _method(next(iter(cells.values())).first.config)[1]
    }
    rows = []
    for family, label, group, cells in zip(families, labels, own, members, strict=True):
        lender, lent = plain.get(family, ("", None)) if group is None else ("", group)
        shown = {HOMOGENEOUS: lent, **cells} if group is None and lent is not None else dict(cells)
        rows.append(Row(label, dict(sorted(shown.items(), key=_place)), lent, lender))
    lenders = {row.borrowed for row in rows}
    kept = [row for row in rows if row.label not in lenders or len(row.cells) > 1]
    columns = sorted({column: None for row in kept for column in row.cells}.items(), key=_place)
    return [name for name, _ in columns], kept


def column_of(config: Mapping[str, Any]) -> str:
    """Name of a run's distribution of LoRA ranks over clients."""
    if config[DISTRIBUTION] is not None:
        return str(config[DISTRIBUTION])
    tiers = config["lora.tiers"]
    if not tiers:
        return f"rank {config['lora.rank']}"
    total = sum(tier.get("share", 1.0) for tier in tiers)
    return ", ".join(f"{tier.get('share', 1.0) / total:.0%} {_tier_text(tier)}" for tier in tiers)


def bench_of(group: Group) -> str:
    """The same text for groups whose losses can be compared."""
    config = compared(group.first.config)
    return json.dumps(
        {key: config[key] for key in config if key.startswith(BENCH)}, sort_keys=True, default=str
    )


def _tier_text(tier: Mapping[str, Any]) -> str:
    others = "".join(f", {name} {rank}" for name, rank in (tier.get("module_ranks") or {}).items())
    return f"rank {tier.get('rank')}" + (f" ({others[2:]})" if others else "")


def _is_distributed(config: Mapping[str, Any]) -> bool:
    return config[DISTRIBUTION] is not None or bool(config["lora.tiers"])


def _is_even(column: str) -> bool:
    """Whether all clients of the column have the same ranks."""
    return column == HOMOGENEOUS or column.removeprefix("rank ").isdecimal()


def _place(cell: tuple[str, Any]) -> tuple[int, int, str]:
    """Homogeneous ones first, by rank; the paper's in its order; then others by name."""
    column = cell[0]
    if column != HOMOGENEOUS and _is_even(column):
        return 0, int(column.removeprefix("rank ")), ""
    if column in DISTRIBUTIONS:
        index = DISTRIBUTIONS.index(column)
        return (1, index, "") if index else (0, -1, "")
    return 2, 0, column


def _own_homogeneous(cells: Mapping[str, Group]) -> Group | None:
    """`lora.distribution=homogeneous`, else one LoRA rank for all, the smallest one there is."""
    even = [(_place((column, None)), column) for column in cells if _is_even(column)]
    return cells[min(even)[1]] if even else None


def _members(groups: Sequence[Group]) -> tuple[tuple[str, ...], list[dict[str, Group]]]:
    """For each row its arms by column, and the keys that do not tell rows apart.

    Those of a column, unless two groups would stand in one place: then fewer, and at last none.
    """
    for dropped in (OF_A_COLUMN, OF_A_COLUMN[:2]):
        rows: dict[str, dict[str, Group]] = {}
        for group in groups:
            config = compared(group.first.config)
            row = rows.setdefault(_text({key: config[key] for key in config if key not in dropped}), {})
            row.setdefault(column_of(group.first.config), group)
        if sum(map(len, rows.values())) == len(groups):
            return dropped, list(rows.values())
    return (), [{column_of(group.first.config): group} for group in groups]


def _row_labels(firsts: Sequence[Group], dropped: Sequence[str]) -> list[str]:
    """Names of the methods; what else differs is added where one name stands for several rows."""
    names = [" + ".join(filter(None, _method(group.first.config))) for group in firsts]
    labels = list(names)
    for name in {name for name in names if names.count(name) > 1}:
        places = [index for index, other in enumerate(names) if other == name]
        configs = [
            {key: value for key, value in compared(firsts[index].first.config).items() if key not in dropped}
            for index in places
        ]
        for index, text in zip(places, labels_of(configs), strict=True):
            labels[index] = f"{name}, {text}"
    return labels


def _method(config: Mapping[str, Any]) -> tuple[str, str]:
    """The base method, and what is plugged into it: ("FedIT", "FlexLoRA")."""
    strategy = str(config["strategy.name"])
    if strategy == "slora":
        then = str(config["strategy.slora.then"])
        return "SLoRA", PLUGS.get(then, then)
    optimizer = str(config["training.optimizer.name"])
    return BASES.get(optimizer, optimizer), PLUGS.get(strategy, strategy)


def _family(config: Mapping[str, Any], dropped: Sequence[str]) -> str:
    """The same text for a base method with different things plugged in, whatever the distribution."""
    base, _ = _method(config)
    kept = {
        key: value
        for key, value in compared(config).items()
        if key not in dropped and (not key.startswith("strategy.") or _is_of_slora(base, key))
    }
    return _text({**kept, "base": base})


def _is_of_slora(base: str, key: str) -> bool:
    return base == "SLoRA" and key.startswith("strategy.slora.") and key != "strategy.slora.then"


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, default=str)
