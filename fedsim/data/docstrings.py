"""The embedded corpus: English docstrings, and code, of the running Python's standard library.

The sources are parsed, never imported, so no code of theirs runs and `-OO` does no harm. What there is depends on the
Python version; the same interpreter always gives the same lists.

Top-level modules are divided between two parts. The federation holds the docstrings of one part; the embedded base
model learns from the code and comments of the other, so the federation has something to teach it: measured on Python
3.11, LoRA gains 0.25 nats a token there, and 0.01 over a base that has seen docstrings already.
"""

import ast
import hashlib
import itertools
import json
import re
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.cache import cached_folder, content_hash
from fedsim.errors import DataError

FORMAT = 2
"""Raised whenever the same sources would give other lists."""

LEAST_DOCSTRINGS = 1000
"""Python 3.11 to 3.14 have about 7,000; far fewer means a stripped installation."""

BASE_SHARE = 0.5
"""Share of the docstrings' characters whose modules belong to the base part."""

CODE_CHARACTERS = 2_000_000
"""Code kept for the embedded base: more than its training reads, a fraction of what there is."""

TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})

REMEDY = "set data.source and model.name_or_path to a data set and a model of your own"


@dataclass(frozen=True, slots=True)
class Docstring:
    """One docstring.

    Attributes:
        module: top-level module it stands in, such as `asyncio`.
        text: without indentation and surrounding white space, never empty.
    """

    module: str
    text: str


def read_docstrings() -> list[Docstring]:
    """The docstrings of the standard library, each text once, ordered by source file.

    Tests, and modules that are not part of the standard library, are left out. A text that stands in several
    places belongs to the first. The parsed lists are kept in the cache, because every process of a run asks for them.

    Raises:
        DataError: the sources are missing (frozen or zipped builds), not readable or far too few.
        CacheError: the cache folder cannot be written or is damaged.
    """
    return [Docstring(module, text) for module, text in _read("docstrings.json")]


def split_docstrings() -> tuple[list[Docstring], list[Docstring]]:
    """The docstrings of the embedded base's part, and those of the federation's part.

    Each top-level module lies in one part. Modules are dealt out from the largest to the smallest, each to the part
    that is further below its share of the characters (`BASE_SHARE`), so both parts have about the same mix of large
    and small modules in every Python version.

    Returns:
        (base part, federated part), each in the order of `read_docstrings`.

    Raises:
        DataError, CacheError: as `read_docstrings`.
    """
    docstrings = read_docstrings()
    base_modules = _choose_base_modules(docstrings)
    base = [docstring for docstring in docstrings if docstring.module in base_modules]
    federated = [docstring for docstring in docstrings if docstring.module not in base_modules]
    return base, federated


def read_base_code() -> list[str]:
    """Code and comments of the base part's modules, without their docstrings, cut into blocks at blank lines.

    Each block once, in an order that mixes modules (by hash), up to `CODE_CHARACTERS` characters in all.

    Raises:
        DataError, CacheError: as `read_docstrings`.
    """
    return list(_read("code.json"))


def _read(file: str) -> Any:
    folder = Path(sysconfig.get_path("stdlib"))
    sources = _find_sources(folder)
    state = []
    for source in sources:
        status = source.stat()
        state.append([source.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns])
    content = {"format": FORMAT, "python": sys.version, "folder": str(folder), "sources": content_hash(state)}
    entry = cached_folder("standard-library", content, lambda target: _parse_all(folder, sources, target))
    return json.loads((entry / file).read_text(encoding="utf-8"))


def _choose_base_modules(docstrings: list[Docstring]) -> set[str]:
    sizes: Counter[str] = Counter()
    for docstring in docstrings:
        sizes[docstring.module] += len(docstring.text)
    chosen: set[str] = set()
    base_size = federated_size = 0
    for module, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if base_size * (1 - BASE_SHARE) < federated_size * BASE_SHARE:
            chosen.add(module)
            base_size += size
        else:
            federated_size += size
    return chosen


def _find_sources(folder: Path) -> list[Path]:
    sources = []
    for top in folder.iterdir() if folder.is_dir() else ():  # not into site-packages, which may hold far more
        if top.name.removesuffix(".py") in sys.stdlib_module_names and top.name not in TEST_FOLDERS:
            found = top.rglob("*.py") if top.is_dir() else [top] if top.suffix == ".py" else []
            sources += [
                path for path in found if not TEST_FOLDERS.intersection(path.relative_to(folder).parts)
            ]
    if not sources:
        raise DataError(
            "data.source=embedded needs the source files of Python's standard library, and there are none in "
            f"{folder}; {REMEDY}"
        )
    return sorted(sources)


def _module(folder: Path, source: Path) -> str:
    return source.relative_to(folder).parts[0].removesuffix(".py")


def _parse_all(folder: Path, sources: list[Path], target: Path) -> None:
    """Write docstrings.json and code.json into `target`."""
    found: dict[str, str] = {}
    code: list[tuple[str, str]] = []
    for source in sources:
        module = _module(folder, source)
        texts, blocks = _parse(source)
        for text in texts:
            found.setdefault(text, module)
        code += ((module, block) for block in blocks)
    if len(found) < LEAST_DOCSTRINGS:
        raise DataError(
            f"data.source=embedded needs at least {LEAST_DOCSTRINGS} docstrings, and the sources in {folder} hold "
            f"{len(found)}; {REMEDY}"
        )
    docstrings = [Docstring(module, text) for text, module in found.items()]
    base_modules = _choose_base_modules(docstrings)
    blocks = _mix(block for module, block in code if module in base_modules)
    rows = [[docstring.module, docstring.text] for docstring in docstrings]
    (target / "docstrings.json").write_text(json.dumps(rows), encoding="utf-8")
    (target / "code.json").write_text(json.dumps(blocks), encoding="utf-8")


def _mix(blocks: Iterable[str]) -> list[str]:
    mixed = sorted(set(blocks), key=lambda block: hashlib.blake2b(block.encode(), digest_size=8).digest())
    sizes = itertools.accumulate(map(len, mixed))
    return [block for block, size in zip(mixed, sizes, strict=True) if size <= CODE_CHARACTERS]


def _parse(source: Path) -> tuple[list[str], list[str]]:
    """Docstrings of a file, and its other lines in blocks."""
    try:
        with tokenize.open(source) as file:
            text = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"data.source=embedded reads Python's standard library, and {source} cannot be parsed ({error}); {REMEDY}"
        ) from error
    lines = text.split("\n")
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = (ast.get_docstring(node) or "").strip()
            if docstring:
                docstrings.append(docstring)
                first = node.body[0]
                for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                    lines[number] = ""
    blocks = [
        block for part in re.split(r"\n\s*\n", "\n".join(lines)) if (block := part.strip("\n").rstrip())
    ]
    return docstrings, blocks
