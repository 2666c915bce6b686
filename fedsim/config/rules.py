"""What checks of several keys are made of."""

from collections.abc import Iterator

from fedsim.config.keys import all_keys, show


def exactly_one(section: str, values: dict[str, object]) -> Iterator[str]:
    """Exactly one of the keys of a section is set."""
    names = [f"{section}.{name}" for name in values]
    are_set = [f"{section}.{name}={show(value)}" for name, value in values.items() if value is not None]
    choice = f"{', '.join(names[:-1])} and {names[-1]}"
    if not are_set:
        yield f"one of {choice} must be set, got null for all"
    if len(are_set) > 1:
        yield f"only one of {choice} may be set, got {' and '.join(are_set)}; set the others to null"


def unused_keys(section: str, node: object, names: tuple[str, ...], because: str) -> Iterator[str]:
    """Keys that the rest of the configuration makes meaningless stay at their defaults."""
    for name in names:
        default, got = all_keys()[f"{section}.{name}"].default, getattr(node, name)
        if (list(got) if isinstance(got, tuple) else got) != default:
            yield f"{section}.{name} must stay at its default {show(default)} {because}, got {show(got)}"
