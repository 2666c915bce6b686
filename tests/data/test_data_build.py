import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.config.data_section import DataConfig, PartitionConfig
from fedsim.data.build import FederatedData, build_data
from fedsim.data.quantity_skew import draw_sizes
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator
from tests.helpers import random_texts, word_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "texts.jsonl"
    rows = [
        {"text": text, "client": f"c{i % 7}", "topic": "abc"[i % 3], "one": "x"}
        for i, text in enumerate(random_texts(400, longest=40))
    ]
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


@pytest.mark.parametrize(("quantity_alpha", "used"), [(0.3, 0.3), (None, 50.0)])
def test_sizes_have_an_alpha_of_their_own(quantity_alpha: float | None, used: float, source: str) -> None:
    rules = {"name": "length_and_quantity", "dirichlet_alpha": 50.0, "quantity_alpha": quantity_alpha}
    partition = build(source, seed=3, partition={**rules, "min_examples": 4}).partition
    expected, _ = draw_sizes(8, 360, used, 4, numpy_generator(3, "partition"))

    assert (partition.sizes + partition.test_sizes).tolist() == expected.tolist()


BY_LABEL = [
    {"name": "label_skew"},
    {"name": "quantity_skew", "class_by": "label"},
    {"name": "length_and_quantity", "class_by": "label"},
    {"name": "pathological", "class_by": "label"},
    {"name": "plato_label", "class_by": "label", "examples_per_client": 40},
]


@pytest.mark.parametrize("partition", BY_LABEL, ids=lambda rules: rules["name"])
def test_classes_may_be_labels(partition: dict[str, Any], source: str) -> None:
    balanced = partition["name"] == "quantity_skew"
    alpha = 100.0 if balanced else 0.05
    data = build(source, partition={**partition, "dirichlet_alpha": alpha}, label_field="topic")
    described = data.partition.to_json()
    counts = data.partition.label_counts()

    assert described["label_names"] == ["a", "b", "c"]
    assert described["client_label_counts"] == counts.tolist()
    assert (counts.sum(axis=1) == data.partition.sizes).all()
    assert sum(described["label_counts"]) == 360
    of_first = [data.train.labels[index] for index in data.partition.train(0).tolist()]
    assert [of_first.count(label) for label in "abc"] == counts[0].tolist()
    assert len(data.class_edges) == 4  # losses are reported by length class all the same
    largest = (counts.max(axis=1) / counts.sum(axis=1)).mean()
    assert (largest < 0.4) == balanced


def test_label_skew_is_length_skew_with_other_classes(source: str) -> None:
    equal = build(source, partition={"name": "label_skew", "examples_per_client": 30}, label_field="topic")

    assert (equal.partition.sizes + equal.partition.test_sizes == 30).all()
    assert equal.partition.to_json()["mean_pairwise_overlap"] == 0.0
    many = build(source, partition={"name": "label_skew", "dirichlet_alpha": 1e6}, label_field="topic")
    assert np.abs(many.partition.label_counts() / many.partition.sizes[:, None] - 1 / 3).max() < 0.15


@pytest.mark.parametrize("partition", BY_LABEL, ids=lambda rules: rules["name"])
def test_one_label_is_no_skew(partition: dict[str, Any], source: str) -> None:
    if partition["name"] == "quantity_skew":  # which balances what there is
        assert build(source, partition=partition, label_field="one").partition.num_clients == 8
        return
    with pytest.raises(
        DataError, match=r"data.label_field='one' must hold at least 2 different values .*=iid"
    ):
        build(source, partition=partition, label_field="one")


def test_labels_are_counted_where_the_partition_does_not_use_them(source: str) -> None:
    assert build(source, label_field="topic").partition.to_json()["label_names"] == ["a", "b", "c"]
    assert "label_names" not in build(source).partition.to_json()
    assert build(source, label_field="topic").partition.fingerprint == build(source).partition.fingerprint


def test_too_many_labels_are_not_counted_where_nothing_uses_them(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.data.build.MAX_LABELS_SHOWN", 2)

    assert "label_names" not in build(source, label_field="topic").partition.to_json()
    used = build(source, partition={"name": "label_skew"}, label_field="topic")
    assert used.partition.to_json()["label_names"] == ["a", "b", "c"]


def test_natural_clients_have_names(source: str) -> None:
    data = build(source, partition={"name": "natural", "num_clients": 7}, client_field="client")

    assert data.partition.client_names == tuple(f"c{i}" for i in range(7))
    assert data.partition.to_json()["unused_examples"] == 0
    with pytest.raises(
        DataError, match=r"num_clients must be at most 7, the values of data.client_field .*got 8"
    ):
        build(source, partition={"name": "natural"}, client_field="client")
    with pytest.raises(DataError, match="data.client_field must be set when data.partition.name is natural"):
        build(source, partition={"name": "natural"})


def test_embedded_modules_are_natural_clients() -> None:
    config = DataConfig(max_examples=800, partition=PartitionConfig(name="natural", num_clients=3))
    data = build_data(config, word_tokenizer(), 0)

    assert data.partition.client_names == tuple(sorted(data.partition.client_names))
    assert len(data.partition.client_names) == 3


def test_length_edges_replace_quantiles(source: str) -> None:
    edges = (4.0, 30.0)
    data = build(source, partition={"length_edges": edges})

    assert data.class_edges == data.partition.class_edges == edges
    assert data.train_classes.tolist() == np.searchsorted(edges, data.train.untruncated_tokens).tolist()
    assert data.partition.to_json()["class_edges"] == [4.0, 30.0]
    with pytest.raises(
        DataError, match=r"length_edges must leave no length class empty, .* \(lengths 2 to 41\)"
    ):
        build(source, partition={"length_edges": (4.0, 500.0)})
    iid = build(source, partition={"name": "iid", "length_edges": (4.0, 500.0)})
    assert np.bincount(iid.train_classes, minlength=3)[2] == 0


def test_plato_clients_overlap_and_may_be_more_than_the_examples(source: str) -> None:
    label = build(source, partition={"name": "plato_label", "num_clients": 400, "examples_per_client": 20})
    described = label.partition.to_json()

    assert label.partition.num_clients == 400
    assert described["unique_examples"] < 360
    assert 0.05 < described["mean_pairwise_overlap"] < 1
    quantity = build(source, partition={"name": "plato_quantity", "num_clients": 100, "min_examples": 20})
    assert quantity.partition.to_json()["unique_examples"] == 360
    assert (quantity.partition.sizes + quantity.partition.test_sizes).min() == 20


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
