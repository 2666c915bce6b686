"""Problems of a configuration in plain words: dotted key, rule, value got, remedy."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from fedsim.config.keys import all_keys, nearest_choice, nearest_key, section_names, show
from fedsim.errors import ConfigError

MOST_PROBLEMS = 5
METHODS_ELSEWHERE = {
    "fedprox": "strategy.name=fedavg and training.proximal_mu",
    "fedit": "strategy.name=fedavg and training.optimizer.name=adamw",
    **{
        name: f"strategy.name=fedavg and aggregation.server_optimizer.name={name}"
        for name in ("fedadam", "fedavgm", "fedyogi", "fedadagrad")
    },
    "fedopt": "strategy.name=fedavg and aggregation.server_optimizer.name",
}
"""Methods that are not strategies here, and the keys that make them."""


def refuse(problems: Iterable[str]) -> None:
    """Raises one ConfigError of one line for all problems; does nothing if there is none."""
    found = list(problems)
    if not found:
        return
    hidden = len(found) - MOST_PROBLEMS
    more = f"; and {hidden} more" if hidden > 0 else ""
    raise ConfigError("; ".join(" ".join(text.split()) for text in found[:MOST_PROBLEMS]) + more)


def plain_words(error: ValidationError) -> list[str]:
    """One text for each problem that pydantic found, in the order of the tree."""
    return [_plain(entry["type"], entry["loc"], entry["input"]) for entry in error.errors(include_url=False)]


def unknown_key(name: str) -> str:
    """The problem of a dotted name that is no key, with the key it most likely stands for."""
    nearest = nearest_key(name)
    shown = name if name.isprintable() else repr(name)
    return f"unknown key {shown}" + (
        f"; did you mean '{nearest}'?" if nearest else "; see --help for all keys"
    )


def _plain(kind: str, location: tuple[int | str, ...], got: Any) -> str:
    name = ".".join(part for part in location if isinstance(part, str))
    if kind == "extra_forbidden":
        return _unknown(location, name)
    if name in section_names():
        return _not_a_section(name, got)
    if name not in all_keys():
        return _in_item(kind, location, got)
    key = all_keys()[name]
    positions = [part for part in location if isinstance(part, int)]
    rule = key.item_rule if positions else key.rule
    if kind == "finite_number":
        rule = rule.replace("a number", "a finite number", 1)
    shown = name + "".join(f"[{position}]" for position in positions)
    elsewhere = (
        METHODS_ELSEWHERE.get(got.lower()) if name == "strategy.name" and isinstance(got, str) else None
    )
    remedy = f"; set {elsewhere} for it" if elsewhere else _remedy(rule, got, key.choices)
    return f"{shown} must be {rule}, got {show(got)}{remedy}"


def _in_item(kind: str, location: tuple[int | str, ...], got: Any) -> str:
    """A problem inside an item of a list of sections, such as lora.tiers[0].rank."""
    name, shown, rest = _item_place(location)
    field = next(field for field in all_keys()[name].fields if field.name == f"{name}.{rest[0]}")
    if kind == "missing":
        return f"{shown} must be set: {field.meaning}"
    rule = field.item_rule if len(rest) > 1 else field.rule  # of one name of a section of names
    return f"{shown} must be {rule}, got {show(got)}"


def _item_place(location: tuple[int | str, ...]) -> tuple[str, str, list[str]]:
    """The list's dotted name, how the place is shown, and the parts of it behind the item's number."""
    first = next(index for index, part in enumerate(location) if isinstance(part, int))
    name = ".".join(str(part) for part in location[:first])
    rest = [str(part) for part in location[first + 1 :]]
    return name, f"{name}[{location[first]}]" + "".join(f".{part}" for part in rest), rest


def _unknown(location: tuple[int | str, ...], name: str) -> str:
    if any(isinstance(part, int) for part in location):
        name, shown, _ = _item_place(location)
        fields = [field.name.rpartition(".")[2] for field in all_keys()[name].fields]
        return f"unknown key {shown}; an item of {name} has {', '.join(fields)}"
    last = str(location[-1])
    if "." in last and name in {*all_keys(), *section_names()}:
        return f"key {last!r} in a file must be nested (one section inside the other), not dotted"
    return unknown_key(name)


def _not_a_section(name: str, got: Any) -> str:
    example = next(key for key in all_keys() if key.startswith(f"{name}."))
    remedy = "; remove it or put keys below it" if got is None else ""
    return f"{name} must be a section with keys such as {example}, got {show(got)}{remedy}"


def _remedy(rule: str, got: Any, choices: tuple[str, ...]) -> str:
    choice = nearest_choice(got, choices)
    if choice:
        return f"; did you mean '{choice}'?"
    if isinstance(got, str) and "list of" in rule:
        return f"; write [{got}]" if len(got) < 40 else "; put it in brackets"
    if isinstance(got, str) and rule.startswith(("a number", "an integer")) and _is_number(got):
        return " (a text; a number has no quotes)"
    if isinstance(got, (int, float)) and rule.startswith(("a text", "a non-empty text")):
        return "; put it in quotes to make it a text"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
