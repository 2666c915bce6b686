import csv
import gzip
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.cache import CacheError
from fedsim.config.data_section import DataConfig
from fedsim.data.corpus import Corpus, TextSet, build_corpus
from fedsim.data.docstrings import split_docstrings
from fedsim.errors import DataError

ROWS = [
    {"text": f"text number {i}", "kind": "even" if i % 2 == 0 else "odd", "author": i % 3} for i in range(20)
]


def read(path: Path | str, seed: int = 0, **changes: Any) -> Corpus:
    return build_corpus(DataConfig(source=str(path), **changes), seed)


def all_texts(corpus: Corpus) -> list[str]:
    return sorted([*corpus.train.texts, *corpus.test.texts])


def write_jsonl(path: Path, rows: Sequence[dict] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def write_csv(path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def write_text(path: Path) -> Path:
    path.write_text("\n".join(row["text"] for row in ROWS) + "\n", encoding="utf-8")
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".txt": write_text,
}


@pytest.mark.parametrize(
    ("ending", "zipped"),
    [
        *((ending, False) for ending in WRITERS),
        *((ending, True) for ending in WRITERS if ending != ".parquet"),
    ],
)
def test_every_kind_of_file_gives_the_same_texts(ending: str, zipped: bool, tmp_path: Path) -> None:
    path = WRITERS[ending](tmp_path / (f"my data 1*{ending}" if zipped else f"my [data] 1*{ending}"))
    if zipped:
        path = path.with_name(f"{path.name}.gz")
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))

    corpus = read(path)

    assert all_texts(corpus) == sorted(row["text"] for row in ROWS)
    assert len(corpus.test) == 2
    assert corpus.train.labels is None
    assert corpus.train.clients is None
    assert corpus.source == str(path)
    assert corpus.test_from == "2 of 20 examples of split 'train', drawn at random before the partition"


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_labels_and_natural_clients_stay_with_their_texts(ending: str, tmp_path: Path) -> None:
    corpus = read(WRITERS[ending](tmp_path / f"a{ending}"), label_field="kind", client_field="author")
    by_text = {row["text"]: (row["kind"], str(row["author"])) for row in ROWS}

    for part in (corpus.train, corpus.test):
        for text, label, client in zip(part.texts, part.labels or [], part.clients or [], strict=True):
            assert by_text[text] == (label, client)


def test_rows_are_those_of_the_source(tmp_path: Path) -> None:
    corpus = read(write_jsonl(tmp_path / "a.jsonl"), max_examples=7)

    for part in (corpus.train, corpus.test):
        assert [ROWS[part.source_row(i)]["text"] for i in range(len(part))] == list(part.texts)


def test_words_that_pandas_takes_for_missing_values_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nNA\nnull\nNone\nhello\n", encoding="utf-8")

    assert all_texts(read(path)) == ["NA", "None", "hello", "null"]


def test_values_of_a_csv_file_are_as_they_are_written(tmp_path: Path) -> None:
    """No numbers or truth values are made of them: 007 and 7 are two clients, and 1.10 is not 1.1."""
    path = tmp_path / "a.csv"
    rows = ["text,kind,author", "a,1.1,007", "b,1.10,7", "True,1.1,07", "'2020-01-01',1.10,007"]
    path.write_text("\n".join(rows * 1) + "\n", encoding="utf-8")
    corpus = read(path, label_field="kind", client_field="author")

    parts = (corpus.train, corpus.test)
    assert {client for part in parts for client in part.clients or []} == {"007", "7", "07"}
    assert {label for part in parts for label in part.labels or []} == {"1.1", "1.10"}
    assert all_texts(corpus) == ["'2020-01-01'", "True", "a", "b"]


