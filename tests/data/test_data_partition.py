"""The partitioners, and what a partition says of itself.

N = examples, K = clients, C = classes.
"""

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.iid import deal_iid
from fedsim.data.length_skew import deal_length_skew
from fedsim.data.partition import (
    Deal,
    Partition,
    equal_share,
    largest_remainder,
    log_gamma_draws,
    split_clients,
)
from fedsim.data.quantity_skew import deal_quantity_skew
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator

alphas = st.sampled_from([1e-300, 1e-3, 0.03, 0.1, 1.0, 10.0, 1e4, 1e300])
seeds = st.integers(0, 1000)


def generator(seed: int) -> np.random.Generator:
    return numpy_generator(seed, "partition")


def random_classes(num_examples: int, num_classes: int, seed: int) -> np.ndarray:
    """Classes of unequal size, none empty."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_classes, 2.0))
    classes = rng.choice(num_classes, num_examples, p=shares)
    classes[:num_classes] = np.arange(num_classes)
    return rng.permutation(classes)


def counts_of(deal: Deal, classes: np.ndarray) -> np.ndarray:
    num_classes = int(classes.max()) + 1
    return np.array([np.bincount(classes[share], minlength=num_classes) for share in shares_of(deal)])


def shares_of(deal: Deal) -> list[np.ndarray]:
    return np.split(deal.indices, deal.offsets[1:-1])


def partition_of(deal: Deal, classes: np.ndarray, fraction: float = 0.1, seed: int = 0) -> Partition:
    columns = split_clients(deal, classes.size, fraction, seed)
    edges = tuple(float(edge) for edge in range(int(classes.max())))
    truncated = classes == classes.max()
    return Partition("test", *columns, classes, edges, "tokens", truncated, deal.notes)


@st.composite
def cases(draw: Callable) -> tuple[np.ndarray, int, int]:
    """Classes, their number, and a number of clients they suffice for."""
    num_classes = draw(st.integers(1, 7))
    num_examples = draw(st.integers(num_classes, 300))
    return (
        random_classes(num_examples, num_classes, draw(seeds)),
        num_classes,
        draw(st.integers(1, num_examples)),
    )


@given(st.integers(1, 300), st.data(), seeds)
def test_iid_deals_equal_disjoint_shares(num_examples: int, data, seed: int) -> None:
    num_clients = data.draw(st.integers(1, num_examples))
    deal = deal_iid(num_examples, num_clients, None, generator(seed))

    assert (np.diff(deal.offsets) == num_examples // num_clients).all()
    assert np.unique(deal.indices).size == deal.indices.size
    assert num_examples - deal.indices.size < num_clients
    assert f"{num_examples - deal.indices.size} examples go to nobody" in str(deal.notes["policy"])
    again = deal_iid(num_examples, num_clients, None, generator(seed))
    assert np.array_equal(deal.indices, again.indices)


def test_iid_depends_on_the_seed_and_is_not_in_file_order() -> None:
    first, second = (deal_iid(100, 5, None, generator(seed)) for seed in (0, 1))

    assert not np.array_equal(first.indices, second.indices)
    assert shares_of(first)[0].tolist() != list(range(20))


@given(cases(), alphas, seeds, st.data())
def test_length_skew_deals_equal_disjoint_shares_of_corpus_like_totals(
    case: tuple[np.ndarray, int, int], alpha: float, seed: int, data
) -> None:
    classes, num_classes, num_clients = case
    share = data.draw(st.one_of(st.none(), st.integers(1, classes.size // num_clients)))
    deal = deal_length_skew(classes, num_classes, num_clients, alpha, share, generator(seed))

    sizes = np.diff(deal.offsets)
    assert (sizes == (share or classes.size // num_clients)).all()
    assert np.unique(deal.indices).size == deal.indices.size
    supply = np.bincount(classes)
    totals = np.bincount(classes[deal.indices], minlength=num_classes)
    assert (totals <= supply).all()
    assert np.abs(totals - supply * sizes.sum() / classes.size).max() < 1
    again = deal_length_skew(classes, num_classes, num_clients, alpha, share, generator(seed))
    assert np.array_equal(deal.indices, again.indices)
    assert 0 <= deal.notes["mean_total_variation_drawn_to_realised"] <= 1


@pytest.mark.parametrize("alpha", [1e6, 1e300])
def test_length_skew_gives_every_client_the_corpus_mix_as_alpha_grows(alpha: float) -> None:
    classes = random_classes(20_000, 5, seed=3)
    deal = deal_length_skew(classes, 5, 400, alpha, 39, generator(0))

    expected = 39 * np.bincount(classes) / classes.size
    assert np.abs(counts_of(deal, classes) - expected).max() < 1.1  # of each class, what rounding leaves open


@pytest.mark.parametrize("alpha", [1e-3, 1e-300])
def test_length_skew_gives_a_client_one_class_as_alpha_falls(alpha: float) -> None:
    classes = np.arange(4000) % 5
    deal = deal_length_skew(classes, 5, 20, alpha, None, generator(1))

    largest = counts_of(deal, classes).max(axis=1) / 200
    assert (
        np.count_nonzero(largest > 0.95) >= 20 - 4
    )  # only the C - 1 clients between two classes may be mixed
    assert np.isfinite(deal.notes["mean_total_variation_drawn_to_realised"])


def test_length_skew_grows_more_even_with_alpha() -> None:
    classes = random_classes(6000, 5, seed=0)

    def entropy(alpha: float) -> float:
        counts = np.concatenate(
            [
                counts_of(deal_length_skew(classes, 5, 20, alpha, None, generator(seed)), classes)
                for seed in range(5)
            ]
        )
        shares = counts / counts.sum(axis=1, keepdims=True)
        return float(-(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1).mean())

    entropies = [entropy(alpha) for alpha in (0.01, 0.1, 1.0, 100.0)]
    assert entropies == sorted(entropies)
    assert entropies[-1] - entropies[0] > 1.0


def test_length_skew_stays_near_the_draws_where_many_clients_balance_each_other() -> None:
    deal = deal_length_skew(np.arange(400_000) % 5, 5, 2000, 0.5, 200, generator(0))

    assert deal.notes["mean_total_variation_drawn_to_realised"] < 0.05


def test_drawing_with_repetition_would_not_pass_as_length_skew() -> None:
    """Contrast: taking what each client's own draw asks for, as published samplers do, repeats examples."""
    classes = np.arange(1000) % 5
    mixes = np.random.default_rng(0).dirichlet(np.full(5, 0.1), 20)
    wanted = np.rint(50 * mixes).astype(int)

    assert (wanted.sum(axis=0) > np.bincount(classes)).any()
    deal = deal_length_skew(classes, 5, 20, 0.1, 50, generator(0))
    assert (counts_of(deal, classes).sum(axis=0) == np.bincount(classes)).all()


