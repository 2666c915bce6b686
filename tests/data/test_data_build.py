import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config.schema import DataConfig, PartitionConfig
from fedsim.data.build import FederatedData, build_data
from fedsim.errors import DataError
from tests.helpers import random_texts, word_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": text, "client": f"c{i % 7}"} for i, text in enumerate(random_texts(400, longest=40))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build(
    source: str, seed: int = 0, partition: dict[str, Any] | None = None, **changes: Any
) -> FederatedData:
    config = DataConfig(
        source=source, partition=PartitionConfig(**{"num_clients": 8, **(partition or {})}), **changes
    )
    return build_data(config, word_tokenizer(), seed)


@pytest.mark.parametrize("name", ["iid", "length_skew", "quantity_skew"])
def test_a_corpus_becomes_stores_classes_and_a_partition(name: str, source: str) -> None:
    data = build(source, partition={"name": name}, max_tokens=20, client_field="client")
    partition = data.partition

    assert (len(data.train), len(data.test)) == (360, 40)
    held = np.concatenate((partition.train_indices, partition.test_indices))
    assert np.unique(held).size == held.size == 360
    assert partition.name == name
    assert partition.num_clients == 8
    assert partition.test_sizes.min() >= 1
    assert len(data.train.clients or []) == 360
    # classes are those of the whole text, though everything over 20 tokens is cut
    below = np.searchsorted(data.class_edges, data.train.untruncated_tokens)
    assert data.train_classes.tolist() == below.tolist()
    assert (
        data.test_classes.tolist() == np.searchsorted(data.class_edges, data.test.untruncated_tokens).tolist()
    )
    assert np.bincount(data.train_classes).size == 5
    assert partition.to_json()["class_share_truncated"][-1] == 1.0

    for client_id in range(8):
        sequences = [data.train.sequence(index) for index in partition.train(client_id).tolist()]
        assert data.client_tokens(client_id) == sum(map(len, sequences))
        assert data.client_label_tokens(client_id) == sum(len(sequence) - 1 for sequence in sequences)


def test_data_depend_on_the_seed_and_on_nothing_else(source: str) -> None:
    base = build(source)

    assert build(source).fingerprint == base.fingerprint
    assert build(source, seed=1).fingerprint != base.fingerprint
    assert build(source, max_tokens=9).fingerprint != base.fingerprint
    assert build(source, partition={"num_clients": 9}).fingerprint != base.fingerprint
    assert build(source, client_test_fraction=0.5).fingerprint != base.fingerprint


@pytest.mark.parametrize("unit", ["words", "characters"])
def test_lengths_are_counted_in_the_unit_asked_for(unit: str, source: str) -> None:
    data = build(source, partition={"length_unit": unit})

    lengths = getattr(data.train, unit)
    assert data.train_classes.tolist() == np.searchsorted(data.class_edges, lengths).tolist()
    assert data.partition.to_json()["class_unit"] == unit


def test_classes_that_do_not_exist_matter_only_where_they_are_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "equal.txt"
    path.write_text("w3 w4\n" * 30, encoding="utf-8")
    caplog.set_level(logging.INFO)

    assert build(str(path), partition={"name": "iid"}).class_edges == ()
    assert any("data.partition.num_length_classes=5" in message for message in caplog.messages)
    for name in ("length_skew", "quantity_skew"):
        with pytest.raises(
            DataError,
            match=r"num_length_classes=5 .* at most 1; choose data.partition.name=iid",
        ):
            build(str(path), partition={"name": name})


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({"num_clients": 361}, "data.partition.num_clients must be at most .* 360, got 361"),
        ({"examples_per_client": 46}, "data.partition.examples_per_client must be at most 45"),
        ({"name": "iid", "examples_per_client": 46}, "data.partition.examples_per_client must be at most 45"),
        ({"name": "quantity_skew", "min_examples": 46}, "data.partition.min_examples must be at most 45"),
    ],
)
def test_a_partition_that_cannot_be_is_refused(partition: dict[str, Any], message: str, source: str) -> None:
    with pytest.raises(DataError, match=message):
        build(source, partition=partition)


def test_texts_without_label_tokens_are_dropped_before_the_partition(tmp_path: Path) -> None:
    path = tmp_path / "gaps.txt"
    path.write_text("\n\n".join(random_texts(100)) + "\n", encoding="utf-8")

    with pytest.raises(DataError, match=r"texts leave no label token .*data.on_empty=drop"):
        build(str(path))
    data = build(str(path), on_empty="drop")
    assert len(data.train) + len(data.test) == 100
    assert data.train.num_dropped + data.test.num_dropped == 99
    assert data.train.num_label_tokens.min() >= 1


def test_real_texts_with_the_real_opt_tokenizer(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "opt_tokenizer")
    config = DataConfig(
        source=str(shared / "data" / "reviews_like_textgenerator.jsonl.gz"),
        text_field="review",
        partition=PartitionConfig(dirichlet_alpha=0.1),
    )
    data = build_data(config, tokenizer, seed=1)

    assert len(data.train) + len(data.test) == 3992
    assert data.train.sequence(0)[0] == 2  # </s>, which OPT's tokenizer puts before each text
    assert (np.diff(data.partition.train_offsets) + np.diff(data.partition.test_offsets) == 179).all()
    assert data.partition.to_json()["mean_pairwise_overlap"] == 0.0
    # reference/data.md: 63 % of these reviews are longer than 128 tokens
    truncated = data.train.untruncated_tokens > 128
    assert np.mean(truncated) == pytest.approx(0.63, abs=0.02)
    counts = data.partition.class_counts()
    assert (counts.max(axis=1) / counts.sum(axis=1)).mean() > 0.6
