"""Generated bad configurations: refused in one line that names the key, with nothing written."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim.config.keys import Key, all_keys, section_names
from fedsim.config.yaml_text import write_yaml
from fedsim.main import main

Snapshot = Callable[[Path], dict[str, bytes | None]]

WRONG_FOR: dict[str, list[Any]] = {
    "an integer": ["many", 1.5, True, [1], {"a": 1}, "1", float("nan"), -(10**30), float("inf")],
    "a number": ["much", True, [1.0], {"a": 1}, "1.0", float("nan"), float("inf"), float("-inf")],
    "true or false": ["off", "yes", 0, 1, 0.0, [True], {"a": True}],
    "one of": ["nope", 1, 1.5, True, [], {"a": 1}, "\u202e", "x" * 10_000],
    "a text": [1, 1.5, True, ["a"], {"a": 1}],
    "a non-empty text": [1, 1.5, True, ["a"], {"a": 1}, ""],
    "a list": [1, "text", True, {"a": 1}, [[["a"]]], [None]],
    "a non-empty list": [1, "text", True, {"a": 1}, [], [[["a"]]], [None]],
    "a section of names": [1, "text", True, [1], {"a": []}],
}
"""Beginning of a key's rule -> values that break it, whatever the bounds."""


def wrong_values(key: Key) -> list[Any]:
    beginning = max((name for name in WRONG_FOR if key.rule.startswith(name)), key=len)
    values = [*WRONG_FOR[beginning]]
    return values if key.rule.endswith("or null") else [*values, None]


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


WRONG_VALUES = st.sampled_from(list(all_keys().values())).flatmap(
    lambda key: st.tuples(st.just(key.name), st.sampled_from(wrong_values(key)))
)


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, Any]:
    """A key or section whose last letters are not in order, doubled or missing."""
    name = draw(st.sampled_from([*all_keys(), *sorted(section_names())]))
    position = (
        draw(st.integers(0, len(name.rpartition(".")[2]) - 1)) + len(name) - len(name.rpartition(".")[2])
    )
    change = draw(st.sampled_from(["double", "drop", "z"]))
    letter = {"double": name[position] * 2, "drop": "", "z": "z"}[change]
    wrong = name[:position] + letter + name[position + 1 :]
    known = {*all_keys(), *section_names()}
    return (f"{name}x" if wrong in known or wrong.endswith(".") else wrong), 1


PLACED_WRONGLY = st.sampled_from(sorted(section_names())).flatmap(
    lambda name: st.tuples(st.just(name), st.sampled_from([1, "text", [1], True]))
) | st.sampled_from([name for name, key in all_keys().items() if "section" not in key.rule]).map(
    lambda name: (f"{name}.deeper", 1)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the program is started in, with the folders of the runs that nothing may touch."""
    folder = tmp_path_factory.mktemp("bad")
    for run in ("quickstart", "bad"):
        (folder / "runs" / run).mkdir(parents=True)
        for name in ("config.yaml", "run.json", "metrics.jsonl"):
            (folder / "runs" / run / name).write_text(f"what {name} held\n")
    with contextlib.chdir(folder):
        yield folder


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WRONG_VALUES | misspelt() | PLACED_WRONGLY, st.booleans(), st.booleans())
def test_a_bad_configuration(
    place: Path,
    snapshot: Snapshot,
    capsys: pytest.CaptureFixture[str],
    wrong: tuple[str, Any],
    in_a_file: bool,
    dry_run: bool,
) -> None:
    name, value = wrong
    (place / "bad.yaml").write_text(write_yaml(nested(name, value)), encoding="utf-8")
    text = "null" if value is None else write_yaml(value).removesuffix("...\n").strip()
    arguments = ["bad.yaml"] if in_a_file else [f"{name}={text}"]
    before = snapshot(place)
    capsys.readouterr()

    code = main([*arguments, *(["--dry-run"] if dry_run else [])])

    errors = capsys.readouterr().err
    assert code == 2, (wrong, errors)
    assert "Traceback" not in errors
    (line,) = errors.splitlines()
    assert line.startswith("fedsim: ConfigError: "), line
    assert len(line) < 1000, "a message that nobody reads"
    assert name.partition(".")[0] in line, line
    assert snapshot(place) == before


def bomb(levels: int, width: int) -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "\n".join(lines)


HOSTILE: dict[str, tuple[str, str]] = {
    "aliases of aliases": (bomb(9, 10), "must hold at most 10000 values"),
    "merges of merges": (
        "a: &a {x: 1}\n" + "\n".join(f"b{i}: &b{i} {{<<: [*{'a' if i == 0 else f'b{i - 1}'}, *a]}}" for i in range(30)),
        "ConfigError",
    ),
    "an alias of itself": ("run: &run\n  name: *run\n", "nested at most 20 deep"),
    "brackets in brackets": ("run: " + "[" * 5000, "ConfigError"),
    "sections in sections": ("a:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 400)), "nested at most 20 deep"),
    "a number of a hundred thousand digits": (f"run: {{seed: {'9' * 100_000}}}", "thousands of digits"),
    "a number in base sixty": ("run: {seed: " + ":".join(["59"] * 2000) + "}", "run.seed must be an integer"),
    "python": ("run: !!python/object/apply:os.system ['touch owned']", "plain values only"),
    "a python name": ("run: {name: !!python/name:os.system ''}", "plain values only"),
    "a file of a megabyte": ("#" * (1 << 20), "must be at most"),
    "a name that leaves the folder": ("run: {name: ../../owned}", "run.name must be a text of"),
    "a name that is hidden": ("run: {name: .ssh}", "run.name must be a text of"),
    "a name with a null": ('run: {name: "a\\0b"}', "run.name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["bad.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


HUGE = [2**31, 2**63 - 1, 2**63, 10**40]


@pytest.mark.parametrize(
    "name", [name for name, key in all_keys().items() if key.rule.startswith("an integer")]
)
def test_a_huge_integer(
    name: str, program: Any, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused, or harmless; never a traceback, and never a computer's worth of memory."""
    for value in HUGE:
        before = snapshot(program.folder)
        code = program.run(f"{name}={value}", "--dry-run")
        errors = capsys.readouterr().err
        assert code in (0, 2), (value, errors)
        assert "Traceback" not in errors
        assert len(errors.splitlines()) == (1 if code else 0), errors
        assert snapshot(program.folder) == before