@given(cases(), alphas, seeds, st.data())
def test_quantity_skew_uses_every_example_once_and_keeps_the_minimum_and_the_mix(
    case: tuple[np.ndarray, int, int], alpha: float, seed: int, data
) -> None:
    classes, num_classes, num_clients = case
    minimum = data.draw(st.integers(1, classes.size // num_clients))
    deal = deal_quantity_skew(classes, num_clients, alpha, minimum, generator(seed))

    assert np.array_equal(np.sort(deal.indices), np.arange(classes.size))
    sizes = np.diff(deal.offsets)
    assert sizes.min() >= minimum
    shares = np.bincount(classes) / classes.size
    assert (
        np.abs(counts_of(deal, classes) - sizes[:, None] * shares) <= 1 + shares * num_classes + 1e-9
    ).all()
    again = deal_quantity_skew(classes, num_clients, alpha, minimum, generator(seed))
    assert np.array_equal(deal.indices, again.indices)


@pytest.mark.parametrize("minimum", [1, 3])
def test_quantity_skew_deals_the_minimum_where_no_more_is_left(minimum: int) -> None:
    for seed in range(60):
        deal = deal_quantity_skew(np.zeros(6 * minimum, dtype=np.int64), 6, 1.0, minimum, generator(seed))
        assert np.diff(deal.offsets).tolist() == [minimum] * 6


def test_quantity_skew_keeps_the_proportions_of_clients_above_the_minimum() -> None:
    classes = np.zeros(100_000, dtype=np.int64)
    free = np.diff(deal_quantity_skew(classes, 10, 0.5, 1, generator(5)).offsets)
    raised = np.diff(deal_quantity_skew(classes, 10, 0.5, 2000, generator(5)).offsets)

    above = raised > 2000
    assert 0 < np.count_nonzero(~above) < 10
    ratios = raised[above] / free[above]
    assert ratios.max() - ratios.min() < 1e-3
    assert ratios.max() < 1


def test_quantity_skew_is_even_at_a_large_alpha_and_skewed_at_a_small_one() -> None:
    classes = random_classes(10_000, 5, seed=0)
    even = np.diff(deal_quantity_skew(classes, 10, 1e6, 2, generator(0)).offsets)
    skewed = np.diff(deal_quantity_skew(classes, 10, 1e-3, 2, generator(0)).offsets)

    assert even.max() - even.min() < 20
    assert skewed.max() > 9_000


def test_dealing_in_file_order_would_not_keep_the_mix() -> None:
    """Contrast: consecutive stretches of a sorted corpus are one class each."""
    classes = np.sort(random_classes(1000, 5, seed=0))
    deal = deal_quantity_skew(classes, 10, 100.0, 2, generator(0))
    shares = np.bincount(classes) / classes.size
    in_file_order = np.array(
        [np.bincount(part, minlength=5) / part.size for part in np.split(classes, deal.offsets[1:-1])]
    )
    ours = counts_of(deal, classes) / np.diff(deal.offsets)[:, None]

    assert np.abs(in_file_order - shares).max() > 0.5
    assert np.abs(ours - shares).max() < 0.05


def test_gamma_draws_have_the_right_distribution_and_never_underflow() -> None:
    draws = log_gamma_draws(0.7, (200_000,), generator(0))
    tiny = log_gamma_draws(1e-3, (1000, 5), generator(0))

    assert np.exp(draws).mean() == pytest.approx(0.7, rel=0.02)
    assert np.exp(draws).var() == pytest.approx(0.7, rel=0.05)
    assert np.isfinite(tiny).all()
    plain = np.random.default_rng(0).standard_gamma(1e-3, (1000, 5))
    assert (plain == 0).all(axis=1).any()  # contrast: normalising such a row gives nan


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 1000))
def test_largest_remainder_keeps_the_sum_and_rounds_by_less_than_one(
    weights: list[float], total: int
) -> None:
    shares = np.array([weights]) + 1e-3
    shares *= total / shares.sum()
    rounded = largest_remainder(shares, np.array([total]))

    assert rounded.sum() == total
    assert np.abs(rounded - shares).max() < 1 + 1e-9