@pytest.mark.parametrize(
    ("written", "name"),
    [("2020-01-02", "2020-01-02"), ("2020-01-02T10:30:00", "2020-01-02T10:30:00")],
)
def test_clients_named_by_dates_keep_these_names(written: str, name: str, tmp_path: Path) -> None:
    rows = [{**row, "day": "2020-01-01" if place % 2 else written} for place, row in enumerate(ROWS)]
    corpus = read(write_jsonl(tmp_path / "texts.jsonl", rows), client_field="day")
    assert corpus.train.clients is not None
    assert name in corpus.train.clients
    assert len(set(corpus.train.clients)) == 2


def test_texts_that_are_all_dates_are_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    dates = [{"text": f"2020-01-{day:02d}"} for day in range(1, 21)]
    with pytest.raises(DataError, match=r"is the date 2020-01-01 .*CSV keeps them"):
        read(write_jsonl(tmp_path / "texts.jsonl", dates))
    (tmp_path / "texts.csv").write_text("\n".join(["text", *(row["text"] for row in dates)]) + "\n")
    assert all_texts(read(tmp_path / "texts.csv")) == [row["text"] for row in dates]


def test_json_that_is_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its texts are decoded when they are used."""
    path = tmp_path / "latin.jsonl"
    path.write_bytes("".join(f'{{"text": "Größe {i}"}}\n' for i in range(9)).encode("latin-1"))

    with pytest.raises(DataError, match="column 'text' cannot be read .it is not UTF-8 text"):
        all_texts(read(path))


def test_blank_lines_of_a_text_file_are_empty_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")

    assert all_texts(read(path)) == ["", "one", "two"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:5])
    first = read(path)
    second = read(write_jsonl(path, ROWS[:6]))

    assert (len(all_texts(first)), len(all_texts(second))) == (5, 6)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("train-00000-of-00001.jsonl", "val_1.jsonl", "test2.jsonl"),
        ("train/a.jsonl", "dev/a.jsonl", "eval/a.jsonl"),
    ],
)
def test_a_folder_has_the_splits_its_names_say(names: tuple[str, ...], tmp_path: Path) -> None:
    for part, name in zip((ROWS[:10], ROWS[10:15], ROWS[15:]), names, strict=True):
        write_jsonl(tmp_path / "set" / name, part)
    (tmp_path / "set" / "README.md").write_text("about", encoding="utf-8")
    write_jsonl(tmp_path / "set" / ".hidden" / "train.jsonl", ROWS)

    corpus = read(tmp_path / "set", test_split="test")
    other = read(tmp_path / "set", test_split="validation")

    assert list(corpus.train.texts) == [row["text"] for row in ROWS[:10]]
    assert list(corpus.test.texts) == [row["text"] for row in ROWS[15:]]
    assert list(other.test.texts) == [row["text"] for row in ROWS[10:15]]
    assert corpus.test_from == "split 'test' (5 examples)"


def test_the_files_of_a_folder_without_split_names_are_one_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "part1.jsonl", ROWS[:10])
    write_jsonl(tmp_path / "set" / "more" / "trainees.jsonl", ROWS[10:])
    (tmp_path / "set" / "part3.jsonl").write_text("", encoding="utf-8")

    assert all_texts(read(tmp_path / "set")) == sorted(row["text"] for row in ROWS)


def test_a_test_split_need_not_have_the_columns_of_clients(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "set" / "test.jsonl", [{"text": "x"}])
    corpus = read(tmp_path / "set", test_split="test", client_field="author")

    assert len(corpus.train.clients or []) == 20
    assert list(corpus.test.texts) == ["x"]
    assert corpus.test.clients is None


def test_the_held_out_part_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    base = read(path, test_fraction=0.25)

    assert len(base.test) == 5
    assert set(base.test.texts).isdisjoint(base.train.texts)
    assert list(read(path, test_fraction=0.25).test.texts) == list(base.test.texts)
    assert list(read(path, test_fraction=0.25, max_examples=3).test.texts) == list(base.test.texts)
    assert list(read(path, seed=1, test_fraction=0.25).test.texts) != list(base.test.texts)
    assert base.fingerprint != read(path, seed=1, test_fraction=0.25).fingerprint


@pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.999, 3), (0.5, 2)])
def test_both_parts_hold_at_least_one_example(fraction: float, expected: int, tmp_path: Path) -> None:
    corpus = read(write_jsonl(tmp_path / "a.jsonl", ROWS[:4]), test_fraction=fraction)

    assert (len(corpus.test), len(corpus.train)) == (expected, 4 - expected)


def test_a_sample_of_the_training_examples_is_random_and_repeatable(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    sample = read(path, max_examples=6)

    assert len(sample.train) == 6
    assert set(sample.train.texts) < set(read(path).train.texts)
    assert list(sample.train.texts) == list(read(path, max_examples=6).train.texts)
    assert list(sample.train.texts) != list(read(path).train.texts)[:6]
    assert len(read(path, max_examples=100).train) == 18


def test_the_embedded_corpus_is_the_federated_part_of_the_docstrings() -> None:
    _, federated = split_docstrings()
    corpus = read("embedded")

    assert all_texts(corpus) == sorted(docstring.text for docstring in federated)
    modules = {docstring.text: docstring.module for docstring in federated}
    assert [modules[text] for text in corpus.train.texts] == corpus.train.clients
    assert corpus.train.labels is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "review"}, r"data.text_field must be a column of .* \(text, module\), got 'review'"),
        ({"label_field": "kind"}, "data.label_field must be a column"),
        ({"client_field": "author"}, "data.client_field must be a column"),
        ({"test_split": "test"}, r"data.test_split must be a split of embedded \(train\), got 'test'"),
        ({"subset": "x"}, "data.subset names a configuration .* leave it null, got 'x'"),
    ],
)
def test_the_embedded_corpus_has_only_its_own_columns(changes: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("embedded", **changes)


def _make(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


NOT_TEXT = bytes(range(256)) * 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "must hold at least one example, but a.jsonl is empty"),
        ("a.txt", b"", "is empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.csv", b"text,kind\n", "holds no rows"),
        ("a.json", b"[]", "a.json .*no"),
        ("a.jsonl", b"\n\n", "no rows|JSON"),
        ("a.txt", NOT_TEXT, "cannot be read as text .*not UTF-8 text"),
        ("a.csv", NOT_TEXT, "cannot be read as csv"),
        ("a.jsonl", NOT_TEXT, "cannot be read as json"),
        ("a.json", b'{"text": "a"', "cannot be read as json"),
        ("a.parquet", NOT_TEXT, "cannot be read as parquet .*Parquet magic bytes"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"one\ntwo\n" * 50, mtime=0)[:30], "cannot be read"),
        ("a.csv", b"text,kind\na,b\na,b,c,d\n", "cannot be read as csv .*Expected 2 fields in line 3"),
        ("[a].txt.gz", gzip.compress(b"one", mtime=0), r"must be without \[ and \]"),
        ("a.pdf", b"x", "must end in one of .jsonl, .json, .csv, .parquet, .txt"),
        ("a.parquet.gz", b"x", "must end in one of"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = _make(tmp_path, name, content)

    with pytest.raises(DataError, match=message) as raised:
        read(path)
    assert "data.source" in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (7, "int 7"),
        (True, "bool True"),
        (["a"], r"list \['a'\]"),
        ({"a": "b" * 90}, r"dict .*\.\.\."),
    ],
)
def test_a_value_that_is_no_text_is_refused(value: object, shown: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, {"text": value}])

    with pytest.raises(
        DataError, match=rf"data.text_field='text' .* row 2 \(counted from 0\) of .* is {shown}; "
    ) as error:
        read(path)
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("key", ["label_field", "client_field"])
@pytest.mark.parametrize("value", [None, ["a"]])
def test_a_missing_label_or_client_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "x": ["b"]}, {"text": "b", "x": value}])
    if value is None:
        path = write_jsonl(path, [{"text": "a", "x": "b"}, {"text": "b", "x": None}])

    with pytest.raises(
        DataError, match=f"data.{key}='x' must hold a text, a number or a date in every row, but row"
    ):
        read(path, **{key: "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_field": "review"},
            r"data.text_field must be a column of .* \(text, kind, author\), got 'review'",
        ),
        ({"label_field": "topic"}, "data.label_field must be a column .* got 'topic'"),
        ({"client_field": "topic"}, "data.client_field must be a column .* got 'topic'"),
        ({"train_split": "training"}, r"data.train_split must be a split of .* \(train\), got 'training'"),
        ({"test_split": "test"}, r"data.test_split must be a split of .* \(train\), got 'test'"),
        ({"test_split": "train"}, "data.test_split must differ from data.train_split, got 'train' for both"),
        ({"subset": "en"}, "data.subset names a configuration of a Hugging Face dataset"),
    ],
)
def test_a_missing_split_or_column_is_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")

    with pytest.raises(DataError, match=message):
        read(path, **changes)


def test_a_single_example_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.test_split=null .* at least 2 examples, got 1"):
        read(write_jsonl(tmp_path / "a.jsonl", ROWS[:1]))


@pytest.mark.parametrize(
    "source", ["./nothing", "~/nothing-here", "/nothing/here", "nothing.jsonl", "a/b.csv.gz"]
)
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"data.source=.* there is no such file or folder; give"):
        read(source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.md"], "is a folder without any file of a known kind"),
        (["a.jsonl", "b.csv"], "must hold files of one kind, got csv, json"),
        (["train.jsonl", "extra.jsonl"], r"others that are not \(extra.jsonl\)"),
    ],
)
def test_a_folder_that_is_not_one_set_is_refused(files: list[str], message: str, tmp_path: Path) -> None:
    for name in files:
        write_jsonl(tmp_path / "set" / name)

    with pytest.raises(DataError, match=message):
        read(tmp_path / "set")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, "occupied", b"")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "occupied"))

    with pytest.raises(CacheError, match="set FEDSIM_CACHE"):
        read(write_jsonl(tmp_path / "a.jsonl"))


def test_a_dataset_id_without_a_network_says_what_to_do() -> None:
    with pytest.raises(DataError) as raised:
        read("nobody/no-such-set")
    for hint in ("data.source=nobody/no-such-set", "local file", "login node", "HF_HOME", "HF_HUB_OFFLINE"):
        assert hint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_dataset_of_the_hub_is_read_with_its_label_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> datasets.DatasetDict:
        asked.update(options, path=path)
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
        )
        split = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
        return datasets.DatasetDict({"train": split, "validation": split.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpus = read("someone/reviews", subset="en", test_split="validation", label_field="label")

    assert asked == {"path": "someone/reviews", "name": "en"}
    assert corpus.train.labels == ["pos", "neg", "pos"]
    assert corpus.test_from == "split 'validation' (1 examples)"


def test_a_missing_configuration_names_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"data.subset=None .* \['en', 'de'\]"):
        read("someone/reviews")


def test_the_logs_and_progress_bars_of_datasets_come_back(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    import datasets

    datasets.enable_progress_bars()
    level = logging.getLogger("datasets").level
    with pytest.raises(DataError):
        read(_make(tmp_path, "a.jsonl", NOT_TEXT))

    assert datasets.is_progress_bar_enabled()
    assert logging.getLogger("datasets").level == level
    assert capfd.readouterr().err == ""


def test_a_fingerprint_sees_where_one_text_ends() -> None:
    sets = [
        TextSet(["ab", "c"]),
        TextSet(["a", "bc"]),
        TextSet(["ab"], ["c"]),
        TextSet(["ab"], None, ["c"]),
        TextSet(["ab", "c"], ["", ""]),
    ]

    assert len({texts.fingerprint for texts in sets}) == len(sets)
    assert TextSet(["ab", "c"], rows=np.array([4, 9])).fingerprint == sets[0].fingerprint
