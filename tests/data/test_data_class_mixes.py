"""Dirichlet class mixes over clients of any size, and `length_and_quantity`, which draws the sizes too.

N = examples, K = clients, C = classes.
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import class_mixes
from fedsim.data.class_mixes import deal_class_mixes
from fedsim.data.length_and_quantity import deal_length_and_quantity
from fedsim.data.length_skew import deal_length_skew
from fedsim.data.partition import Deal, log_gamma_draws
from fedsim.data.quantity_skew import deal_quantity_skew, draw_sizes
from fedsim.errors import DataError
from fedsim.seeding import numpy_generator

alphas = st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 100.0, 1e300])
seeds = st.integers(0, 1000)


def generator(seed: int) -> np.random.Generator:
    return numpy_generator(seed, "partition")


def unequal_classes(num_examples: int, num_classes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    classes = rng.choice(num_classes, num_examples, p=rng.dirichlet(np.full(num_classes, 2.0)))
    classes[:num_classes] = np.arange(num_classes)
    return rng.permutation(classes)


def counts_of(deal: Deal, classes: np.ndarray) -> np.ndarray:
    shares = np.split(deal.indices, deal.offsets[1:-1])
    return np.array([np.bincount(classes[share], minlength=int(classes.max()) + 1) for share in shares])


@st.composite
def cases(draw: Callable) -> tuple[np.ndarray, int, int]:
    num_classes = draw(st.integers(1, 6))
    num_examples = draw(st.integers(num_classes, 250))
    return (
        unequal_classes(num_examples, num_classes, draw(seeds)),
        num_classes,
        draw(st.integers(1, num_examples)),
    )


@settings(deadline=None)
@given(cases(), alphas, alphas, seeds, st.data())
def test_every_example_goes_to_one_client_and_the_minimum_is_kept(
    case: tuple[np.ndarray, int, int], alpha: float, quantity_alpha: float, seed: int, data
) -> None:
    classes, num_classes, num_clients = case
    minimum = data.draw(st.integers(1, classes.size // num_clients))
    arguments = classes, num_classes, num_clients, alpha, quantity_alpha, minimum
    deal = deal_length_and_quantity(*arguments, generator(seed))

    assert np.array_equal(np.sort(deal.indices), np.arange(classes.size))
    assert np.diff(deal.offsets).min() >= minimum
    assert 0 <= deal.notes["mean_total_variation_drawn_to_realised"] <= 1 + 1e-12
    assert deal.notes["max_total_variation_drawn_to_realised"] <= 1 + 1e-12
    assert np.array_equal(deal_length_and_quantity(*arguments, generator(seed)).indices, deal.indices)


@settings(deadline=None)
@given(cases(), alphas, seeds, st.data())
def test_any_sizes_are_met_with_corpus_like_totals(
    case: tuple[np.ndarray, int, int], alpha: float, seed: int, data
) -> None:
    classes, num_classes, num_clients = case
    spare = classes.size - num_clients
    extra = np.array(data.draw(st.lists(st.integers(0, 9), min_size=num_clients, max_size=num_clients)))
    extra = np.where(np.cumsum(extra) <= spare, extra, 0)
    sizes = np.ones(num_clients, dtype=np.int64) + np.where(np.cumsum(extra) <= spare, extra, 0)
    deal = deal_class_mixes(classes, num_classes, sizes, alpha, generator(seed))

    assert np.array_equal(np.diff(deal.offsets), sizes)
    assert np.unique(deal.indices).size == deal.indices.size
    totals = np.bincount(classes[deal.indices], minlength=num_classes)
    assert np.abs(totals - np.bincount(classes) * sizes.sum() / classes.size).max() < 1


def test_sizes_are_those_of_quantity_skew() -> None:
    classes = unequal_classes(5000, 5, seed=0)
    both = deal_length_and_quantity(classes, 5, 20, 0.1, 0.7, 3, generator(4))
    quantity = deal_quantity_skew(classes, 20, 0.7, 3, generator(4))

    assert np.array_equal(both.offsets, quantity.offsets)


def test_mixes_turn_even_as_alpha_grows_and_pure_as_it_falls() -> None:
    classes = unequal_classes(20_000, 5, seed=3)
    shares = np.bincount(classes) / classes.size

    even = deal_length_and_quantity(classes, 5, 20, 1e6, 1.0, 2, generator(0))
    sizes = np.diff(even.offsets)
    assert np.abs(counts_of(even, classes) - sizes[:, None] * shares).max() < 4 + 0.01 * sizes.max()
    pure = deal_length_and_quantity(classes, 5, 200, 1e-6, 100.0, 2, generator(0))
    largest = counts_of(pure, classes).max(axis=1) / np.diff(pure.offsets)
    assert np.count_nonzero(largest > 0.99) >= 200 - 4  # only C - 1 clients lie between two classes


def test_what_the_corpus_cannot_give_is_stated() -> None:
    """Contrast: one client of half the corpus cannot have the single class that it drew."""
    classes = np.arange(1000) % 5
    sizes = np.array([500] + [50] * 10)
    deal = deal_class_mixes(classes, 5, sizes, 1e-3, generator(0))

    assert deal.notes["max_total_variation_drawn_to_realised"] >= 1 - 200 / 500 - 1e-9
    equal = deal_class_mixes(classes, 5, np.full(1000, 1), 1e6, generator(0))
    assert equal.notes["mean_total_variation_drawn_to_realised"] == pytest.approx(0.8, abs=0.01)


def test_distances_are_to_what_was_drawn_not_to_what_could_be_had() -> None:
    whole = deal_class_mixes(np.arange(1000) % 5, 5, np.array([1000]), 1e-3, generator(0))
    assert whole.notes["max_total_variation_drawn_to_realised"] == pytest.approx(0.8, abs=1e-6), (
        "a client that holds the corpus drew one class of five"
    )
    classes, sizes = unequal_classes(900, 5, seed=2), np.array([400, 20, 150, 60])
    deal = deal_class_mixes(classes, 5, sizes, 0.5, generator(6))
    gammas = np.exp(log_gamma_draws(0.5, (4, 5), generator(6)))
    drawn = gammas / gammas.sum(axis=1, keepdims=True)
    realised = counts_of(deal, classes) / sizes[:, None]
    distances = np.maximum(drawn - realised, 0).sum(axis=1)

    assert deal.notes["mean_total_variation_drawn_to_realised"] == pytest.approx(distances.mean(), rel=1e-9)
    assert deal.notes["max_total_variation_drawn_to_realised"] == pytest.approx(distances.max(), rel=1e-9)


def test_equal_sizes_are_length_skew() -> None:
    classes = unequal_classes(3592, 5, seed=1)
    plain = deal_length_skew(classes, 5, 20, 0.1, 179, generator(2))
    general = deal_class_mixes(classes, 5, np.full(20, 179), 0.1, generator(2))

    assert np.array_equal(plain.indices, general.indices)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 30.0])
def test_sizes_follow_the_dirichlet_distribution(alpha: float) -> None:
    """Mean and variance of a share over draws: 1 / K and (1 / K) (1 - 1 / K) / (K alpha + 1)."""
    num_clients, num_examples = 10, 1_000_000
    draws = [draw_sizes(num_clients, num_examples, alpha, 1, generator(seed))[0] for seed in range(1500)]
    shares = np.array(draws) / num_examples

    assert np.allclose(shares.sum(axis=1), 1)
    variance = (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    assert shares.var() == pytest.approx(variance, rel=0.06)
    assert np.abs(shares.mean(axis=0) - 1 / num_clients).max() < 5 * np.sqrt(variance / 1500)


MANY_CLIENTS, MANY_CLASSES = 1000, 4
MANY_EXAMPLES = np.arange(MANY_CLIENTS * 200) % MANY_CLASSES
"""Equal classes, and enough of each that rounding to whole examples does not show in a client's shares."""


