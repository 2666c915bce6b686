"""--help forgets no key, and says of each what it is."""

import pytest

from fedsim.config.help import help_text
from fedsim.config.keys import all_keys, flatten, sections
from fedsim.config.loader import parse_command_line, to_tree
from fedsim.config.schema import Config
from fedsim.config.strategy_section import STRATEGY_NAMES


def test_the_tree_and_its_description_list_the_same_keys() -> None:
    assert {name: key.default for name, key in all_keys().items()} == flatten(to_tree(Config()))


@pytest.mark.parametrize("name", all_keys())
def test_a_key_has_type_default_and_meaning(name: str) -> None:
    key = all_keys()[name]
    text = " ".join(help_text(110).split())
    entry = text[text.index(f" {name} (") :]

    assert key.meaning
    assert not key.meaning.endswith(".")
    assert entry.startswith(f" {name} ({key.rule.removeprefix('a ').removeprefix('an ')}; default ")
    assert f"{f'; unit: {key.unit}' if key.unit else ''}) {key.meaning}" in entry


def test_sections_are_explained_in_order() -> None:
    text = help_text(110)
    places = [
        text.index(f"\n{section.name}: {section.meaning[:20]}") for section in sections() if section.keys
    ]

    assert places == sorted(places)


@pytest.mark.parametrize("width", [40, 80, 110, 300])
def test_help_fits_the_terminal(width: int) -> None:
    too_wide = [line for line in help_text(width).splitlines() if len(line) > min(width, 110)]

    # a word longer than a narrow terminal is not cut
    assert [line for line in too_wide if " " in line.strip()] == []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["lora.rank=3", "--help"], ["no-such.yaml", "-h"]])
def test_help_is_printed_whatever_else_is_asked(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(arguments)

    assert exit_.value.code == 0
    assert capsys.readouterr().out == help_text(100)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("run.rounds", "an integer > 0"),
        ("run.threads_per_process", "an integer in [1, 1024]"),
        ("data.test_fraction", "a number in (0, 1)"),
        ("cohort.fraction", "a number in (0, 1] or null"),
        ("cohort.client_ids", "a non-empty list of integers >= 0 or null"),
        ("lora.target_modules", "a non-empty list of non-empty texts"),
        ("lora.use_rslora", "true or false"),
        ("strategy.name", f"one of {'|'.join(STRATEGY_NAMES)}, or package.module:Class"),
        ("lora.tiers", "a list of sections with share, rank, module_ranks"),
        ("data.subset", "a non-empty text or null"),
    ],
)
def test_rules_are_in_plain_words(name: str, rule: str) -> None:
    assert all_keys()[name].rule == rule
