"""Corpora: which texts clients hold, and which are held out as the global test set."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.cache import content_hash
from fedsim.config.data_section import DataConfig
from fedsim.config.node import EMBEDDED
from fedsim.data.prompts import PromptedTexts
from fedsim.data.sources import Table, read_splits
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TextSet:
    """Texts, and what is known of each.

    Attributes:
        texts: n texts; may be empty strings. `PromptedTexts` for instruction data.
        labels: n class labels, or None.
        clients: n natural clients, or None.
        rows: row of each text in the split it was read from, for messages; None: texts are rows 0 ... n - 1.
    """

    texts: Sequence[str]
    labels: Sequence[str] | None = None
    clients: Sequence[str] | None = None
    rows: Ints | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def source_row(self, index: int) -> int:
        """Row of a text in the split it was read from, counted from 0."""
        return index if self.rows is None else int(self.rows[index])

    def select(self, indices: Ints) -> "TextSet":
        """The texts at `indices`, in that order."""
        chosen = indices.tolist()
        return TextSet(
            [self.texts[index] for index in chosen]
            if self.prompted is None
            else self.prompted.select(indices),
            None if self.labels is None else [self.labels[index] for index in chosen],
            None if self.clients is None else [self.clients[index] for index in chosen],
            indices if self.rows is None else self.rows[indices],
        )

    @property
    def prompted(self) -> PromptedTexts | None:
        """The texts of instruction data, with what is known of prompts and answers; None for plain texts."""
        return self.texts if isinstance(self.texts, PromptedTexts) else None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of texts, labels and clients in their order, and of all that instruction data says of them."""
        digest = hashlib.blake2b(digest_size=16)
        columns: list[Sequence[str] | None] = [self.texts, self.labels, self.clients]
        if self.prompted is not None:
            columns += [self.prompted.tasks, self.prompted.categories]
        for values in columns:
            digest.update(b"none" if values is None else len(values).to_bytes(8, "little"))
            for index, value in enumerate(values or ()):
                self._update(digest, value, index)
        if self.prompted is not None:
            digest.update(self.prompted.parts.tobytes())
            for index in range(len(self)):
                references = self.prompted.references[index]
                spans = self.prompted.render(index)[1]
                digest.update(np.array([*spans, len(references)], dtype="<i8").tobytes())
                for reference in references:
                    self._update(digest, reference, index)
        return digest.hexdigest()

    def _update(self, digest: "hashlib.blake2b", value: str, index: int) -> None:
        try:
            encoded = value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"data: row {self.source_row(index)} (counted from 0) is not valid Unicode text: {error}"
            ) from error
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)


@dataclass(frozen=True)
class Corpus:
    """The texts of an experiment.

    Attributes:
        train: what clients hold.
        test: the global test set; no row of it is in `train`.
        source: `data.source`.
        test_from: in words, which part is held out.
        fingerprint: hash of both sets.
    """

    train: TextSet
    test: TextSet
    source: str
    test_from: str
    fingerprint: str


def build_corpus(config: DataConfig, seed: int) -> Corpus:
    """Read the corpus of `data.source` and set its test part aside.

    Where `data.test_split` is null, `data.test_fraction` of the training split is held out, drawn with the seed. The
    test set is taken before `data.max_examples` thins out the rest, so it does not change with that key.

    Raises:
        DataError: the source, a split or a column is missing, a value is not a text, or a part would be empty.
    """
    splits = read_splits(config.source, config.subset)
    text_set = _text_set(config, splits, config.train_split, "data.train_split")
    if config.test_split is None:
        train, test = hold_out(text_set, config.test_fraction, seed)
        test_from = (
            f"{len(test)} of {len(text_set)} examples of split '{config.train_split}', drawn at random before the "
            "partition"
        )
    else:
        check_splits_differ(config.train_split, config.test_split)
        train, test = text_set, _text_set(config, splits, config.test_split, "data.test_split")
        test_from = f"split '{config.test_split}' ({len(test)} examples)"
    return build_finished_corpus(config, seed, train, test, test_from)


