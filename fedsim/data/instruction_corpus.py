"""Instruction data as a corpus: prompts and answers, and clients that no one trains on as the global test set."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.config.data_section import DataConfig, InstructionConfig
from fedsim.data.columns import encode_column
from fedsim.data.corpus import (
    Corpus,
    TextSet,
    build_finished_corpus,
    check_splits_differ,
    choose_table,
    hold_out,
    read_column,
    read_names,
)
from fedsim.data.instruction_files import (
    PART_NAMES,
    InstructionTable,
    read_client_files,
    read_client_lines,
    read_tasks,
    references_of,
    text_of,
)
from fedsim.data.prompts import TRAIN, PromptedTexts, Template, choose_template
from fedsim.data.sources import Table, read_splits
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator

PLURALS = {"task": "tasks", "category": "categories"}

Ints = NDArray[np.int64]


def build_instruction_corpus(config: DataConfig, seed: int) -> Corpus:
    """Read the instruction data of `data.source` and set the global test set aside.

    It consists of whole tasks or categories (`hold_out`), so that no client trains on them; or of the examples of
    `data.test_split`; or else of `data.test_fraction` of all examples, drawn with the seed.

    Raises:
        DataError: the source, a split, a file or a column is missing, a value is not a text, or a part would be empty.
    """
    rules = config.instruction
    tables = read_splits(config.source, config.subset) if rules.format == "rows" else {}
    texts = _read(config, tables, config.train_split, "data.train_split", seed)
    if config.test_split is not None:
        check_splits_differ(config.train_split, config.test_split)
        whole = _read(config, tables, config.test_split, "data.test_split", seed)
        test = _first_of_each_task(whole, rules.test_examples_per_task)
        train, test_from = texts, f"split '{config.test_split}' ({len(test)} examples)"
        if rules.format == "natural_instructions":
            _check_disjoint(train, test, config)
    elif rules.hold_out != "none":
        train, test, test_from = build_held_out(texts, rules, seed)
    else:
        train, test = hold_out(texts, config.test_fraction, seed)
        test_from = (
            f"{len(test)} of {len(texts)} examples of split '{config.train_split}', drawn at random before the "
            "partition"
        )
    return build_finished_corpus(config, seed, train, test, test_from)


def build_held_out(texts: TextSet, rules: InstructionConfig, seed: int) -> tuple[TextSet, TextSet, str]:
    """Set all examples of some tasks, or of the tasks of some categories, aside: clients that nobody has seen.

    Returns:
        The others; of each held-out task the first `test_examples_per_task` examples; and in words, which these are.

    Raises:
        DataError: a name is not there, or nothing would be left.
    """
    prompted = _prompted(texts)
    column = prompted.tasks if rules.hold_out == "task" else prompted.categories
    kind, plural = rules.hold_out, PLURALS[rules.hold_out]
    assert column is not None, "the configuration is checked before"
    names, codes = encode_column(column)
    if len(names) < 2:
        raise DataError(
            f"data.instruction.hold_out={kind} needs at least 2 different {plural}, got {len(names)}; set it to none"
        )
    if rules.hold_out_names:
        unknown = sorted(set(rules.hold_out_names) - set(names))
        if unknown:
            raise DataError(
                f"data.instruction.hold_out_names must be {plural} of data.source, got {unknown[0]!r} ({len(unknown)} "
                "such names)"
            )
        chosen = np.flatnonzero(np.isin(names, rules.hold_out_names))
    else:
        number = min(max(round(rules.hold_out_fraction * len(names)), 1), len(names) - 1)
        chosen = np.sort(numpy_generator(seed, "hold_out").permutation(len(names))[:number])
    held_out = np.isin(codes, chosen)
    if held_out.all():
        raise DataError(f"data.instruction.hold_out_names must leave at least one of the {plural}, got all")
    test = _first_of_each_task(texts.select(np.flatnonzero(held_out)), rules.test_examples_per_task)
    words = f"{chosen.size} of {len(names)} {plural}, which no client trains on ({len(test)} examples)"
    return texts.select(np.flatnonzero(~held_out)), test, words


def _prompted(texts: TextSet) -> PromptedTexts:
    assert texts.prompted is not None, "instruction data"
    return texts.prompted


def _first_of_each_task(texts: TextSet, most: int | None) -> TextSet:
    """The first `most` examples of each task, in their order; all where there are no tasks."""
    tasks = _prompted(texts).tasks
    if most is None or tasks is None:
        return texts
    seen: Counter[str] = Counter()
    kept = []
    for index, task in enumerate(tasks):
        seen[task] += 1
        if seen[task] <= most:
            kept.append(index)
    return texts.select(np.array(kept, dtype=np.int64))


def _check_disjoint(train: TextSet, test: TextSet, config: DataConfig) -> None:
    both = sorted(set(_prompted(train).tasks or ()) & set(_prompted(test).tasks or ()))
    if both:
        raise DataError(
            f"data.test_split={config.test_split} must not hold tasks of data.train_split={config.train_split}, got "
            f"{len(both)} ({', '.join(both[:3])}); correct the lists of tasks"
        )


def _read(config: DataConfig, tables: Mapping[str, Table], split: str, key: str, seed: int) -> TextSet:
    rules = config.instruction
    template = choose_template(rules.template, rules.custom_template, rules.custom_template_without_input)
    if rules.format == "rows":
        table, where = choose_table(tables, config.source, split, key)
        return _from_rows(config, table, where, template, is_test=key == "data.test_split")
    if rules.format == "natural_instructions":
        is_test = key == "data.test_split"
        read = read_tasks(
            config.source,
            split,
            config.subset or "default",
            seed,
            most=rules.examples_per_task,
            first=rules.test_examples_per_task if is_test else None,
        )
    elif rules.format == "flexlora":
        read = read_client_files(config.source, split, rules.skip_clients)
    else:
        if split != "train":
            raise DataError(
                f"{key} must be train with data.instruction.format=client_lines, got '{split}'; set data.test_split "
                "to null"
            )
        read = read_client_lines(config.source)
    return _from_files(config, read, template)


def _from_files(config: DataConfig, read: InstructionTable, template: Template) -> TextSet:
    if not read.inputs:
        raise DataError(f"data.source={config.source} must hold at least one example, got none")
    columns = {"task": read.tasks, "category": read.categories, "client": read.clients}
    chosen = {"data.label_field": config.label_field, "data.client_field": config.client_field}
    for key, field in chosen.items():
        if field is not None and field not in columns:
            raise DataError(
                f"{key} must be one of {', '.join(columns)}, or null, with data.instruction.format="
                f"{config.instruction.format}, got '{field}'"
            )
    prompted = PromptedTexts(
        template,
        read.instructions,
        read.inputs,
        read.references,
        np.array(read.parts, dtype=np.int8),
        read.tasks,
        read.categories,
    )
    return TextSet(
        prompted, columns[config.label_field or "category"], columns[config.client_field or "client"]
    )


def _from_rows(config: DataConfig, table: Table, where: str, template: Template, *, is_test: bool) -> TextSet:
    rules = config.instruction

    def texts(name: str) -> list[str]:
        values = read_column(table, getattr(rules, name), f"data.instruction.{name}", where)
        column = getattr(rules, name)
        shared: dict[str, str] = {}  # equal instructions are one object
        checked = (text_of(value, column, f"row {row} of {where}") for row, value in enumerate(values))
        return [shared.setdefault(value, value) for value in checked]

    def names(key: str, field: str | None) -> list[str] | None:
        # a test split often lacks the columns that only the partition needs
        if field is None or (is_test and field not in table.columns):
            return None
        return read_names(read_column(table, field, key, where), key, field, where)

    outputs = read_column(table, rules.output_field, "data.instruction.output_field", where)
    prompted = PromptedTexts(
        template,
        texts("instruction_field"),
        [""] * table.num_rows if rules.input_field is None else _inputs(rules.input_field, table, where),
        [references_of(_or_empty(value), f"row {row} of {where}") for row, value in enumerate(outputs)],
        _parts(names("data.instruction.part_field", rules.part_field), rules.part_field, table.num_rows),
        names("data.instruction.task_field", rules.task_field),
        names("data.instruction.category_field", rules.category_field),
    )
    return TextSet(
        prompted,
        names("data.label_field", config.label_field),
        names("data.client_field", config.client_field),
    )


def _inputs(field: str, table: Table, where: str) -> list[str]:
    values = read_column(table, field, "data.instruction.input_field", where)
    return [text_of(_or_empty(value), field, f"row {row} of {where}") for row, value in enumerate(values)]


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def _parts(names: Sequence[str] | None, field: str | None, num_rows: int) -> NDArray[np.int8]:
    if names is None:
        return np.full(num_rows, TRAIN, dtype=np.int8)
    for row, name in enumerate(names):
        if name.lower() not in PART_NAMES:
            raise DataError(
                f"data.instruction.part_field='{field}' must hold one of {', '.join(PART_NAMES)} in every row, but "
                f"row {row} (counted from 0) is '{name}'"
            )
    return np.array([PART_NAMES[name.lower()] for name in names], dtype=np.int8)
