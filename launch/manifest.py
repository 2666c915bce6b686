"""The manifest of a sweep: one line for each run, and how its lines are dealt out to job arrays."""

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.errors import ConfigError


@dataclass(frozen=True)
class Element:
    """A run of a sweep.

    Attributes:
        name: of the run, `run.name`.
        folder: its run folder, absolute.
        overrides: what makes it differ from the others, KEY=VALUE.
        arguments: of fedsim.main.
    """

    name: str
    folder: Path
    overrides: tuple[str, ...]
    arguments: tuple[str, ...]

    def as_line(self) -> str:
        """The element as a line of a manifest, with its end."""
        fields = {
            "name": self.name,
            "run_dir": str(self.folder),
            "overrides": self.overrides,
            "arguments": self.arguments,
        }
        return json.dumps(fields) + "\n"


@dataclass(frozen=True)
class Slice:
    """The lines of a manifest that one job array runs.

    Attributes:
        offset: the first line, from 0.
        size: how many.
    """

    offset: int
    size: int

    def array_option(self, parallel: int | None) -> str:
        """The value of sbatch's --array; `parallel` is how many may run at the same time."""
        indices = "0" if self.size == 1 else f"0-{self.size - 1}"
        return indices if parallel is None else f"{indices}%{parallel}"


def make_slices(num_elements: int, max_array_size: int) -> list[Slice]:
    """The fewest arrays that hold so many elements; their sizes differ by one at most.

    Args:
        num_elements: lines of the manifest.
        max_array_size: Slurm's MaxArraySize: the largest index plus one.

    Raises:
        ConfigError: this Slurm has no job arrays.
    """
    if max_array_size < 1:
        raise ConfigError(
            "a sweep needs job arrays, and this Slurm has MaxArraySize=0; run it with `python -m launch sweep` "
            "inside one job"
        )
    count = -(-num_elements // max_array_size)
    bounds = [num_elements * index // count for index in range(count + 1)] if count else []
    return [Slice(first, last - first) for first, last in itertools.pairwise(bounds)]


def read_manifest(path: Path) -> list[Element]:
    """The elements that `python -m launch sweep` wrote.

    Raises:
        ConfigError: the file cannot be read or was not written by it.
    """
    elements = []
    for number, line in enumerate(_lines(path)):
        try:
            fields = json.loads(line)
            overrides, arguments = tuple(fields["overrides"]), tuple(fields["arguments"])
            elements.append(Element(fields["name"], Path(fields["run_dir"]), overrides, arguments))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number + 1}, must be an element of a sweep as `python -m launch sweep` writes it"
            ) from error
    return elements


def read_element(path: Path, index: str) -> tuple[str, ...]:
    """The arguments of fedsim.main in a line: JSON with a list `arguments`, or words as a shell reads them.

    Args:
        path: of the manifest.
        index: number of the line, from 0.

    Raises:
        ConfigError: there is no such line, or it cannot be read.
    """
    lines = _lines(path)
    if not re.fullmatch(r"[0-9]{1,9}", index) or int(index) >= len(lines):
        raise ConfigError(f"{path} has the lines 0 to {len(lines) - 1}, got {index}; change sbatch's --array")
    line = lines[int(index)]
    where = f"{path}, line {int(index) + 1}"
    try:
        if not line.lstrip().startswith("{"):
            return tuple(shlex.split(line))
        arguments = json.loads(line)["arguments"]
    except (ValueError, KeyError) as error:
        reason = f"no list {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"{where} cannot be read ({reason})") from error
    if not isinstance(arguments, list) or not all(isinstance(word, str) for word in arguments):
        raise ConfigError(f"{where} must hold a list of texts as `arguments`")
    return tuple(arguments)


def write_manifest(elements: Sequence[Element]) -> str:
    """The text of a manifest."""
    return "".join(element.as_line() for element in elements)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"manifest {path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    return [line for line in lines if line.strip()]
