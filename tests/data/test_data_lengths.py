import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.lengths import assign_classes, explicit_classes, length_classes
from fedsim.errors import DataError

lengths_strategy = st.lists(st.integers(0, 30), min_size=1, max_size=200)


def test_classes_are_equal_in_size_where_nothing_is_tied() -> None:
    edges, classes = length_classes(np.random.default_rng(0).permutation(3592), 5)

    assert np.bincount(classes).tolist() == [719, 718, 719, 718, 718]
    assert edges == (718.0, 1436.0, 2155.0, 2873.0)


@given(lengths_strategy, st.integers(1, 12))
def test_equal_lengths_share_a_class_and_no_class_is_empty(lengths: list[int], num_classes: int) -> None:
    edges, classes = length_classes(lengths, num_classes, fewer_if_tied=True)

    assert len(edges) < num_classes
    assert list(edges) == sorted(set(edges))
    assert sorted(set(classes.tolist())) == list(range(len(edges) + 1))
    by_length: dict[int, set[int]] = {}
    for length, chosen in zip(lengths, classes.tolist(), strict=True):
        by_length.setdefault(length, set()).add(chosen)
    assert all(len(chosen) == 1 for chosen in by_length.values())
    in_order = [min(by_length[length]) for length in sorted(by_length)]
    assert in_order == sorted(in_order)


@given(lengths_strategy, st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_order_of_examples_does_not_matter(lengths: list[int], num_classes: int, random) -> None:
    shuffled = list(lengths)
    random.shuffle(shuffled)
    edges, classes = length_classes(lengths, num_classes, fewer_if_tied=True)
    other_edges, other_classes = length_classes(shuffled, num_classes, fewer_if_tied=True)

    assert edges == other_edges
    assert dict(zip(lengths, classes, strict=True)) == dict(zip(shuffled, other_classes, strict=True))


def test_edges_belong_to_the_class_below() -> None:
    edges, classes = length_classes([1, 2, 3, 4], 2)

    assert edges == (2.0,)
    assert classes.tolist() == [0, 0, 1, 1]
    assert assign_classes([0, 2, 2.5, 99], edges).tolist() == [0, 0, 1, 1]


@given(lengths_strategy, st.lists(st.integers(1, 29), min_size=1, max_size=4, unique=True))
def test_explicit_edges_are_taken_as_they_are(lengths: list[int], edges: list[int]) -> None:
    inner = tuple(float(edge) for edge in sorted(edges))
    classes = explicit_classes(lengths, inner, may_be_empty=True)

    assert classes.tolist() == [sum(length > edge for edge in inner) for length in lengths]
    if np.unique(classes).size == len(inner) + 1:
        assert np.array_equal(explicit_classes(lengths, inner), classes)
    else:
        with pytest.raises(DataError, match="data.partition.length_edges must leave no length class empty"):
            explicit_classes(lengths, inner)


def test_quantile_edges_given_back_are_the_same_classes() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 1, 3592).astype(int)
    edges, classes = length_classes(lengths, 5)

    assert np.array_equal(explicit_classes(lengths, edges), classes)


def test_one_class_holds_everything() -> None:
    edges, classes = length_classes([5, 5, 7], 1)

    assert edges == ()
    assert classes.tolist() == [0, 0, 0]


def test_equal_width_classes_would_be_degenerate_where_quantiles_are_not() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 1, 5000).astype(int)
    _, classes = length_classes(lengths, 5)
    equal_width = np.digitize(lengths, np.linspace(lengths.min(), lengths.max(), 6)[1:-1])

    assert np.bincount(classes).min() > 0.15 * lengths.size
    assert np.bincount(equal_width, minlength=5).min() < 0.01 * lengths.size


@pytest.mark.parametrize(
    ("lengths", "num_classes", "possible"),
    [
        ([4] * 10, 5, 1),
        ([1, 2, 3], 5, 3),
        ([1] * 50 + [2] * 50, 5, 2),
        ([1] * 90 + list(range(2, 12)), 5, 2),
        ([1] * 40 + [2] * 30 + [3] * 30, 4, 3),
    ],
)
def test_too_few_distinct_lengths_are_refused_and_the_remedy_works(
    lengths: list[int], num_classes: int, possible: int
) -> None:
    with pytest.raises(
        DataError, match=f"data.partition.num_length_classes={num_classes} .* at most {possible};"
    ):
        length_classes(lengths, num_classes)

    edges, _ = length_classes(lengths, possible)
    assert len(edges) == possible - 1
