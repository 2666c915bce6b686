"""Plato's samplers, against torch's and numpy's own calls client by client, and against the figures known of them.

N = examples, K = clients, C = classes.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import WeightedRandomSampler

from fedsim.data.partition import Deal, Partition, split_clients
from fedsim.data.plato import PARTITION_SIZE, deal_plato_label, deal_plato_quantity
from fedsim.errors import DataError

NUM_EXAMPLES, NUM_CLIENTS, SHARE = 3592, 20, 179
BALANCED = np.arange(NUM_EXAMPLES) % 5


def shares_of(deal: Deal) -> list[np.ndarray]:
    return np.split(deal.indices, deal.offsets[1:-1])


def overlap_of(deal: Deal, classes: np.ndarray) -> float:
    columns = split_clients(deal, classes.size, 0.1, 0)
    edges = tuple(float(edge) for edge in range(int(classes.max())))
    partition = Partition("plato_label", *columns, classes, edges, "tokens", classes < 0, deal.notes)
    return partition.to_json()["mean_pairwise_overlap"]


def sampled_one_by_one(
    classes: np.ndarray, num_clients: int, alpha: float, share: int, seed: int
) -> list[list[int]]:
    """Each client asks torch by itself, always with the same seed."""
    held = []
    for client in range(1, num_clients + 1):
        mix = np.random.RandomState(seed * client).dirichlet(np.full(int(classes.max()) + 1, alpha))
        generator = torch.Generator().manual_seed(seed)
        sampler = WeightedRandomSampler(mix[classes].tolist(), share, replacement=False, generator=generator)
        held.append(sorted(sampler))
    return held


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("seed", [1, 42])
def test_each_client_holds_what_torch_samples_for_it(alpha: float, seed: int) -> None:
    deal = deal_plato_label(BALANCED, 5, NUM_CLIENTS, alpha, SHARE, seed)

    expected = sampled_one_by_one(BALANCED, NUM_CLIENTS, alpha, SHARE, seed)
    assert [share.tolist() for share in shares_of(deal)] == expected


@pytest.mark.parametrize(
    ("alpha", "unique", "overlap"), [(0.1, 884, 0.19), (1.0, 498, 0.54), (100.0, 204, 0.96)]
)
def test_unique_rows_and_overlap_are_those_found_before(alpha: float, unique: int, overlap: float) -> None:
    """reference/papers.md 2.5, seed 1: found by running Plato's code."""
    deal = deal_plato_label(BALANCED, 5, NUM_CLIENTS, alpha, SHARE, 1)

    assert np.unique(deal.indices).size == pytest.approx(unique, rel=0.05)
    assert overlap_of(deal, BALANCED) == pytest.approx(overlap, abs=0.02)


def test_a_seed_for_each_client_would_use_nearly_the_whole_set() -> None:
    """Contrast: with draws that do not share a seed, alpha = 100 does not repeat the same few rows."""
    rng = np.random.default_rng(0)
    held = [rng.choice(NUM_EXAMPLES, SHARE, replace=False) for _ in range(NUM_CLIENTS)]

    assert np.unique(np.concatenate(held)).size > 2000
    assert np.unique(deal_plato_label(BALANCED, 5, NUM_CLIENTS, 100.0, SHARE, 1).indices).size < 250


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80),
    st.integers(1, 30),
    st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e3]),
    st.integers(0, 2**63 - 1),
    st.data(),
)
def test_every_client_holds_so_many_different_examples(
    values: list[int], num_clients: int, alpha: float, seed: int, data
) -> None:
    classes = np.array(values)
    share = data.draw(st.integers(1, classes.size))
    deal = deal_plato_label(classes, 5, num_clients, alpha, share, seed)

    assert np.diff(deal.offsets).tolist() == [share] * num_clients
    assert all(np.unique(held).size == share for held in shares_of(deal))
    again = deal_plato_label(classes, 5, num_clients, alpha, share, seed)
    assert np.array_equal(deal.indices, again.indices)


def test_a_client_that_wants_more_of_a_class_than_there_is_takes_others() -> None:
    classes = np.array([0] * 90 + [1] * 10)
    deal = deal_plato_label(classes, 2, 30, 1e-3, 20, 5)
    counts = np.array([np.bincount(classes[held], minlength=2) for held in shares_of(deal)])

    assert {tuple(row) for row in counts.tolist()} == {(20, 0), (10, 10)}
    assert deal.notes["max_total_variation_drawn_to_realised"] == pytest.approx(0.5, abs=0.01)


