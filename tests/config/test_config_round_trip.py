"""A configuration that was written is read back equal."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedsim.config.checks import cross_checks
from fedsim.config.keys import Key, all_keys
from fedsim.config.loader import load_config, to_tree, to_yaml
from fedsim.config.schema import Config
from fedsim.config.yaml_text import read_yaml, write_yaml
from fedsim.errors import ConfigError

# fmt: off
TRICKY = [
    "off", "no", "1e5", "1e-08", "010", "0x1f", "1:30", "1_0", "~", "null", "<<", "=", "-", "a: b", "#",
    "a #b", "*a", "&a", "!!int 3", "%TAG", "@x", "`x", "?", "'", "\"", "2020-01-01", ".5", "+.inf",
    "{a}", "[a]", "|", ">", "${run.name}", "\\${x}", "\\\\${x}", "a${", "$"
]
# fmt: on
BREAKS = ["\xa0", "\u2028", "\x85", "a\nb", "a\r\nb", "\ta", " a ", "\ufeff"]
TEXTS = st.sampled_from(TRICKY + BREAKS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)


def values_for(key: Key) -> st.SearchStrategy[Any]:
    """Values of the right type; some break a bound."""
    rule = key.rule.removesuffix(" or null")
    if key.choices:
        values: st.SearchStrategy[Any] = st.sampled_from(key.choices)
    elif rule == "true or false":
        values = st.booleans()
    elif rule.startswith("an integer"):
        values = st.integers(0, 2**62) | st.integers(0, 1000)
    elif rule.startswith("a number"):
        values = st.floats(0, 1) | st.floats(0, allow_infinity=False)
    elif "list of sections" in rule:
        tier = st.fixed_dictionaries(
            {"rank": st.integers(1, 99), "share": st.floats(0.1, 9)},
            optional={"module_ranks": st.dictionaries(st.sampled_from(["fc1", "a.b"]), st.integers(1, 9))},
        )
        values = st.lists(tier, max_size=3)
    elif "list of" in rule:
        values = st.lists(st.integers(0, 25) if "integers" in rule else TEXTS, max_size=4)
    else:
        values = TEXTS
    return values | st.none() if key.rule.endswith("or null") else values


CHANGES = st.sampled_from(list(all_keys().values())).flatmap(
    lambda key: st.tuples(st.just(key), values_for(key))
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def config_with(key: Key, value: Any) -> Config:
    """The defaults with one value changed, validated by pydantic alone."""
    tree = to_tree(Config())
    *path, last = key.name.split(".")
    node = tree
    for part in path:
        node = node[part]
    node[last] = value
    return Config.model_validate(with_tuples(tree))


def with_tuples(tree: Any) -> Any:
    """Pydantic's strict mode wants tuples."""
    if isinstance(tree, dict):
        return {name: with_tuples(value) for name, value in tree.items()}
    return tuple(map(with_tuples, tree)) if isinstance(tree, list) else tree


@settings(deadline=None)
@given(CHANGES)
def test_any_valid_change_survives_the_file(folder: Path, change: tuple[Key, Any]) -> None:
    key, value = change
    assume(value != "???")  # OmegaConf's sign for a value that is still to be set
    try:
        config = config_with(key, value)
        cross_checks(config)
    except (ValidationError, ConfigError):
        assume(False)
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8", newline="")

    assert load_config(path) == config


def test_a_no_break_space_is_a_text() -> None:
    assert load_config(None, ["run.output_dir=\xa0\n"]).run.output_dir == "\xa0"


@settings(deadline=None)
@given(CHANGES)
def test_an_override_means_what_the_file_means(change: tuple[Key, Any]) -> None:
    key, value = change
    text = write_yaml(value).removesuffix("...\n")
    assume("${" not in text and value != "???")
    try:
        config = config_with(key, value)
        cross_checks(config)
    except (ValidationError, ConfigError):
        assume(False)

    # a cohort or length of training that is named displaces the default one
    assert load_config(None, [f"{key.name}={text}"]) == config


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_tree_survives_yaml(tree: Any) -> None:
    assert read_yaml(write_yaml(tree), "text") == tree
