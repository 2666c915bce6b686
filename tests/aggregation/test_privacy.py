"""The privacy accountant against formulas worked out here: exact ones where they exist, Renyi bounds elsewhere."""

import math

import numpy as np
import pytest

from fedsim.aggregation.privacy import PrivacyAccountant
from fedsim.errors import ConfigError


def phi(x: float) -> float:
    """Standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))


def root(decreasing, low: float, high: float, value: float) -> float:
    """Where a decreasing function takes a value, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > value else (low, middle)
    return high


def gaussian_epsilon(z: float, delta: float) -> float:
    """Exact epsilon of the Gaussian mechanism without sampling (Balle and Wang 2018, Theorem 8)."""

    def spent(epsilon: float) -> float:
        return phi(0.5 / z - epsilon * z) - math.exp(epsilon) * phi(-0.5 / z - epsilon * z)

    return root(spent, 0.0, 600.0, delta)


def sampled_epsilon(q: float, z: float, delta: float) -> float:
    """Exact epsilon of one round: hockey-stick divergence between N(0, z^2) and (1 - q) N(0, z^2) + q N(1, z^2).

    Their ratio rises with x, so each divergence is that of a half-line, from where the ratio is e^epsilon.
    """

    def mixture(x: float) -> float:
        return (1 - q) * phi(x / z) + q * phi((x - 1) / z)

    def spent(epsilon: float) -> float:
        with_client = z * z * math.log((math.exp(epsilon) - (1 - q)) / q) + 0.5
        result = 1 - mixture(with_client) - math.exp(epsilon) * (1 - phi(with_client / z))
        if math.exp(-epsilon) > 1 - q:
            without = z * z * math.log((math.exp(-epsilon) - (1 - q)) / q) + 0.5
            result = max(result, phi(without / z) - math.exp(epsilon) * mixture(without))
        return result

    return root(spent, 1e-9, 50.0, delta)


def renyi(q: float, z: float, order: int) -> float:
    """Renyi divergence of one round at an integer order (Mironov et al. 2019, section 3.3)."""
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + k * math.log(q) + (order - k) * math.log1p(-q) + k * (k - 1) / (2 * z * z)
        for k in range(order + 1)
    ]  # fmt: skip
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def renyi_epsilon(q: float, z: float, rounds: int, delta: float) -> float:
    """Renyi bound with the first, looser conversion (Mironov 2017, Proposition 3)."""
    return min(rounds * renyi(q, z, a) + math.log(1 / delta) / (a - 1) for a in range(2, 200))


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("rounds", [1, 10, 100])
def test_without_sampling_it_is_the_gaussian_mechanism_of_less_noise(z, rounds):
    exact = gaussian_epsilon(z / math.sqrt(rounds), 1e-5)
    got = PrivacyAccountant(1.0, z, 1e-5).epsilon(rounds)
    assert exact * (1 - 1e-4) <= got <= exact * 1.002


@pytest.mark.parametrize(("q", "z"), [(0.1, 1.0), (0.01, 0.6), (0.5, 2.0)])
def test_one_sampled_round_is_exact(q, z):
    exact = sampled_epsilon(q, z, 1e-5)
    assert exact * (1 - 1e-4) <= PrivacyAccountant(q, z, 1e-5).epsilon(1) <= exact * 1.002
    # sampling is worth something
    assert exact < gaussian_epsilon(z, 1e-5)


@pytest.mark.parametrize(("q", "z", "rounds"), [(0.1, 1.0, 100), (0.02, 0.8, 1000), (0.3, 4.0, 200)])
def test_below_an_independent_renyi_bound_but_not_far(q, z, rounds):
    bound = renyi_epsilon(q, z, rounds, 1e-5)
    assert 0.7 * bound < PrivacyAccountant(q, z, 1e-5).epsilon(rounds) < bound


def test_the_published_mnist_example():
    """TensorFlow Privacy's tutorial: 60 epochs of batches of 256, noise 1.1, delta 1e-5: Renyi epsilon 3.01."""
    q, rounds = 256 / 60000, 60 * 60000 // 256
    assert renyi_epsilon(q, 1.1, rounds, 1e-5) == pytest.approx(3.01, abs=0.02)
    # dp-accounting 0.6 with its own grid, which is ten times finer
    assert PrivacyAccountant(q, 1.1, 1e-5).epsilon(rounds) == pytest.approx(2.3825, rel=0.006)


def test_it_grows_with_rounds_and_sampling_and_shrinks_with_noise():
    spent = [PrivacyAccountant(0.1, 1.0, 1e-5).epsilon(rounds) for rounds in (0, 1, 2, 10, 100)]
    assert spent[0] == 0.0
    assert spent == sorted(set(spent))
    assert PrivacyAccountant(0.2, 1.0, 1e-5).epsilon(10) > spent[3]
    assert PrivacyAccountant(0.1, 2.0, 1e-5).epsilon(10) < spent[3]
    assert PrivacyAccountant(0.1, 1.0, 1e-7).epsilon(10) > spent[3]


def test_hardly_any_noise_takes_no_more_memory_and_none_gives_no_guarantee():
    assert 1e5 < PrivacyAccountant(0.1, 0.01, 1e-5).epsilon(1000) < 1e6
    assert PrivacyAccountant(0.1, 0.0, 1e-5).epsilon(1) == math.inf
    assert PrivacyAccountant(0.1, 0.0, 1e-5).epsilon(0) == 0.0


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ((0.0, 1.0, 1e-5), r"must be in \(0, 1\], got 0\.0"),
        ((1.5, 1.0, 1e-5), r"must be in \(0, 1\], got 1\.5"),
        ((0.1, -1.0, 1e-5), r"noise_multiplier must be >= 0"),
        ((0.1, 1.0, 0.0), r"privacy\.delta must be in \(0, 1\), got 0\.0"),
    ],
)
def test_wrong_numbers_are_refused(values, rule):
    with pytest.raises(ConfigError, match=rule):
        PrivacyAccountant(*values)
