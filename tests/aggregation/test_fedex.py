"""FedEx-LoRA: averaged factors, and the residual in the base."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.fedex import FedExLora
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import Client
from fedsim.lora.state import ServerState
from tests.cohorts import (
    TARGETS,
    learns_noise,
    make_federation,
    make_report,
    one_round,
    products,
    random_adapter,
    stream,
)

RANKS = dict.fromkeys(TARGETS, 4)


def total(state):
    """Module -> what base and adapter add to the loaded weights."""
    gained = {} if state.base_update is None else products(state.base_update)
    return {module: product + gained.get(module, 0.0) for module, product in products(state.adapter).items()}


def aggregate(cohort, counts, state):
    reports = [make_report(k, n) for k, n in enumerate(counts)]
    return FedExLora(make_federation()).aggregate(state, reports, stream(cohort)).state


@given(st.integers(1, 16), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_base_and_adapter_gain_the_mean_of_the_products(lora_rank, num_clients, seed, one_is_zero):
    counts = np.random.default_rng(seed).integers(1, 50, num_clients).tolist()
    cohort = [random_adapter(seed + k, lora_rank) for k in range(num_clients)]
    if one_is_zero:
        cohort[0] = cohort[0].map(torch.zeros_like)
    state = aggregate(cohort, counts, ServerState(0, random_adapter(1, lora_rank)))
    for module, product in total(state).items():
        weights = [n / sum(counts) for n in counts]
        mean = sum(w * products(a)[module] for w, a in zip(weights, cohort, strict=True))
        np.testing.assert_allclose(product, mean, rtol=1e-9, atol=1e-9)
        down = sum(w * a[module].A.numpy() for w, a in zip(weights, cohort, strict=True))
        np.testing.assert_allclose(state.adapter[module].A, down, rtol=1e-10, atol=1e-12)


def test_every_round_is_exact_on_top_of_the_rounds_before():
    strategy, counts = FedExLora(make_federation()), {0: 10, 4: 30, 5: 5}
    state = ServerState(0, random_adapter(0))
    for r in range(4):
        train = learns_noise(r)
        before = {} if state.base_update is None else products(state.base_update)
        after = one_round(strategy, state, dict.fromkeys(counts, RANKS), train, counts).state
        for module, product in total(after).items():
            mean = sum(n / 45 * products(train(k, state.adapter))[module] for k, n in counts.items())
            np.testing.assert_allclose(product, before.get(module, 0.0) + mean, rtol=1e-9, atol=1e-9)
            assert r == 0 or after.base_update[module].rank <= min(TARGETS[module])
        state = after


def test_float32_is_exact_to_its_rounding():
    cohort = [random_adapter(k, dtype=torch.float32) for k in range(3)]
    state = aggregate(cohort, [1, 1, 1], ServerState(0, cohort[0]))
    for module, product in total(state).items():
        mean = sum(products(a)[module] for a in cohort) / 3
        assert np.linalg.norm(product - mean) < 1e-6 * np.linalg.norm(mean)
        assert state.base_update[module].A.dtype == torch.float32


def test_contrast_published_errors_are_not_this():
    """A residual without alpha / r, and no residual (FedAvg)."""
    cohort = [random_adapter(k) for k in range(3)]
    state = aggregate(cohort, [1, 1, 1], ServerState(0, random_adapter(9)))
    for module in TARGETS:
        mean = sum(products(a)[module] for a in cohort) / 3
        averaged = products(state.adapter)[module]
        residual = products(state.base_update)[module]
        np.testing.assert_allclose(averaged + residual, mean, rtol=1e-10, atol=1e-10)
        unscaled = averaged + residual / state.adapter[module].scaling
        assert np.linalg.norm(unscaled - mean) > 0.3 * np.linalg.norm(mean)
        assert np.linalg.norm(averaged - mean) > 0.3 * np.linalg.norm(mean)


@pytest.mark.parametrize("num_clients", [1, 3])
def test_equal_clients_leave_no_residual(num_clients):
    trained = random_adapter(2)
    state = aggregate([trained] * num_clients, [3] * num_clients, ServerState(0, random_adapter(0)))
    for module, product in products(state.adapter).items():
        np.testing.assert_allclose(product, products(trained)[module], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(products(state.base_update)[module], 0, atol=1e-12)


def test_nothing_learned_keeps_the_function():
    strategy, cohort = FedExLora(make_federation()), dict.fromkeys((0, 1, 2), RANKS)
    state = one_round(strategy, ServerState(0, random_adapter(0)), cohort, learns_noise(1)).state
    after = one_round(strategy, state, cohort).state
    for module, product in total(after).items():
        np.testing.assert_allclose(product, total(state)[module], rtol=1e-10, atol=1e-10)


def test_no_update_at_all_stays_finite():
    state = ServerState(0, initial_adapter(TARGETS, RANKS, ScalingRule(16.0), 0))
    after = one_round(FedExLora(make_federation()), state, dict.fromkeys((0, 1), RANKS)).state
    assert not any(product.any() for product in total(after).values())


def test_another_alpha_of_the_same_products_changes_nothing():
    results = []
    for alpha in (16.0, 4.0):
        cohort = [random_adapter(k, scaling=ScalingRule(alpha)) for k in range(4)]
        cohort = [
            AdapterState({m: LoraFactors(f.A, f.B * (16.0 / alpha), f.scaling) for m, f in a.items()})
            for a in cohort
        ]
        results.append(aggregate(cohort[1:], [1, 2, 3], ServerState(0, cohort[0])))
    for part in (total, lambda state: products(state.base_update)):
        for module in TARGETS:
            np.testing.assert_allclose(
                part(results[0])[module], part(results[1])[module], rtol=1e-9, atol=1e-9
            )


def test_a_client_receives_the_adapter_and_the_last_residual():
    strategy, state = FedExLora(make_federation()), ServerState(0, random_adapter(0, dtype=torch.float32))
    own = state.adapter.num_bytes
    assert strategy.plan(state, Client(0, RANKS), strategy.download(state, RANKS)).downlink_bytes == own
    for size in (3, 2):
        state = one_round(strategy, state, dict.fromkeys(range(size), RANKS), learns_noise(1)).state
        plan = strategy.plan(state, Client(0, RANKS), strategy.download(state, RANKS))
        assert plan.downlink_bytes == own + (size + 1) * own


def test_mixed_ranks_are_refused():
    with pytest.raises(AggregationError, match="one LoRA rank"):
        aggregate([random_adapter(0), random_adapter(1, 3)], [1, 1], ServerState(0, random_adapter(0)))