def by_equal_sizes(alpha: float, seed: int) -> Deal:
    return deal_length_skew(MANY_EXAMPLES, MANY_CLASSES, MANY_CLIENTS, alpha, None, generator(seed))


def by_drawn_sizes(alpha: float, seed: int) -> Deal:
    return deal_length_and_quantity(
        MANY_EXAMPLES, MANY_CLASSES, MANY_CLIENTS, alpha, 5.0, 80, generator(seed)
    )


def errors_from_dirichlet(deal: Deal, alpha: float) -> float:
    """How far the variance of a client's class shares is from that of Dirichlet(alpha), in standard errors.

    The variance is (1 / C) (1 - 1 / C) / (C alpha + 1). Clients are drawn independently, so the standard error is that
    of a mean over K clients. That totals are fitted to the corpus takes about 1 / K of the variance, and rounding adds
    1 / (12 n^2) at most, with n >= 80: together less than a third of a standard error.
    """
    shares = counts_of(deal, MANY_EXAMPLES) / np.diff(deal.offsets)[:, None]
    squares = ((shares - 1 / MANY_CLASSES) ** 2).mean(axis=1)
    variance = (1 / MANY_CLASSES) * (1 - 1 / MANY_CLASSES) / (MANY_CLASSES * alpha + 1)
    return float((squares.mean() - variance) / (squares.std() / np.sqrt(MANY_CLIENTS)))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("deal", [by_equal_sizes, by_drawn_sizes])
def test_mixes_follow_the_dirichlet_distribution(deal: Callable[[float, int], Deal], alpha: float) -> None:
    assert abs(errors_from_dirichlet(deal(alpha, 0), alpha)) < 4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("deal", [by_equal_sizes, by_drawn_sizes])
def test_mixes_of_another_alpha_would_be_seen(deal: Callable[[float, int], Deal], alpha: float) -> None:
    """Contrast: three times alpha, or a third of it."""
    assert errors_from_dirichlet(deal(3 * alpha, 0), alpha) < -15
    assert errors_from_dirichlet(deal(alpha / 3, 0), alpha) > 15


def test_too_large_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_mixes, "MAX_CELLS", 99)

    with pytest.raises(
        DataError, match=r"num_clients times the number of classes must be at most 99, got 20 times 5"
    ):
        deal_length_skew(np.arange(100) % 5, 5, 20, 1.0, None, generator(0))
    deal_length_skew(np.arange(100) % 5, 5, 19, 1.0, None, generator(0))


@pytest.mark.parametrize(
    ("num_clients", "minimum", "message"),
    [(4, 3, "min_examples must be at most 2 .* got 3"), (11, 1, "num_clients must be at most .* 10, got 11")],
)
def test_too_small_a_corpus_is_refused(num_clients: int, minimum: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        deal_length_and_quantity(np.arange(10) % 2, 2, num_clients, 1.0, 1.0, minimum, generator(0))
