"""What every node of the configuration tree is: frozen, strict, with a meaning and a unit at each key."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "embedded"
"""Value of `data.source` and `model.name_or_path` that stands for what fedsim brings along."""


_OWN = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
OWN_PATTERN = f"^{_OWN}$"
"""A class or function of the user's own."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,119}$"


def one_of_or_own(names: tuple[str, ...]) -> str:
    """The pattern of one of these names, or of a class or function of the user's own."""
    return rf"^({'|'.join(names)}|{_OWN})$"


def key(default: Any, meaning: str, unit: str = "", **rules: Any) -> Any:
    """A configuration field: its default, what it means, its unit, and pydantic rules such as `gt=0`."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **rules)


class Node(BaseModel):
    """A node of the tree."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