@given(cases(), st.floats(0, 0.999), seeds)
def test_each_client_gets_its_own_test_split(
    case: tuple[np.ndarray, int, int], fraction: float, seed: int
) -> None:
    classes, _, num_clients = case
    deal = deal_quantity_skew(classes, num_clients, 1.0, 1, generator(seed))
    partition = partition_of(deal, classes, fraction, seed)

    for client_id, share in enumerate(shares_of(deal)):
        train, test = partition.train(client_id), partition.test(client_id)
        assert sorted([*train, *test]) == share.tolist()
        assert train.size >= 1
        if fraction == 0 or share.size < 2:
            assert test.size == 0
        else:
            assert test.size == min(max(np.floor(fraction * share.size + 0.5), 1), share.size - 1)


def test_a_clients_test_split_does_not_depend_on_other_clients() -> None:
    deal = deal_iid(100, 5, None, generator(0))
    alone = Deal(deal.indices[:20], deal.offsets[:2])

    together = split_clients(deal, 100, 0.2, 7)
    single = split_clients(alone, 100, 0.2, 7)
    assert np.array_equal(together[2][:4], single[2])
    other_seed = split_clients(deal, 100, 0.2, 8)
    assert not np.array_equal(together[2], other_seed[2])


def test_a_partition_describes_itself() -> None:
    classes = random_classes(103, 3, seed=0)
    partition = partition_of(deal_length_skew(classes, 3, 10, 1.0, None, generator(0)), classes)
    described = json.loads(json.dumps(partition.to_json(), allow_nan=False))

    assert described["hash"] == partition.fingerprint
    assert described["num_examples"] == 103
    assert described["unique_examples"] == 100
    assert described["unused_examples"] == 3
    assert described["mean_pairwise_overlap"] == 0.0
    assert described["sizes"] == [9] * 10
    assert described["test_sizes"] == [1] * 10
    assert np.sum(described["client_class_counts"]) == 90
    assert (
        described["client_class_counts"][4] == np.bincount(classes[partition.train(4)], minlength=3).tolist()
    )
    assert described["class_counts"] == np.bincount(classes).tolist()
    assert described["class_share_truncated"] == [0.0, 0.0, 1.0]
    assert described["class_edges"] == [0.0, 1.0]
    assert "Dirichlet(1)" in described["notes"]["policy"]


