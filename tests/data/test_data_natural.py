"""One client for each value of a column, and the codes of a column."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config.data_section import DataConfig, PartitionConfig
from fedsim.data.build import build_data
from fedsim.data.columns import encode_column
from fedsim.data.natural import deal_natural
from fedsim.errors import DataError
from tests.helpers import word_tokenizer

columns = st.lists(st.text(max_size=3) | st.sampled_from(["a", "b"]), min_size=1, max_size=80)


@settings(deadline=None)
@given(columns)
def test_codes_stand_for_the_sorted_values(values: list[str]) -> None:
    names, codes = encode_column(values)

    assert list(names) == sorted(set(values))
    assert [names[code] for code in codes.tolist()] == values


@settings(deadline=None)
@given(columns, st.integers(1, 4), st.data())
def test_a_client_holds_all_examples_of_one_value(values: list[str], minimum: int, data) -> None:
    names, codes = encode_column(values)
    counts = {name: values.count(name) for name in names}
    possible = sum(count >= minimum for count in counts.values())
    if possible == 0:
        with pytest.raises(DataError, match="num_clients must be at most 0, .* lower one of the two keys"):
            deal_natural(codes, names, 1, minimum)
        return
    num_clients = data.draw(st.integers(1, possible))
    deal, clients = deal_natural(codes, names, num_clients, minimum)

    assert list(clients) == sorted(clients)
    shares = np.split(deal.indices, deal.offsets[1:-1])
    assert [share.tolist() for share in shares] == [
        [row for row, value in enumerate(values) if value == client] for client in clients
    ]
    left = [counts[name] for name in names if name not in clients]
    assert min(counts[client] for client in clients) >= max([minimum, *left]) or max(left) < minimum
    assert deal.notes["values_left_out"] == len(left)
    assert f"{sum(left)} examples of other values go to nobody" in str(deal.notes["policy"])


def test_of_equally_frequent_values_the_first_become_clients() -> None:
    names, codes = encode_column(["c", "a", "b", "b", "a", "c", "d"])

    assert deal_natural(codes, names, 2, 1)[1] == ("a", "b")
    assert deal_natural(codes, names, 3, 2)[1] == ("a", "b", "c")
    with pytest.raises(
        DataError, match=r"at most 3, .*min_examples=2 of the 7 training examples \(of 4 values"
    ):
        deal_natural(codes, names, 4, 2)


@pytest.mark.parametrize(
    ("name", "field", "num_clients", "num_values"),
    [("presidents", "president", 33, 38), ("shakespeare_roles", "role", 98, 299)],
)
def test_real_speakers_become_clients(
    name: str, field: str, num_clients: int, num_values: int, shared: Path
) -> None:
    """reference/data.md: 33 of 38 presidents and 98 of 299 roles have at least 20 texts."""
    source = shared / "data" / f"{name}.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    speakers = [row[field] for row in rows]
    names, codes = encode_column(speakers)
    deal, clients = deal_natural(codes, names, num_clients, 20)

    assert len(names) == num_values
    assert np.diff(deal.offsets).tolist() == [speakers.count(client) for client in clients]
    with pytest.raises(DataError, match=f"at most {num_clients}, "):
        deal_natural(codes, names, num_clients + 1, 20)


def test_a_natural_partition_of_real_texts(shared: Path) -> None:
    config = DataConfig(
        source=str(shared / "data" / "presidents.jsonl.gz"),
        client_field="president",
        on_empty="drop",
        partition=PartitionConfig(name="natural", num_clients=12, min_examples=20),
    )
    data = build_data(config, word_tokenizer(), seed=0)
    partition = data.partition
    described = partition.to_json()

    assert partition.num_clients == len(partition.client_names) == 12
    assert described["client_names"] == list(partition.client_names)
    assert described["mean_pairwise_overlap"] == 0.0
    for client_id, name in enumerate(partition.client_names):
        held = [*partition.train(client_id), *partition.test(client_id)]
        assert {data.train.clients[index] for index in held} == {name}
        assert len(held) == data.train.clients.count(name)
