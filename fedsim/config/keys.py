"""The configuration tree in plain words, read from `Config` so that help and errors forget no key."""

import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedsim.config.data_section import PARTITIONER_PATTERN, PARTITIONERS
from fedsim.config.node import NAME_PATTERN, OWN_PATTERN
from fedsim.config.schema import Config
from fedsim.config.strategy_section import OPTION_PATTERN, STRATEGY_NAMES, STRATEGY_PATTERN

PATTERN_RULES = {
    NAME_PATTERN: "a text of 1 to 120 letters, digits, '.', '_' or '-', the first a letter or digit",
    STRATEGY_PATTERN: f"one of {'|'.join(STRATEGY_NAMES)}, or package.module:Class",
    PARTITIONER_PATTERN: f"one of {'|'.join(PARTITIONERS)}, or package.module:function",
    OPTION_PATTERN: "a text name=value",
    OWN_PATTERN: "a text package.module:function",
}
CHOICES = {STRATEGY_PATTERN: STRATEGY_NAMES, PARTITIONER_PATTERN: PARTITIONERS}
"""Pattern -> the names that it takes besides one of the user's own."""
LONGEST_SHOWN = 60
FOREIGN_NAMES = {
    "dataset": "data.source",
    "learning_rate": "training.optimizer.lr",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "micro_batch_size": "training.batch_size",
    "optim": "training.optimizer.name",
    "path": "data.source",
    "r": "lora.rank",
}
"""What other programs call our keys, where the names are not alike."""


@dataclass(frozen=True)
class Key:
    """A leaf of the tree.

    Attributes:
        name: dotted, such as `lora.rank`.
        rule: the values it takes, such as `an integer > 0`.
        item_rule: the same for one item of a list, or one name of a section of names, else empty.
        choices: the texts it takes if only some are allowed, else empty.
        default: a JSON-like value.
        unit: empty if the value has none.
        meaning: what it is for.
        fields: keys of one item, where the items of a list are sections.
    """

    name: str
    rule: str
    item_rule: str
    choices: tuple[str, ...]
    default: Any
    unit: str
    meaning: str
    fields: tuple["Key", ...] = ()


