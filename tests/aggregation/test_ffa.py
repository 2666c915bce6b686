"""FFA-LoRA: exact mean of products over a shared, frozen A."""

import numpy as np
import pytest
import torch

from fedsim.aggregation.ffa import FfaLora
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule
from fedsim.lora.plan import ONLY_B, Client
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
COUNTS = {2: 10, 5: 30, 7: 5}


def with_up_of(shared, other):
    return AdapterState({m: LoraFactors(f.A, other[m].B, f.scaling) for m, f in shared.items()})


def test_equals_the_mean_of_the_products():
    state = ServerState(0, random_adapter(0))
    trained = {k: with_up_of(state.adapter, random_adapter(k)) for k in COUNTS}
    after = one_round(
        FfaLora(make_federation()), state, dict.fromkeys(COUNTS, RANKS), lambda k, _: trained[k], COUNTS
    ).state
    assert after.round_index == 1
    for module, product in products(after.adapter).items():
        mean = sum(n / 45 * products(trained[k])[module] for k, n in COUNTS.items())
        np.testing.assert_allclose(product, mean, rtol=1e-12, atol=1e-12)
        assert torch.equal(after.adapter[module].A, state.adapter[module].A)


def test_contrast_with_a_trained_down_projection_the_mean_would_not_be_exact():
    trained = [random_adapter(k) for k in COUNTS]
    for module in TARGETS:
        averaged = sum(a[module].B for a in trained) / 3 @ (sum(a[module].A for a in trained) / 3)
        exact = sum(a[module].B @ a[module].A for a in trained) / 3
        assert not torch.allclose(averaged, exact, rtol=1e-1)


def test_one_client_and_nothing_learned_keep_the_bits():
    state = ServerState(0, random_adapter(0, dtype=torch.float32))
    strategy = FfaLora(make_federation())
    assert one_round(strategy, state, {3: RANKS}).state.adapter.equal(state.adapter)
    after = one_round(strategy, state, {3: RANKS}, learns_noise(1)).state
    local = learns_noise(1)(3, state.adapter)
    assert after.adapter.equal(with_up_of(state.adapter, local))


def test_only_the_up_projection_trains_and_travels():
    state = ServerState(0, random_adapter(0))
    strategy = FfaLora(make_federation())
    received = strategy.download(state, RANKS)
    plan = strategy.plan(state, Client(1, RANKS), received)
    assert plan.trains == strategy.sends(state) == ONLY_B
    assert plan.downlink_bytes == sum(4 * out * 8 for _, out in TARGETS.values())


def test_another_alpha_of_the_same_products_changes_nothing():
    results = []
    for alpha in (16.0, 4.0):
        adapters = [random_adapter(k, scaling=ScalingRule(alpha)) for k in range(4)]
        rescaled = [
            AdapterState({m: LoraFactors(f.A, f.B * (16.0 / alpha), f.scaling) for m, f in a.items()})
            for a in adapters
        ]
        state = ServerState(0, rescaled[0])
        strategy = FfaLora(make_federation(scaling=ScalingRule(alpha)))
        trained = {k: with_up_of(rescaled[0], rescaled[k]) for k in (1, 2, 3)}
        after = one_round(strategy, state, dict.fromkeys(trained, RANKS), lambda k, _, t=trained: t[k])
        results.append(products(after.state.adapter))
    for module in TARGETS:
        np.testing.assert_allclose(results[0][module], results[1][module], rtol=1e-12)


def test_other_ranks_and_scalings_are_refused():
    state = ServerState(0, random_adapter(0))
    for other in (random_adapter(1, 3), random_adapter(1, scaling=ScalingRule(8.0))):
        with pytest.raises(AggregationError, match="one LoRA rank and scaling"):
            FfaLora(make_federation()).aggregate(state, [make_report(0)], stream([other]))
    with pytest.raises(AggregationError, match="one weight for each client"):
        FfaLora(make_federation()).aggregate(state, [make_report(0)], stream([state.adapter] * 2))