def test_a_partition_of_very_many_clients_lists_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = random_classes(3000, 3, seed=0)
    partition = partition_of(deal_quantity_skew(classes, 300, 1.0, 2, generator(0)), classes)
    everything = partition.to_json()
    assert everything["listed_clients"] is None
    assert len(everything["sizes"]) == 300

    monkeypatch.setattr("fedsim.data.partition.MAX_LISTED_NUMBERS", 5 * 100 + 4)
    described = json.loads(json.dumps(partition.to_json()))
    assert described["listed_clients"] == list(range(0, 300, 3))
    for name in ("sizes", "test_sizes", "client_class_counts"):
        assert described[name] == everything[name][::3]
    assert described["size_summary"] == everything["size_summary"]
    assert everything["size_summary"] == {
        "least": partition.sizes.min(),
        "median": np.median(partition.sizes),
        "mean": partition.sizes.mean(),
        "most": partition.sizes.max(),
    }
    assert described["hash"] == everything["hash"]


def test_overlap_is_that_of_a_loop_over_pairs() -> None:
    shares = [[0, 1, 2, 3], [2, 3, 4, 5], [0, 3, 6, 7]]
    deal = Deal(np.concatenate(shares), np.array([0, 4, 8, 12]))
    partition = partition_of(deal, np.arange(10) % 2, fraction=0.0)
    pairs = [(0, 1), (0, 2), (1, 2)]
    overlap = np.mean([len(set(shares[a]) & set(shares[b])) / 4 for a, b in pairs])

    assert partition.to_json()["mean_pairwise_overlap"] == pytest.approx(overlap)
    assert partition.to_json()["unused_examples"] == 2


def test_the_fingerprint_sees_who_holds_what() -> None:
    classes = random_classes(100, 3, seed=0)
    deal = deal_iid(100, 5, None, generator(0))
    fingerprints = {
        partition_of(deal, classes).fingerprint,
        partition_of(deal, classes, seed=1).fingerprint,
        partition_of(deal_iid(100, 5, None, generator(1)), classes).fingerprint,
        partition_of(Deal(deal.indices, np.array([0, 30, 40, 60, 80, 100])), classes).fingerprint,
    }

    assert len(fingerprints) == 4
    assert partition_of(deal, classes).fingerprint in fingerprints


def test_a_client_that_is_not_there_is_refused() -> None:
    partition = partition_of(deal_iid(100, 5, None, generator(0)), random_classes(100, 3, seed=0))

    for client_id in (-1, 5):
        with pytest.raises(IndexError):
            partition.train(client_id)


def test_a_hundred_thousand_clients_are_a_few_arrays() -> None:
    classes = np.arange(500_000) % 5
    for deal in (
        deal_length_skew(classes, 5, 100_000, 1.0, None, generator(0)),
        deal_quantity_skew(classes, 100_000, 1.0, 2, generator(0)),
    ):
        partition = partition_of(deal, classes)
        assert partition.num_clients == 100_000
        assert partition.sizes.min() >= 1
        assert len(json.dumps(partition.to_json())) < 1_500_000


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: equal_share(10, 11, None), "data.partition.num_clients must be at most .* 10, got 11"),
        (lambda: equal_share(10, 3, 4), "data.partition.examples_per_client must be at most 3 .* got 4"),
        (lambda: deal_iid(3, 4, None, generator(0)), "data.partition.num_clients"),
        (
            lambda: deal_length_skew(np.array([0, 1, 1]), 2, 4, 1.0, None, generator(0)),
            "data.partition.num_clients",
        ),
        (
            lambda: deal_quantity_skew(np.zeros(10, dtype=np.int64), 4, 1.0, 3, generator(0)),
            "data.partition.min_examples must be at most 2 .* got 3",
        ),
        (
            lambda: deal_quantity_skew(np.zeros(3, dtype=np.int64), 4, 1.0, 1, generator(0)),
            "data.partition.num_clients must be at most .* 3, got 4",
        ),
    ],
)
def test_too_small_a_corpus_is_refused(attempt: Callable, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        attempt()
    assert "lower" in str(raised.value)
    assert "\n" not in str(raised.value)
