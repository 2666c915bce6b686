"""A partition by a function of the user's own."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config.loader import load_config
from fedsim.data.build import build_data
from fedsim.data.own_partition import deal_by_function
from fedsim.data.partition import Deal
from fedsim.data.prompts import TRAIN
from fedsim.errors import ConfigError, DataError
from tests.helpers import word_tokenizer

LENGTHS = np.array([3, 9, 4, 8, 5], dtype=np.int64)
NAME = "my_partition:deal"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def register(function: Any) -> None:
        module = types.ModuleType("my_partition")
        module.deal = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "my_partition", module)

    return register


def deal(num_clients: int = 2, labels: list[str] | None = None) -> Deal:
    return deal_by_function(NAME, LENGTHS, labels, num_clients, 0.5, 7)


def test_each_client_holds_what_the_function_says(use: Any) -> None:
    seen: list[Any] = []

    def function(lengths: Any, labels: Any, num_clients: int, dirichlet_alpha: float, seed: int) -> Any:
        seen.append((lengths.tolist(), labels.tolist(), num_clients, dirichlet_alpha, seed))
        lengths[:] = 0  # it may do what it likes with its arguments
        return [[4, 0], np.array([4, 1, 3])]

    use(function)
    found = deal(labels=list("abcab"))

    assert seen == [([3, 9, 4, 8, 5], list("abcab"), 2, 0.5, 7)] * 2
    assert LENGTHS.tolist() == [3, 9, 4, 8, 5]
    assert found.indices.tolist() == [0, 4, 1, 3, 4]
    assert found.offsets.tolist() == [0, 2, 5]
    assert found.notes["policy"] == (
        "as my_partition:deal says; 1 examples go to nobody, 1 places are of examples that another client holds too"
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([[0]], "must return the examples of each of 2 clients, got [[0]]"),
        (None, "must return the examples of each of 2 clients, got None"),
        ([[0], []], "whole numbers from 0 to 4 and none twice, got [] for client 1"),
        ([[0], [1, 1]], "got [1, 1] for client 1"),
        ([[0], [5]], "got [5] for client 1"),
        ([[-1], [0]], "got [-1] for client 0"),
        ([[0.0], [1]], "got [0.0] for client 0"),
        ([[True], [1]], "got [True] for client 0"),
        ([[[0, 1], [2]], [1]], "got [[0, 1], [2]] for client 0"),
        ([3, [1]], "got 3 for client 0"),
    ],
)
def test_what_is_no_partition_is_refused(use: Any, answer: Any, message: str) -> None:
    use(lambda *_: answer)
    with pytest.raises(DataError, match=re.escape(message)):
        deal()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.partition.name=no.such:thing"], "data.partition.name=no.such:thing cannot be imported"),
        (["data.partition.name=sys:path"], "data.partition.name must name a function, and sys:path is none"),
        (["data.partition.name=a..b:c"], "data.partition.name=a..b:c cannot be imported"),
        (["data.partition.name=math:hypot_"], "data.partition.name=math:hypot_ cannot be imported"),
        (
            ["data.partition.name=textwrap:dedent"],
            "textwrap:dedent must be a function of (lengths, labels, num_clients, dirichlet_alpha, seed): too many",
        ),
        (["data.partition.name=iidd"], "or package.module:function, got 'iidd'; did you mean 'iid'?"),
        (
            [f"data.partition.name={NAME}", "data.partition.examples_per_client=3"],
            "data.partition.examples_per_client must stay at its default null when data.partition.name is my_par",
        ),
    ],
)
def test_what_is_no_function_is_refused(options: list[str], message: str, texts: Path) -> None:
    def build() -> None:
        config = load_config(None, [f"data.source={texts}", *options])
        build_data(config.data, word_tokenizer(), 0)

    with pytest.raises(ConfigError, match=re.escape(message)):
        build()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [f'{{"text": "{"w1 " * (1 + i % 17)}", "topic": "{"ab"[i % 2]}"}}\n' for i in range(200)]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def test_the_example_of_the_docs(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the configuration to a partition: no text twice, all of them held, the shortest first."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    keys = ["data.partition.name=examples.partition:by_length", "data.partition.num_clients=9"]
    config = load_config(None, [f"data.source={texts}", "data.label_field=topic", *keys])
    data, again = (build_data(config.data, word_tokenizer(), seed) for seed in (3, 3))

    partition = data.partition
    assert partition.fingerprint == again.partition.fingerprint
    assert partition.fingerprint != build_data(config.data, word_tokenizer(), 4).partition.fingerprint
    held = np.concatenate((partition.train_indices, partition.test_indices))
    assert sorted(held.tolist()) == list(range(len(data.train)))
    longest = [data.train.untruncated_tokens[partition.train(k)].max() for k in range(9)]
    shortest = [data.train.untruncated_tokens[partition.train(k)].min() for k in range(9)]
    assert all(longest[k] <= shortest[k + 1] for k in range(8))
    assert partition.name == "examples.partition:by_length"


def test_a_function_that_answers_anew_each_time_is_refused(use: Any) -> None:
    generator = np.random.default_rng(0)
    use(lambda *_: np.split(generator.permutation(5), [2]))
    with pytest.raises(DataError, match="must deal the same again when it is called again"):
        deal()


def test_rows_that_the_corpus_keeps_for_tests_are_not_dealt(use: Any, tmp_path: Path) -> None:
    """The function sees the others alone, and its positions are among them."""
    rows = [
        {"instruction": "w5", "output": " ".join(["w6"] * (1 + i)), "part": ["train", "test"][i % 2]}
        for i in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen: list[int] = []

    def function(lengths: Any, labels: Any, num_clients: int, *_: Any) -> Any:
        seen.append(len(lengths))
        return np.array_split(np.arange(len(lengths)), num_clients)

    use(function)
    keys = [f"data.source={path}", "data.instruction.format=rows", "data.instruction.input_field=null"]
    keys += [
        "data.instruction.part_field=part",
        f"data.partition.name={NAME}",
        "data.partition.num_clients=2",
        "cohort.size=2",
    ]
    data = build_data(load_config(None, keys).data, word_tokenizer(), 0)
    assert data.train.answers is not None
    kept = np.flatnonzero(data.train.answers.parts == TRAIN)
    assert 0 < len(kept) < len(data.train)
    assert seen == [len(kept)] * 2
    held = np.concatenate((data.partition.train_indices, data.partition.test_indices))
    assert sorted(held.tolist()) == kept.tolist()
