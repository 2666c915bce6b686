"""Damage to the files of a run folder, as disks, people and attackers do it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.server import checkpoint


def rewrite_state(folder: Path, **changes: Any) -> None:
    """Change values in the `state.json` of a checkpoint and give it the checksum that fits."""
    path = folder / checkpoint.STATE_FILE
    description = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    description.pop("sha256", None)
    description["sha256"] = checkpoint._digest(description)
    path.write_text(json.dumps(description), encoding="utf-8")


def cut(file: Path, draw: np.random.Generator) -> str:
    """Keep a part from the beginning."""
    data = file.read_bytes()
    length = int(draw.integers(0, max(1, len(data))))
    file.write_bytes(data[:length])
    return f"cut to {length} of {len(data)} bytes"


def flip(file: Path, draw: np.random.Generator) -> str:
    """Turn one bit around."""
    data = bytearray(file.read_bytes())
    if not data:
        return "an empty file has no bits"
    bit = int(draw.integers(0, 8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(bytes(data))
    return f"bit {bit} turned around"


def blank(file: Path, draw: np.random.Generator) -> str:
    """Put zeros in place of a stretch, as a disk does that has lost a block."""
    data = bytearray(file.read_bytes())
    if not data:
        return "an empty file has no bytes"
    start = int(draw.integers(0, len(data)))
    end = min(len(data), start + int(draw.integers(1, 65)))
    data[start:end] = bytes(end - start)
    file.write_bytes(bytes(data))
    return f"zeros from {start} to {end}"


def empty(file: Path, draw: np.random.Generator) -> str:
    """Leave nothing in it."""
    file.write_bytes(b"")
    return "emptied"


def remove(file: Path, draw: np.random.Generator) -> str:
    """Delete it."""
    file.unlink()
    return "deleted"


def noise(file: Path, draw: np.random.Generator) -> str:
    """Put random bytes in its place."""
    file.write_bytes(draw.bytes(200))
    return "random bytes"


def other_type(file: Path, draw: np.random.Generator) -> str:
    """Put valid JSON, which is YAML as well, of another kind in its place."""
    text = ["[]", "1", '"text"', "null", "{}", "[" * 5000, '{"round_index": "one"}', "1" * 5000][
        int(draw.integers(8))
    ]
    file.write_text(text)
    return f"holds {text[:30]}"


def folder_in_its_place(file: Path, draw: np.random.Generator) -> str:
    """Put a folder where the file was."""
    file.unlink()
    file.mkdir()
    return "a folder is in its place"


DAMAGES: Sequence[Callable[[Path, np.random.Generator], str]] = (
    cut, flip, flip, blank, empty, remove, noise, other_type, folder_in_its_place
)  # fmt: skip


def swap(one: Path, other: Path) -> str:
    """Exchange two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"exchanged with {other.name}"
