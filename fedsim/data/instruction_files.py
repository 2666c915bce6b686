"""Files of instruction data: Natural Instructions tasks, FlexLoRA's client files, and one line for each client."""

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim.config.paths import is_there, local_path
from fedsim.data.prompts import EVAL, TEST, TRAIN
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator

PART_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "eval": EVAL,
    "evaluation": EVAL,
    "valid": EVAL,
    "validation": EVAL,
    "dev": EVAL,
    "test": TEST,
    "testing": TEST,
}
CLIENT_FILE = re.compile(r"local_(training|eval|test)_(\d+)\.json")
KINDS_OF_CLIENT_FILES = ("training", "eval", "test")
GLOBAL_TEST = "global_test"
RANKED_CATEGORY = re.compile(r"(.*?)\s+\d+$")


@dataclass
class InstructionTable:
    """Rows of instruction data by column; all columns are of one length.

    Attributes:
        instructions, inputs: texts; equal instructions are one object.
        references: the acceptable answers of each row, the first one to be learned.
        parts: `prompts.TRAIN`, `EVAL` or `TEST`.
        tasks, categories, clients: names.
    """

    instructions: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    _shared: dict[str, str] = field(default_factory=dict, repr=False)

    def add(
        self,
        where: str,
        *,
        instruction: object,
        input_text: object,
        output: object,
        part: int,
        names: tuple[str, str, str],
    ) -> None:
        """Append a row; `names` are its task, category and client.

        Raises:
            DataError: a value is not a text, or the output not a text or a list of texts.
        """
        self.instructions.append(self._shared.setdefault(*[text_of(instruction, "instruction", where)] * 2))
        self.inputs.append("" if input_text is None else text_of(input_text, "input", where))
        self.references.append(references_of(output, where))
        self.parts.append(part)
        for column, name in zip((self.tasks, self.categories, self.clients), names, strict=True):
            column.append(self._shared.setdefault(name, name))


def text_of(value: object, name: str, where: str) -> str:
    """The value, if it is a text.

    Raises:
        DataError: it is not.
    """
    if isinstance(value, str):
        return value
    raise DataError(
        f"data.source: the {name} of {where} must be a text, got {_shown(value)}; correct or remove it"
    )


def references_of(output: object, where: str) -> list[str]:
    """The acceptable answers that an output names: a text, or a list of texts.

    Raises:
        DataError: it is neither.
    """
    if isinstance(output, str):
        return [output]
    if isinstance(output, list) and all(isinstance(answer, str) for answer in output):
        return output
    raise DataError(
        f"data.source: the output of {where} must be a text or a list of texts, got {_shown(output)}; correct or "
        "remove it"
    )


def read_tasks(
    source: str, split: str, split_folder: str, seed: int, *, most: int | None, first: int | None
) -> InstructionTable:
    """Task files of the Natural Instructions repository (arXiv 2204.07705): Definition, Categories, Instances.

    Args:
        source: the repository (with a folder tasks and, optionally, splits), a folder of task files, or one file.
        split: tasks listed in splits/<split_folder>/<split>_tasks.txt; without such files there is "train" alone,
            of all tasks.
        most: at most so many instances of each task, drawn with the seed and the task's name; None: all.
        first: of each task the first so many instances, which is how the repository defines its test set.

    Raises:
        DataError: a file is missing or not of this kind.
    """
    root = _folder_or_file(source)
    folder = root / "tasks" if (root / "tasks").is_dir() else root
    files = {path.stem: path for path in ([root] if root.is_file() else sorted(folder.glob("*.json")))}
    if not files:
        raise DataError(
            f"data.source={source} must hold task files (*.json), or a folder tasks with them, got none"
        )
    chosen = _tasks_of_split(source, root, split, split_folder, files)
    table = InstructionTable()
    for task in chosen:
        content = _read_json(files[task])
        instances = content.get("Instances") if isinstance(content, dict) else None
        if not isinstance(instances, list) or "Definition" not in content:
            raise DataError(
                f"data.source: {files[task]} must be a Natural Instructions task with Definition and Instances; "
                "move other files elsewhere"
            )
        places: Iterable[int] = range(len(instances))
        if first is not None:
            places = range(min(first, len(instances)))
        elif most is not None and most < len(instances):
            order = numpy_generator(seed, f"examples_per_task/{task}").permutation(len(instances))
            places = sorted(order[:most].tolist())
        definition = _first(content["Definition"])
        category = _first(content.get("Categories")) or "unknown"
        for place in places:
            row = instances[place]
            where = f"instance {place} of {files[task].name}"
            if not isinstance(row, dict):
                raise DataError(f"data.source: {where} must be an object with input and output")
            table.add(
                where,
                instruction=definition,
                input_text=row.get("input"),
                output=row.get("output"),
                part=TEST if first is not None else TRAIN,
                names=(task, str(category), task),
            )
    return table


