"""Configurations that say of a published one what they change."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from fedsim.config.keys import flatten
from fedsim.config.loader import to_tree
from fedsim.config.schema import Config

MARKS = r"\b(ours|scaled down)\b"
"""In the comment of a line whose value is not the published one."""


def marked_keys(path: Path, marks: str = MARKS) -> set[str]:
    """Dotted names of the keys of a file in the comment of whose line one of the marks stands."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{prefix}{key.value}.")
            else:
                yield f"{prefix}{key.value}", lines[key.start_mark.line].partition("  # ")[2]

    return {name for name, comment in walk(yaml.compose(text), "") if re.search(marks, comment)}


def changed_keys(config: Config, published: Config) -> set[str]:
    """Dotted names of all keys, given or not, that have other values; the run's name, which is the file's, aside."""
    ours, theirs = flatten(to_tree(config)), flatten(to_tree(published))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} - {"run.name"}
