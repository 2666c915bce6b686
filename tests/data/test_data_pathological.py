"""k classes for each client.

N = examples, K = clients, C = classes.
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data.partition import Deal
from fedsim.data.pathological import deal_pathological
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator


def generator(seed: int) -> np.random.Generator:
    return numpy_generator(seed, "partition")


def counts_of(deal: Deal, classes: np.ndarray) -> np.ndarray:
    shares = np.split(deal.indices, deal.offsets[1:-1])
    return np.array([np.bincount(classes[share], minlength=int(classes.max()) + 1) for share in shares])


@st.composite
def cases(draw: Callable) -> tuple[np.ndarray, int, int, int]:
    num_classes = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 60), min_size=num_classes, max_size=num_classes))
    classes = np.repeat(np.arange(num_classes), sizes)
    return (
        np.random.default_rng(0).permutation(classes),
        num_classes,
        draw(st.integers(1, classes.size)),
        draw(st.integers(1, num_classes)),
    )


@settings(deadline=None)
@given(cases(), st.integers(0, 100))
def test_every_client_holds_exactly_k_classes_in_equal_parts(
    case: tuple[np.ndarray, int, int, int], seed: int
) -> None:
    classes, num_classes, num_clients, few = case
    most_shards = np.minimum(np.bincount(classes), num_clients).sum()
    if most_shards < num_clients * few:
        with pytest.raises(DataError, match="classes_per_client must leave an example for each"):
            deal_pathological(classes, num_classes, num_clients, few, None, generator(seed))
        return
    deal = deal_pathological(classes, num_classes, num_clients, few, None, generator(seed))

    counts = counts_of(deal, classes)
    assert ((counts > 0).sum(axis=1) == few).all()
    assert np.unique(counts[counts > 0]).size == 1
    assert np.unique(deal.indices).size == deal.indices.size
    size = counts.max() + 1
    assert (
        np.minimum(np.bincount(classes) // size, num_clients).sum() < num_clients * few
    )  # no larger shard fits
    again = deal_pathological(classes, num_classes, num_clients, few, None, generator(seed))
    assert np.array_equal(again.indices, deal.indices)


def test_balanced_classes_are_used_up_and_pairs_of_classes_are_mixed() -> None:
    classes = np.arange(60_000) % 10
    deal = deal_pathological(classes, 10, 100, 2, None, generator(0))

    assert (
        np.diff(deal.offsets).tolist() == [600] * 100
    )  # the MNIST split of arXiv 1602.05629: 2 shards of 300
    assert deal.indices.size == 60_000
    pairs = {tuple(np.flatnonzero(row)) for row in counts_of(deal, classes)}
    assert len(pairs) > 30  # of 45; dealt in the order of the classes there would be 10
    other = deal_pathological(classes, 10, 100, 2, None, generator(1))
    assert not np.array_equal(other.indices, deal.indices)


def test_shards_over_a_sorted_corpus_would_straddle_classes() -> None:
    """Contrast: the paper's shards, cut from unequal classes, give some clients more than k classes."""
    classes = np.repeat(np.arange(5), [130, 270, 90, 310, 200])
    shards = np.random.default_rng(0).permutation(40)
    of_clients = classes.reshape(40, 25)[shards].reshape(20, 50)
    assert max(np.unique(row).size for row in of_clients) > 2

    deal = deal_pathological(classes, 5, 20, 2, None, generator(0))
    assert ((counts_of(deal, classes) > 0).sum(axis=1) == 2).all()


def test_a_share_can_be_asked_for() -> None:
    classes = np.arange(1000) % 5
    deal = deal_pathological(classes, 5, 20, 2, 30, generator(0))

    assert np.diff(deal.offsets).tolist() == [30] * 20
    assert "2 shards of 15 examples" in str(deal.notes["policy"])
    assert "400 examples go to nobody" in str(deal.notes["policy"])


@pytest.mark.parametrize(
    ("few", "share", "message"),
    [
        (6, None, "classes_per_client must be at most the number of classes, 5, got 6"),
        (
            2,
            31,
            "must be a multiple of data.partition.classes_per_client=2 and at most 50 for 20 clients, got 31",
        ),
        (2, 52, "at most 50 for 20 clients, got 52"),
    ],
)
def test_what_cannot_be_is_refused(few: int, share: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        deal_pathological(np.arange(1000) % 5, 5, 20, few, share, generator(0))