@dataclass(frozen=True)
class Section:
    """An inner node of the tree: its dotted name (empty at the root), what it holds, and its keys."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


@cache
def sections() -> tuple[Section, ...]:
    """Every section in the order of the tree, the root first."""
    return tuple(_sections("", Config))


@cache
def all_keys() -> dict[str, Key]:
    """Dotted name -> key, in the order of the tree."""
    return {key.name: key for section in sections() for key in section.keys}


def section_names() -> frozenset[str]:
    """Dotted names of all sections below the root."""
    return frozenset(section.name for section in sections() if section.name)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of a nested mapping; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def show(value: Any) -> str:
    """A value as an error names it: one line, at most about 60 characters."""
    if isinstance(value, Mapping):
        text = f"a section with {', '.join(str(name) for name in value)}" if value else "an empty section"
    elif isinstance(value, (list, tuple)):
        text = f"[{', '.join(show(item) for item in value[:20])}{', ...' if len(value) > 20 else ''}]"
    elif isinstance(value, str):
        text = repr(value if len(value) <= LONGEST_SHOWN else f"{value[: LONGEST_SHOWN - 3]}...")
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, int) and value.bit_length() > 200:
        text = "a huge integer"
    else:
        text = repr(value)
    return text if len(text) <= LONGEST_SHOWN + 20 else f"{text[:LONGEST_SHOWN]}..."


def nearest_key(unknown: str) -> str | None:
    """The known key or section that an unknown dotted name most likely stands for.

    Counts likeness of the last part, which finds a key that was put under the wrong section, and of the whole
    name, which finds a misspelt one.
    """
    parent, _, last = unknown.lower().rpartition(".")
    if last in FOREIGN_NAMES:
        return FOREIGN_NAMES[last]
    last = last.removeprefix(f"{parent.rpartition('.')[2]}_") if parent else last
    candidates = [*all_keys(), *sorted(section_names())]
    last_names = [name.rpartition(".")[2] for name in candidates]

    def likeness(known: str) -> float:
        known_parent, _, known_last = known.rpartition(".")
        shorter, longer = sorted((last, known_last), key=len)
        is_part = len(shorter) > 3 and shorter != longer and shorter in longer.split("_")
        if _ratio(last, known_last) < 0.45 and not is_part:
            return 0.0
        score = _ratio(last, known_last) + 0.5 * _ratio(unknown.lower(), known) + (0.3 if is_part else 0.0)
        if last == known_last and last_names.count(last) == 1:
            score += 0.5
        if parent and parent == known_parent:
            score += 0.4
        return score

    best = max(candidates, key=likeness)
    return best if likeness(best) >= 1.0 else None


def nearest_choice(value: Any, choices: tuple[str, ...]) -> str | None:
    """The allowed text that a refused one most likely stands for."""
    if not isinstance(value, str) or not choices:
        return None
    best = max(choices, key=lambda choice: _ratio(value.lower(), choice))
    return best if _ratio(value.lower(), best) >= 0.7 else None


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


def _sections(name: str, node: type[BaseModel]) -> Iterator[Section]:
    prefix = f"{name}." if name else ""
    keys = []
    below = []
    for field_name, field in node.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append((f"{prefix}{field_name}", field.annotation))
        else:
            keys.append(_key(f"{prefix}{field_name}", field))
    yield Section(name, " ".join((node.__doc__ or "").split()), tuple(keys))
    for child_name, child in below:
        yield from _sections(child_name, child)


def _key(name: str, field: FieldInfo) -> Key:
    extra = field.json_schema_extra
    unit = extra.get("unit", "") if isinstance(extra, dict) else ""
    annotation, optional = _without_null(field.annotation)
    default = field.get_default(call_default_factory=True, validated_data={})
    bounds = _bounds(field.metadata)
    choices = CHOICES.get(bounds.get("pattern", ""), ())
    item = _item(annotation)[0] if get_origin(annotation) is tuple else None
    return Key(
        name=name,
        rule=_rule(annotation, bounds) + (" or null" if optional else ""),
        item_rule=_item_rule(annotation),
        choices=get_args(annotation) if get_origin(annotation) is Literal else choices,
        default=list(default) if isinstance(default, tuple) else default,
        unit=str(unit),
        meaning=field.description or "",
        fields=tuple(_key(f"{name}.{child}", below) for child, below in item.model_fields.items())
        if isinstance(item, type) and issubclass(item, BaseModel)
        else (),
    )


def _without_null(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        (rest,) = (part for part in get_args(annotation) if part is not type(None))
        return rest, True
    return annotation, False


def _bounds(metadata: list[Any]) -> dict[str, Any]:
    """Names such as gt or min_length -> bound, from pydantic's and annotated_types' markers."""
    names = ("gt", "ge", "lt", "le", "min_length", "max_length", "pattern")
    return {
        name: getattr(marker, name)
        for marker in metadata
        for name in names
        if getattr(marker, name, None) is not None
    }


def _item(annotation: Any) -> tuple[Any, dict[str, Any]]:
    """Type and bounds of the items of a tuple[item, ...]."""
    return _split(get_args(annotation)[0])


def _split(item: Any) -> tuple[Any, dict[str, Any]]:
    """Type and bounds of an annotated type."""
    if get_origin(item) is not Annotated:
        return item, {}
    plain, *markers = get_args(item)
    return plain, _bounds([mark for field in markers for mark in getattr(field, "metadata", [field])])


def _item_rule(annotation: Any) -> str:
    if get_origin(annotation) is dict:
        return _rule(*_split(get_args(annotation)[1]))
    return _rule(*_item(annotation)) if get_origin(annotation) is tuple else ""


def _rule(annotation: Any, bounds: dict[str, Any]) -> str:
    if get_origin(annotation) is Literal:
        return f"one of {'|'.join(get_args(annotation))}"
    if get_origin(annotation) is tuple:
        one = _item_rule(annotation).partition(" ")[2]
        plural = (
            one.replace("text", "texts", 1)
            .replace("integer", "integers", 1)
            .replace("section", "sections", 1)
        )
        return f"a {'non-empty ' if bounds.get('min_length') else ''}list of {plural}"
    if get_origin(annotation) is dict:
        return f"a section of names, each with {_item_rule(annotation)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with {', '.join(annotation.model_fields)}"
    return _scalar_rule(annotation, bounds)


def _scalar_rule(annotation: Any, bounds: dict[str, Any]) -> str:
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return f"{'an integer' if annotation is int else 'a number'}{_range(annotation, bounds)}"
    if annotation is str:
        return _text_rule(bounds)
    raise TypeError(f"no words for the type {annotation!r} of a configuration key")


def _text_rule(bounds: dict[str, Any]) -> str:
    if "pattern" in bounds:
        return PATTERN_RULES[bounds["pattern"]]
    text = "a non-empty text" if bounds.get("min_length") else "a text"
    return f"{text} of at most {bounds['max_length']} characters" if "max_length" in bounds else text


def _range(annotation: Any, bounds: dict[str, Any]) -> str:
    low = bounds.get("ge", bounds.get("gt"))
    high = bounds.get("le", bounds.get("lt"))
    if high is None:
        return "" if low is None else f" {'>=' if 'ge' in bounds else '>'} {low}"
    if low is None:
        return f" {'<=' if 'le' in bounds else '<'} {high}"
    if isinstance(low, int) and "ge" not in bounds and annotation is int:
        low, bounds = low + 1, {**bounds, "ge": low + 1}
    power = high.bit_length() - 1 if isinstance(high, int) else 0
    upper = f"2**{power}" if power > 20 and high == 2**power else f"{high}"
    return f" in {'[' if 'ge' in bounds else '('}{low}, {upper}{']' if 'le' in bounds else ')'}"
