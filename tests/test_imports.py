"""Who may import whom. The table is the architecture; a change to it is a commit of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEAVES = {"errors", "seeding", "cache", "atomic", "environ", "locks", "own", "stopping"}
"""Modules that every room may import. They import nothing of fedsim but each other, and errors nothing at all."""

ROOMS: dict[str, set[str]] = {
    "config": set(),
    "lora": set(),
    "aggregation": {"lora"},
    "data": {"config"},
    "models": {"config", "lora", "data"},
    "training": {"models", "data", "lora"},
    "evaluation": {"models", "data", "lora"},
    "comm": {"lora"},
    "tracking": {"config"},
    "report": {"config"},
    "server": {"config", "lora", "aggregation", "data", "models", "training", "evaluation", "comm"},
    "estimate": {
        "config",
        "lora",
        "aggregation",
        "data",
        "models",
        "training",
        "evaluation",
        "comm",
        "server",
    },
}
ROOMS["simulation"] = set(ROOMS)
"""Room -> the other rooms it may import."""

MODULES: dict[str, set[str]] = {
    "fedsim": set(),
    "errors": set(),
    "seeding": set(),
    "cache": {"errors", "atomic", "locks"},
    "atomic": {"errors"},
    "environ": {"errors"},
    "locks": set(),
    "own": {"errors"},
    "stopping": set(),
    "main": {*ROOMS, *LEAVES},
}
"""File beside the rooms -> what it may import."""

LAUNCH = {"config", "errors", "locks", "stopping"}
ONLY_IN = {"torch.distributed": ("comm", "launch"), "wandb": ("tracking",)}


def imported_names(source: str, package: str) -> Iterator[str]:
    """Dotted names a file imports, wherever in it: inside functions and behind TYPE_CHECKING too.

    `from a import b` counts as `a.b`, since b may be a module. `package` is the dotted package of the file.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from _by_call(node)


def _by_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if name in ("importlib.import_module", "import_module", "__import__") and node.args:
        first = node.args[0]
        yield str(first.value) if isinstance(first, ast.Constant) else f"<computed: {ast.unparse(first)}>"


def rooms_imported(names: Iterator[str]) -> set[str]:
    """Rooms and modules of fedsim among dotted names; `launch` for the launcher, `fedsim` for a bare import."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "launch":
            found.add("launch")
        elif parts[0] == "fedsim":
            known = len(parts) > 1 and not parts[1].startswith("__")
            found.add(parts[1] if known else "fedsim")
    return found


def allowed_for(place: str) -> set[str]:
    """What a room or module may import; the bare package holds no more than a version."""
    if place in ROOMS:
        return {place, "fedsim", *LEAVES, *ROOMS[place]}
    return {place, "fedsim", *MODULES[place]}


def place_of(path: Path) -> str:
    """Room or module that a file of the package belongs to."""
    parts = path.relative_to(ROOT / "fedsim").parts
    if len(parts) > 1:
        return parts[0]
    return "fedsim" if path.stem == "__init__" else path.stem


def problems(place: str, source: str, package: str) -> list[str]:
    """Edges of one file that the tables do not list."""
    names = list(imported_names(source, package))
    if place == "launch":
        allowed = {"launch", "fedsim", *LAUNCH}
    elif place in ROOMS or place in MODULES:
        allowed = allowed_for(place)
    else:
        return [f"{place} is in no table of tests/test_imports.py"]
    found = [f"{place} must not import {other}" for other in sorted(rooms_imported(iter(names)) - allowed)]
    for library, rooms in ONLY_IN.items():
        if place not in rooms and any(f"{name}.".startswith(f"{library}.") for name in names):
            found.append(f"{place} must not import {library}; only {' and '.join(rooms)} may")
    return found + [f"{place} must not import by a {name}" for name in names if name.startswith("<")]


def package_files() -> list[Path]:
    return sorted(path for room in ("fedsim", "launch") for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", package_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_the_table_lists(path: Path) -> None:
    place = "launch" if path.is_relative_to(ROOT / "launch") else place_of(path)
    package = ".".join(path.relative_to(ROOT).parent.parts)

    assert problems(place, path.read_text(encoding="utf-8"), package) == []


def test_the_table_has_no_circle() -> None:
    done: set[str] = set()
    while ready := {room for room in ROOMS if room not in done and ROOMS[room] <= done}:
        done |= ready

    assert done == set(ROOMS)


def test_the_table_names_only_rooms_that_exist() -> None:
    folders = {path.parent.name for path in (ROOT / "fedsim").glob("*/*.py")}

    assert set(ROOMS) == folders


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("aggregation", "from fedsim.comm.group import Group"),
        ("aggregation", "from fedsim import comm"),
        ("aggregation", "import fedsim.comm as c"),
        ("aggregation", "import fedsim.comm.group"),
        ("aggregation", "from ..comm import group"),
        ("aggregation", "from .. import comm"),
        ("aggregation", "def f():\n    from fedsim.comm import group"),
        (
            "aggregation",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fedsim.comm import group",
        ),
        ("aggregation", "try:\n    import fedsim.comm\nfinally:\n    pass"),
        ("aggregation", "import importlib\nimportlib.import_module('fedsim.comm.group')"),
        ("aggregation", "import importlib\nimportlib.import_module(name)"),
        ("aggregation", "from fedsim.config.schema import Config"),
        ("aggregation", "from fedsim.simulation import rounds"),
        ("lora", "import fedsim.main"),
        ("config", "from fedsim.data import build"),
        ("tracking", "from fedsim.server.round import Run"),
        ("main", "import launch"),
        ("server", "from launch.profile import Profile"),
        ("server", "from fedsim.tracking import metrics"),
        ("launch", "from fedsim.server import round"),
        ("launch", "from fedsim.cache import cached_folder"),
        ("errors", "from fedsim.cache import CacheError"),
        ("fedsim", "from fedsim.config.loader import load_config"),
        ("training", "import torch.distributed as dist"),
        ("training", "from torch import distributed"),
        ("training", "from torch.distributed.nn import functional"),
        ("main", "def f():\n    import torch.distributed"),
        ("main", "import wandb"),
        ("server", "from wandb import sdk"),
        ("plotting", "import json"),
        ("report", "from fedsim.tracking.metrics import MetricsLog"),
        ("report", "def f():\n    from fedsim.server import summary"),
        ("server", "from fedsim.estimate import build"),
        ("estimate", "from fedsim.tracking import run_folder"),
    ],
)
def test_a_forbidden_edge_is_found(place: str, source: str) -> None:
    package = "launch" if place == "launch" else f"fedsim.{place}"

    assert problems(place, source, package) != []


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("comm", "import torch.distributed as dist"),
        ("tracking", "import wandb"),
        ("aggregation", "from fedsim.lora.factors import LoraFactors\nfrom .strategy import Strategy"),
        ("server", "from fedsim.comm import group\nfrom fedsim.errors import PeerError"),
        ("launch", "from fedsim.config.loader import load_config\nfrom fedsim.errors import ConfigError"),
        ("main", "from fedsim import __version__\nfrom fedsim.simulation import entry"),
        ("training", "import wandb_like, torch"),
    ],
)
def test_a_permitted_edge_is_not_reported(place: str, source: str) -> None:
    package = "launch" if place == "launch" else f"fedsim.{place}"

    assert problems(place, source, package) == []
