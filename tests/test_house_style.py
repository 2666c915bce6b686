"""Rules of the house that a parser can check. ruff and mypy check the others."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAY_CATCH_ALL = {
    "fedsim/comm/agree.py": "carries a rank's error to all ranks, which raise it",
    "fedsim/models/pack_check.py": "a model whose forward pass fails on packed rows is trained unpacked",
    "fedsim/tracking/wandb_run.py": "tracking that fails must not end a run",
}
"""File -> why it may catch every exception without raising one."""

DOORS = {
    "describe_base": "says what build_base would load",
    "locate_base": "finds what build_base will load, on one process first",
}
"""Function that reads a configuration though it is not called build_* -> why."""

BROAD = {"Exception", "BaseException"}
SEED_MAKERS = {"Generator", "PCG64", "SeedSequence", "RandomState"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(nodes: Iterator[ast.AST]) -> list[int]:
    return [getattr(node, "lineno", 0) for node in nodes]


def caught(handler: ast.ExceptHandler) -> set[str]:
    """Names of the exceptions that a handler catches; a bare `except` catches BaseException."""
    if handler.type is None:
        return {"BaseException"}
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return {ast.unparse(kind).rpartition(".")[2] for kind in kinds}


def swallowing_handlers(tree: ast.Module) -> Iterator[ast.AST]:
    """Handlers that catch everything and do not end by raising."""
    for node in ast.walk(tree):
        is_broad = isinstance(node, ast.ExceptHandler) and caught(node) & BROAD
        if is_broad and not isinstance(node.body[-1], ast.Raise):
            yield node
        is_suppress = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
        if is_suppress and {ast.unparse(argument) for argument in node.args} & BROAD:
            yield node


def prints(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node


def missing_import_handlers(tree: ast.Module) -> Iterator[ast.AST]:
    """Handlers that go on without what could not be imported; to raise a clearer error is fine."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler) or isinstance(node.body[-1], ast.Raise):
            continue
        if caught(node) & {"ImportError", "ModuleNotFoundError"}:
            yield node


def unfinished(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("NotImplementedError", "NotImplemented"):
            yield node


def global_generators(tree: ast.Module) -> Iterator[ast.AST]:
    """Uses of a generator that the whole process shares."""
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng(" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
            yield node
        if isinstance(node, ast.ImportFrom) and node.module in ("random", "numpy.random"):
            yield node
        if not isinstance(node, ast.Attribute) or id(node) in forked:
            continue
        name = ast.unparse(node)
        if name in (
            "torch.manual_seed",
            "torch.seed",
            "torch.cuda.manual_seed",
            "torch.cuda.manual_seed_all",
        ):
            yield node
        if name.startswith(("np.random.", "numpy.random.")) and name.split(".")[2] not in SEED_MAKERS:
            yield node


def config_takers(tree: ast.Module) -> Iterator[ast.AST]:
    """Public functions and methods with a configuration as a parameter that are not called build_*."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            takes = [ast.unparse(arg.annotation) for arg in every if arg.annotation is not None]
            is_private = node.name.startswith("_") and not node.name.startswith("__")
            is_door = is_private or node.name.startswith("build_") or node.name in DOORS
            if any(name.endswith("Config") for name in takes) and not is_door:
                yield node


def find(rule: str, source: str) -> list[int]:
    return lines_of(RULES[rule](ast.parse(source)))


RULES = {
    "print": prints,
    "catch all": swallowing_handlers,
    "catch ImportError": missing_import_handlers,
    "unfinished": unfinished,
    "global generator": global_generators,
    "config below the door": config_takers,
}


@pytest.mark.parametrize("path", files("fedsim", "launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    in_package = name.startswith("fedsim/")
    skipped = set()
    if not in_package:
        skipped |= {"print", "config below the door"}
    if name in MAY_CATCH_ALL:
        skipped.add("catch all")
    if name.startswith(("fedsim/config/", "fedsim/simulation/")) or name == "fedsim/main.py":
        skipped.add("config below the door")
    source = path.read_text(encoding="utf-8")

    broken = {rule: find(rule, source) for rule in RULES if rule not in skipped}

    assert {rule: found for rule, found in broken.items() if found} == {}


@pytest.mark.parametrize("path", files("fedsim", "launch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_no_open_end(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert [word for word in ("TO" + "DO", "FIX" + "ME", "XX" + "X") if word in text] == []


def test_the_list_of_exemptions_is_no_longer_than_needed() -> None:
    needed = {
        str(path.relative_to(ROOT)) for path in files("fedsim") if list(swallowing_handlers(parse(path)))
    }

    assert needed == set(MAY_CATCH_ALL)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("print", "print('x')"),
        ("catch all", "try:\n    f()\nexcept Exception:\n    pass"),
        ("catch all", "try:\n    f()\nexcept:\n    pass"),
        ("catch all", "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    log(e)"),
        ("catch all", "import contextlib\nwith contextlib.suppress(Exception):\n    f()"),
        ("catch ImportError", "try:\n    import rich\nexcept ImportError:\n    rich = None"),
        ("unfinished", "def f():\n    raise NotImplementedError"),
        ("global generator", "import random"),
        ("global generator", "np.random.seed(0)"),
        ("global generator", "x = numpy.random.rand(3)"),
        ("global generator", "torch.manual_seed(0)"),
        ("config below the door", "def average(config: AggregationConfig): pass"),
        ("config below the door", "class A:\n    def __init__(self, config: schema.Config): pass"),
    ],
)
def test_a_broken_rule_is_found(rule: str, source: str) -> None:
    assert find(rule, source) != []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("print", "console.print('x')"),
        ("catch all", "try:\n    f()\nexcept BaseException:\n    clean()\n    raise"),
        ("catch all", "try:\n    f()\nexcept ValueError:\n    pass"),
        ("global generator", "torch.Generator().manual_seed(0)\nnp.random.Generator(np.random.PCG64(1))"),
        ("global generator", "with torch.random.fork_rng():\n    torch.manual_seed(1)"),
        ("config below the door", "def build_x(config: DataConfig): pass\ndef _y(config: Config): pass"),
    ],
)
def test_a_kept_rule_is_not_reported(rule: str, source: str) -> None:
    assert find(rule, source) == []