def build_finished_corpus(
    config: DataConfig, seed: int, train: TextSet, test: TextSet, test_from: str
) -> Corpus:
    """The corpus of a training and a test set, after `data.max_examples` has thinned out the first."""
    if config.max_examples is not None and config.max_examples < len(train):
        chosen = numpy_generator(seed, "max_examples").permutation(len(train))[: config.max_examples]
        train = train.select(np.sort(chosen))
    logger.info("%s: %d training examples; global test set: %s", config.source, len(train), test_from)
    fingerprint = content_hash({"train": train.fingerprint, "test": test.fingerprint})
    return Corpus(train, test, config.source, test_from, fingerprint)


def check_splits_differ(train_split: str, test_split: str | None) -> None:
    """Check that the test split is another one than the training split.

    Raises:
        DataError: it is not.
    """
    if test_split == train_split:
        raise DataError(
            f"data.test_split must differ from data.train_split, got '{test_split}' for both; set it to "
            "null to hold out a part of the training split"
        )


def hold_out(texts: TextSet, fraction: float, seed: int) -> tuple[TextSet, TextSet]:
    """Set a share of the texts aside, drawn with the seed: (the others, those set aside), both in their order.

    Raises:
        DataError: there are fewer than 2 texts.
    """
    total = len(texts)
    if total < 2:
        raise DataError(
            f"data.test_split=null holds out a part of the training split, which needs at least 2 examples, got {total}"
        )
    num_test = min(max(round(fraction * total), 1), total - 1)
    order = numpy_generator(seed, "test_split").permutation(total)
    return texts.select(np.sort(order[num_test:])), texts.select(np.sort(order[:num_test]))


def _text_set(config: DataConfig, splits: dict[str, Table], split: str, key: str) -> TextSet:
    table, where = choose_table(splits, config.source, split, key)
    texts = read_column(table, config.text_field, "data.text_field", where)
    _check_texts(texts, config.text_field, where)
    client_field = config.client_field
    if client_field is None and config.source == EMBEDDED:
        client_field = "module"
    # A test split often lacks the columns that only the partition needs.
    fields = {"data.label_field": config.label_field, "data.client_field": client_field}
    extra = {
        name: None
        if field is None or (key == "data.test_split" and field not in table.columns)
        else read_names(read_column(table, field, name, where), name, field, where)
        for name, field in fields.items()
    }
    return TextSet(texts, extra["data.label_field"], extra["data.client_field"])


def choose_table(splits: Mapping[str, Table], source: str, split: str, key: str) -> tuple[Table, str]:
    """The table of a split, which `key` names, and what to call it in messages.

    Raises:
        DataError: there is no such split, or it is empty.
    """
    if split not in splits:
        raise DataError(f"{key} must be a split of {source} ({', '.join(sorted(splits))}), got '{split}'")
    where = f"split '{split}' of {source}"
    if splits[split].num_rows == 0:
        raise DataError(f"{key}: {where} must hold at least one example, got none")
    return splits[split], where


def read_column(table: Table, column: str, key: str, where: str) -> Sequence[Any]:
    """The values of a column, which `key` names.

    Raises:
        DataError: there is no such column.
    """
    if column not in table.columns:
        raise DataError(f"{key} must be a column of {where} ({', '.join(table.columns)}), got '{column}'")
    return table.read(column)


def _check_texts(values: Sequence[Any], column: str, where: str) -> None:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(
                f"data.text_field='{column}' must hold a text in every row, but row {row} (counted from 0) of {where} "
                f"is {_describe(value)}; correct or remove it"
            )


def read_names(values: Sequence[Any], key: str, column: str, where: str) -> list[str]:
    """The values of a column of names, as texts; dates as ISO 8601, without the time where no row has one.

    Raises:
        DataError: a value is neither a text nor a number nor a date.
    """
    for row, value in enumerate(values):
        if not isinstance(value, str | int | float | date) or value != value:  # noqa: PLR0124 - NaN is a missing number
            raise DataError(
                f"{key}='{column}' must hold a text, a number or a date in every row, but row {row} (counted from 0) "
                f"of {where} is {_describe(value)}; correct or remove it"
            )
    whole_days = all(not isinstance(value, datetime) or value.time() == time() for value in values)
    return [_name(value, whole_days) for value in values]


def _name(value: Any, whole_days: bool) -> str:
    """A text, a number or a date; JSON whose texts are all dates is read as dates, too."""
    if whole_days and isinstance(value, datetime):
        value = value.date()
    return value.isoformat() if isinstance(value, date) else str(value)


def _describe(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, date):
        return f"the date {value} (a JSON column in which all texts look like dates is read as dates; CSV keeps them)"
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