def read_client_files(source: str, split: str, skip: Collection[int]) -> InstructionTable:
    """FlexLoRA's client files local_{training,eval,test}_<client>.json (arXiv 2402.11505, code).

    Each holds a list of {instruction, input, output, category}. Clients are named by their numbers, padded with zeros
    so that their order is that of the numbers. A category such as "Program Execution 999.json" is the task, since
    each client has one of its own; without the number it is the category. Where the task has several references, the
    authors' files have joined them with ", " already, so each row has one.

    Args:
        source: the folder.
        split: "train", the clients; or "global_test", the rows of global_test.json.
        skip: clients to leave out, whose files may be missing.

    Raises:
        DataError: files are missing, of a client that is not skipped, or not of this kind.
    """
    folder = _folder_or_file(source)
    table = InstructionTable()
    if split == GLOBAL_TEST:
        _add_client_file(table, folder / f"{GLOBAL_TEST}.json", TEST, "global")
        return table
    if split != "train":
        raise DataError(
            f"data.train_split and data.test_split must be train or {GLOBAL_TEST} with data.instruction.format="
            f"flexlora, got '{split}'"
        )
    found = {
        (int(match[2]), match[1]): path
        for path in folder.glob("local_*.json")
        if (match := CLIENT_FILE.fullmatch(path.name))
    }
    if not found:
        raise DataError(f"data.source={source} must hold files local_training_<client>.json, got none")
    last = max(client for client, _ in found)
    wanted = [
        (client, kind) for client in range(last + 1) if client not in skip for kind in KINDS_OF_CLIENT_FILES
    ]
    missing = [f"local_{kind}_{client}.json" for client, kind in wanted if (client, kind) not in found]
    if missing:
        raise DataError(
            f"data.source={source} must hold three files for each client from 0 to {last}, but {len(missing)} are "
            f"missing ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); get them, or name these clients "
            "in data.instruction.skip_clients"
        )
    for client, kind in wanted:
        _add_client_file(table, found[client, kind], PART_NAMES[kind], f"{client:0{len(str(last))}d}")
    return table


def _add_client_file(table: InstructionTable, path: Path, part: int, client: str) -> None:
    if not path.is_file():
        raise DataError(f"data.source: there is no file {path}")
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"data.source: {path} must be a list of rows, got {_shown(rows)}")
    for number, row in enumerate(rows):
        where = f"row {number} of {path.name}"
        if not isinstance(row, dict):
            raise DataError(f"data.source: {where} must be an object, got {_shown(row)}")
        task = text_of(row.get("category"), "category", where).removesuffix(".json")
        ranked = RANKED_CATEGORY.fullmatch(task)
        table.add(
            where,
            instruction=row.get("instruction"),
            input_text=row.get("input"),
            output=row.get("output"),
            part=part,
            names=(task, ranked[1] if ranked else task, client),
        )


def read_client_lines(source: str) -> InstructionTable:
    """A JSONL file (or .jsonl.gz) with one line for each client.

    A line has `client`, `task`, `category`, `definition` (or `instruction`), and lists `training`, `eval` and `test`
    (PART_NAMES) of rows: [input, output] or {input, output}. Numbered clients are named with leading zeros.

    Raises:
        DataError: the file is missing or a line is not of this kind.
    """
    path = _folder_or_file(source)
    lines = [] if path.is_dir() else _read_lines(path)
    if not lines:
        raise DataError(f"data.source={source} must be a JSONL file with one line for each client, got none")
    numbers = [client for line in lines if isinstance(client := line.get("client"), int)]
    width = len(str(max(numbers, default=0)))
    table = InstructionTable()
    for number, line in enumerate(lines):
        where = f"line {number + 1} of {path.name}"
        client = line.get("client")
        if not isinstance(client, int | str):
            raise DataError(
                f"data.source: the client of {where} must be a number or a text, got {_shown(client)}"
            )
        name = f"{client:0{width}d}" if isinstance(client, int) else client
        names = (str(line.get("task", name)), str(line.get("category", "unknown")), name)
        for key in line.keys() & PART_NAMES.keys():
            if not isinstance(line[key], list):
                raise DataError(f"data.source: {key} of {where} must be a list of rows")
        for key in sorted(line.keys() & PART_NAMES.keys(), key=lambda key: (PART_NAMES[key], key)):
            for place, row in enumerate(line[key]):
                here = f"{key} row {place} of {where}"
                given, answer = _pair(row, here)
                table.add(
                    here,
                    instruction=line.get("definition", line.get("instruction")),
                    input_text=given,
                    output=answer,
                    part=PART_NAMES[key],
                    names=names,
                )
    return table


def _pair(row: object, where: str) -> tuple[object, object]:
    if isinstance(row, dict):
        return row.get("input"), row.get("output")
    if isinstance(row, list) and len(row) == 2:
        return row[0], row[1]
    raise DataError(f"data.source: {where} must be [input, output] or an object with them, got {_shown(row)}")


def _tasks_of_split(
    source: str, root: Path, split: str, split_folder: str, files: Mapping[str, Path]
) -> list[str]:
    listing = root / "splits" / split_folder / f"{split}_tasks.txt"
    if not listing.is_file():
        if split == "train" and not listing.parent.is_dir():
            return list(files)
        raise DataError(
            f"data.train_split and data.test_split must name lists of tasks, but there is no {listing}; set "
            "data.subset to the folder below splits, or data.test_split to null"
        )
    tasks = list(dict.fromkeys(listing.read_text(encoding="utf-8").split()))
    missing = [task for task in tasks if task not in files]
    if missing or not tasks:
        raise DataError(
            f"data.source={source} must hold the tasks that {listing} lists, but {len(missing)} of {len(tasks)} are "
            f"missing ({', '.join(missing[:3])}); get them, or take them off the list"
        )
    return tasks


def _folder_or_file(source: str) -> Path:
    path = local_path(source)
    if not is_there(path):
        raise DataError(f"data.source={source} must be a file or folder that exists; check the path")
    return path


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"data.source: {path} cannot be read as JSON ({error})") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, text in enumerate(stream):
                if text.strip():
                    line = json.loads(text)
                    if not isinstance(line, dict):
                        raise DataError(f"data.source: line {number + 1} of {path.name} must be an object")
                    lines.append(line)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"data.source: {path} cannot be read as JSONL ({error})") from error
    return lines


def _first(value: object) -> object:
    """The value, or the first of a list of them."""
    return (value[0] if value else None) if isinstance(value, list) else value


def _shown(value: object) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."
