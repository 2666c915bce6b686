"""What README.md and docs/ say exists: commands, keys, values, files, random streams and the import table."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fedsim.config.keys import all_keys, section_names
from fedsim.config.loader import parse_command_line
from fedsim.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "slurm" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ASSIGNMENT = re.compile(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)=")
TEMPLATES = {f"slurm/{path.name}" for path in (ROOT / "slurm").glob("*.sbatch")} - {"slurm/array.sbatch"}
STREAM_MAKERS = {"derive_seed", "numpy_generator", "torch_generator", "token_keys"}


def fences(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))


def shell_lines(page: Path) -> list[list[str]]:
    """The commands in fenced blocks of shell, as words, without comments."""
    code = [text for language, text in fences(page) if language in ("bash", "sh")]
    return [
        words for text in code for line in text.splitlines() if (words := shlex.split(line, comments=True))
    ]


def marked_command(name: str) -> str:
    text = README.read_text(encoding="utf-8")
    marker = f"<!-- command: {name} -->"
    assert text.count(marker) == 1, f"{marker} must stand in README.md once"
    found = re.search(rf"^{re.escape(marker)}\n```bash\n([^\n]+)\n```$", text, re.MULTILINE)
    assert found, f"a fenced block with one line must follow {marker}"
    return found[1]


def test_the_two_commands_are_one_line_each() -> None:
    assert marked_command("run").endswith(".venv/bin/torchrun --nproc_per_node 4 -m fedsim.main")
    assert marked_command("test").endswith(".venv/bin/python -m pytest -n auto")


def test_both_commands_pin_the_same_torch() -> None:
    pins = [re.findall(r"torch==([0-9.]+)", marked_command(name)) for name in ("run", "test")]

    assert len(pins[0]) == 1
    assert pins[0] == pins[1]


def is_for_the_run(word: str) -> bool:
    """Whether a word of a launcher's command line is fedsim.main's: a file or KEY=VALUE, but no list of values."""
    return word.endswith(".yaml") or (ASSIGNMENT.match(word) is not None and "," not in word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_a_configuration_that_is_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in shell_lines(page):
        starts = {"fedsim.main", *TEMPLATES} & set(words)
        if starts and "--help" not in words:
            parse_command_line(words[words.index(starts.pop()) + 1 :])
        if words[1:4] == ["-m", "launch", "local"]:
            parse_command_line(words[4:])
        if words[1:4] in (["-m", "launch", "submit"], ["-m", "launch", "sweep"]):
            parse_command_line([word for word in words[4:] if is_for_the_run(word)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path) -> None:
    known = {*all_keys(), *section_names()}
    roots = {name.partition(".")[0] for name in known}
    text = page.read_text(encoding="utf-8")
    named = {name for name in ASSIGNMENT.findall(text) if name.partition(".")[0] in roots}
    for code in inline_code(page):
        is_key = re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", code) and code.partition(".")[0] in roots
        if is_key and not code.endswith((".json", ".jsonl", ".yaml", ".lock", ".parquet", ".py")):
            named.add(code)

    assert sorted(named - known) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_values_given_to_keys_are_accepted(page: Path) -> None:
    for code in inline_code(page):
        if ASSIGNMENT.match(code) and " " not in code:
            tree = Config().model_dump()
            name, _, text = code.partition("=")
            is_own = name in ("strategy.name", "data.partition.name") and ":" in text
            assert all_keys()[name].choices == () or text in all_keys()[name].choices or is_own, code
            node = tree
            *parents, leaf = name.split(".")
            for parent in parents:
                node = node[parent]
            node[leaf] = yaml.safe_load(text)
            Config.model_validate(tree)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_or_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    names = [
        code for code in inline_code(page) if re.fullmatch(r"(fedsim|tests|docs|slurm|launch)/[\w./-]*", code)
    ]

    assert missing == []
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_run_folder_is_described_whole() -> None:
    text = README.read_text(encoding="utf-8")

    for name in (
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "clients.parquet",
        "partition.json",
        "tiers.json",
        "adapter/",
        "wandb/",
    ):
        assert f"`{name}`" in text


def test_the_import_table_is_that_of_the_test() -> None:
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    (rooms,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROOMS" and node.value is not None
    )
    section = (
        ARCHITECTURE.read_text(encoding="utf-8").partition("## Who imports whom")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)

    assert {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in rows} == rooms


def purposes(source: str) -> set[str]:
    """Purposes of the random streams that a file makes; a purpose that goes on with a path ends before the slash."""
    tree = ast.parse(source)
    constants = {
        ast.unparse(node.targets[0]): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and len(node.targets) == 1
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in STREAM_MAKERS and len(node.args) > 1:
            purpose = node.args[1]
            if isinstance(purpose, ast.JoinedStr):
                purpose = purpose.values[0]
            value = (
                purpose.value if isinstance(purpose, ast.Constant) else constants.get(ast.unparse(purpose))
            )
            if isinstance(value, str):
                found.add(value.rstrip("/"))
    return found


def test_every_random_stream_is_listed() -> None:
    made = {
        purpose
        for path in sorted((ROOT / "fedsim").rglob("*.py"))
        for purpose in purposes(path.read_text(encoding="utf-8"))
    }
    section = ARCHITECTURE.read_text(encoding="utf-8").partition("## Randomness")[2].partition("\n## ")[0]
    listed = {
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }

    assert "cohort" in made
    assert made - listed == set()