def test_seed_zero_does_not_give_all_clients_one_mix() -> None:
    zero = deal_plato_label(BALANCED, 5, NUM_CLIENTS, 0.1, SHARE, 0)

    assert np.unique(zero.indices).size > 700
    same = np.random.RandomState(0).dirichlet(np.full(5, 0.1))
    assert np.array_equal(
        same, np.random.RandomState(0 * 7).dirichlet(np.full(5, 0.1))
    )  # contrast: seed * client


def test_the_default_share_is_platos() -> None:
    deal = deal_plato_label(BALANCED, 5, 3, 1.0, None, 1)

    assert np.diff(deal.offsets).tolist() == [PARTITION_SIZE] * 3
    with pytest.raises(
        DataError, match=r"at most the number of training examples, 50, got null, which .* 1000"
    ):
        deal_plato_label(BALANCED[:50], 5, 3, 1.0, None, 1)
    with pytest.raises(DataError, match="at most the number of training examples, 50, got 51"):
        deal_plato_label(BALANCED[:50], 5, 3, 1.0, 51, 1)


def stretches_one_by_one(
    num_examples: int, num_clients: int, alpha: float, minimum: int, seed: int
) -> list[list[int]]:
    """The quantity sampler with lists, from its description: K + 1 parts, a floor, the last part dropped."""
    legacy = np.random.RandomState(seed)
    rows = list(range(num_examples))
    legacy.shuffle(rows)
    parts = [
        max(float(part), minimum / num_examples) for part in legacy.dirichlet(np.full(num_clients + 1, alpha))
    ]
    bounds = [0, *(int(bound * num_examples) for bound in np.cumsum(parts)[:-1])]
    endless = rows * (bounds[-1] // num_examples + 1)
    return [sorted(endless[start:end]) for start, end in itertools.pairwise(bounds)]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_quantity_sizes_are_platos(alpha: float) -> None:
    deal = deal_plato_quantity(NUM_EXAMPLES, 10, alpha, 10, 1)
    expected = stretches_one_by_one(NUM_EXAMPLES, 10, alpha, 10, 1)

    sizes, lists = np.diff(deal.offsets), [len(rows) for rows in expected]
    assert np.abs(sizes - lists).max() <= 1  # a sum of shares, or of shares times N, rounded down
    if sizes.tolist() == lists:
        assert [share.tolist() for share in shares_of(deal)] == expected


def test_quantity_sizes_are_those_found_before() -> None:
    """reference/papers.md 2.5: 10, 1087, 832, 10, ..., 1424 for alpha 0.1; 91 % of the data for alpha 100."""
    skewed = np.diff(deal_plato_quantity(NUM_EXAMPLES, 10, 0.1, 10, 1).offsets)
    even = deal_plato_quantity(NUM_EXAMPLES, 10, 100.0, 10, 1)

    assert np.abs(skewed[[0, 1, 2, 3, 9]] - [10, 1087, 832, 10, 1424]).max() <= 1
    assert np.unique(even.indices).size / NUM_EXAMPLES == pytest.approx(0.91, abs=0.01)


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 40),
    st.sampled_from([1e-300, 1e-2, 1.0, 1e3]),
    st.integers(0, 99),
    st.data(),
)
def test_quantity_keeps_the_minimum_and_begins_again_where_the_corpus_ends(
    num_examples: int, num_clients: int, alpha: float, seed: int, data
) -> None:
    minimum = data.draw(st.integers(1, num_examples))
    deal = deal_plato_quantity(num_examples, num_clients, alpha, minimum, seed)

    sizes = np.diff(deal.offsets)
    assert sizes.min() >= minimum
    assert all(np.unique(held).size == held.size for held in shares_of(deal))
    unique = np.unique(deal.indices).size
    assert unique == min(num_examples, sizes.sum())
    assert f"{max(0, sizes.sum() - num_examples)} examples are dealt again" in str(deal.notes["policy"])


def test_quantity_needs_the_minimum_once() -> None:
    with pytest.raises(
        DataError, match="min_examples must be at most the number of training examples, 5, got 6"
    ):
        deal_plato_quantity(5, 2, 1.0, 6, 0)
