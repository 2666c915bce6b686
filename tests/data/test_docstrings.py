"""Docstrings and code of the standard library, as source."""

import sys
import sysconfig
import warnings
from pathlib import Path

import pytest

from fedsim.cache import CacheError, cache_root
from fedsim.data.docstrings import read_base_code, read_docstrings, split_docstrings
from fedsim.errors import DataError


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "stdlib"
    folder.mkdir()
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr("fedsim.data.docstrings.LEAST_DOCSTRINGS", 1)
    return folder


def write(folder: Path, path: str, text: str) -> None:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_thousands_of_unique_texts() -> None:
    docstrings = read_docstrings()
    texts = [docstring.text for docstring in docstrings]
    assert len(texts) > 3000
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and text for text in texts)
    assert {docstring.module for docstring in docstrings} <= sys.stdlib_module_names
    assert read_docstrings() == docstrings


def test_parts_share_no_module_and_have_about_the_same_size() -> None:
    base, federated = split_docstrings()
    assert not {d.module for d in base} & {d.module for d in federated}
    assert sorted(d.text for d in base + federated) == sorted(d.text for d in read_docstrings())
    sizes = [sum(len(d.text) for d in part) for part in (base, federated)]
    assert max(sizes) < 1.01 * min(sizes)


def test_base_code_is_unique_and_holds_no_federated_docstring() -> None:
    blocks = read_base_code()
    assert len(set(blocks)) == len(blocks)
    assert sum(map(len, blocks)) > 1_000_000
    code = "\n".join(blocks)
    long_docstrings = [d.text for d in split_docstrings()[1] if len(d.text) > 200]
    assert not [text for text in long_docstrings if text in code]


def test_what_counts_as_a_docstring(fake_library: Path) -> None:
    write(
        fake_library,
        "json/__init__.py",
        '"""Module.\n\n    Indented.\n    """\n\nx = 1  # a comment\n\n\nclass C:\n    """Class."""\n\n'
        '    async def f(self):\n        """  Method. """\n        return "not a docstring"\n',
    )
    write(fake_library, "json/tests/test_json.py", '"""A test."""')
    write(fake_library, "site-packages/other.py", '"""Not the standard library."""')
    write(fake_library, "no_such_module.py", '"""Nor this."""')
    write(fake_library, "string.py", '"""Module.\n\nIndented."""')  # the same text again
    assert [(d.module, d.text) for d in read_docstrings()] == [
        ("json", "Module.\n\nIndented."),
        ("json", "Class."),
        ("json", "Method."),
    ]


def test_code_leaves_docstrings_out(fake_library: Path) -> None:
    write(
        fake_library,
        "abc.py",
        '"""' + "The largest module is dealt out first, to the federation. " * 3 + '"""\n',
    )
    write(
        fake_library, "json.py", '"""Text."""\n\nx = 1  # why\n\n\ndef f():\n    """More."""\n    return x\n'
    )
    assert sorted(read_base_code()) == ["    return x", "def f():", "x = 1  # why"]


def test_warnings_of_other_peoples_sources_are_silent(fake_library: Path) -> None:
    write(fake_library, "json.py", '"""Text \\d."""\nx = "\\d"\nassert (x, 1)\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_docstrings()) == 1


def test_a_changed_source_is_read_again(fake_library: Path) -> None:
    write(fake_library, "json.py", '"""One."""')
    assert [d.text for d in read_docstrings()] == ["One."]
    write(fake_library, "json.py", '"""Another."""')
    assert [d.text for d in read_docstrings()] == ["Another."]


def test_missing_sources_say_what_to_do(fake_library: Path) -> None:
    with pytest.raises(DataError, match=r"data.source=embedded needs the source files .* set data.source"):
        read_docstrings()


def test_too_few_docstrings(fake_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.data.docstrings.LEAST_DOCSTRINGS", 1000)
    write(fake_library, "json.py", '"""One."""')
    with pytest.raises(DataError, match=r"at least 1000 docstrings, and the sources in .* hold 1"):
        read_docstrings()


@pytest.mark.parametrize("text", ["def f(:\n", "x = '\x00'\n"])
def test_a_source_that_does_not_parse(fake_library: Path, text: str) -> None:
    write(fake_library, "json.py", text)
    with pytest.raises(DataError, match=r"json.py cannot be parsed .*; set data.source"):
        read_docstrings()


def test_a_damaged_cache_entry(fake_library: Path) -> None:
    write(fake_library, "json.py", '"""One."""')
    read_docstrings()
    (file,) = cache_root().glob("standard-library/*/docstrings.json")
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(CacheError, match=r"docstrings.json changed or missing"):
        read_docstrings()
