"""YAML in and out, so that a value means what it looks like.

PyYAML reads YAML 1.1, where `off` is false, `010` is 8, `1:30` is 90 and `1e-8` is a text. Here only `true`
and `false` are truth values, integers are decimal, and what looks like a decimal number to Python is one. What
we write is quoted wherever either reading would turn a text into something else.
"""

import re
from typing import Any

import yaml

from fedsim.errors import ConfigError

MOST_NODES = 10_000
DEEPEST = 20
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")
}

_MERGE = "tag:yaml.org,2002:merge"
_RESOLVERS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("merge", r"^<<$", "<"),
)


class _Loader(yaml.SafeLoader):
    """Safe loader with the plain scalars described at the top of this file."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's way)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that also quotes what only `_Loader` would take for a number; lists stay on one line."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list(_first))
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds line breaks in other styles, and loses some of Unicode's
    has_break = re.search(r"[\n\r\x85\u2028\u2029]", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if has_break else None)


_Dumper.add_representer(str, _write_text)


def read_yaml(text: str, where: str) -> Any:
    """The value of one YAML document; None if it holds nothing.

    Args:
        text: the document.
        where: what it is, as an error names it, such as "configuration file 'a.yaml'".

    Raises:
        ConfigError: not YAML, a key twice in a mapping, a key that is no text, or a tag for another type.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where} must be YAML{_place(error)}: {_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{where} must be YAML text, but character {error.position} is U+{error.character:04X}"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{where} must be nested at most {DEEPEST} deep") from error
    except ValueError as error:
        raise ConfigError(f"{where} must not hold a number of thousands of digits") from error


def write_yaml(tree: Any) -> str:
    """A YAML document, keys in the order given; `read_yaml` and YAML 1.1 readers read it back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30)


def _place(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(f"{error.problem or error.context}".split())
    if "\\t" in problem:
        problem += "; indent with spaces, not tabs"
    return problem


def _check(root: yaml.Node, where: str) -> None:
    """Walks the document as its aliases expand it, so that a small file cannot stand for a huge tree."""
    waiting = [(root, 0)]
    for _ in range(MOST_NODES):
        if not waiting:
            return
        node, depth = waiting.pop()
        if depth > DEEPEST:
            raise ConfigError(f"{where} must be nested at most {DEEPEST} deep")
        if node.tag not in PLAIN_TAGS:
            raise ConfigError(
                f"{where} must hold plain values only, got the tag {node.tag!r} in line "
                f"{node.start_mark.line + 1}"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            _check_names(node, where)
            waiting += [(item, depth + 1) for pair in node.value for item in pair]
    raise ConfigError(f"{where} must hold at most {MOST_NODES} values")


def _check_names(node: yaml.MappingNode, where: str) -> None:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        line = name.start_mark.line + 1
        if name.tag == _MERGE:
            continue
        if not name.tag.endswith(":str"):
            got = name.value if isinstance(name, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(f"{where} must have texts as keys, got {got!r} in line {line}")
        if name.value in lines:
            raise ConfigError(
                f"{where} must name a key once, got {name.value!r} in line {lines[name.value]} and again in "
                f"line {line}"
            )
        lines[name.value] = line
