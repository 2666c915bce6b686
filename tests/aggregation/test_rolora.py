"""RoLoRA: one factor per round, each round exact."""

import numpy as np
import pytest
import torch

from fedsim.aggregation.rolora import RoLora
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import ONLY_A, ONLY_B, Client
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, learns_noise, make_federation, one_round, products, random_adapter

RANKS = dict.fromkeys(TARGETS, 4)
COUNTS = {0: 20, 3: 10, 9: 70}


def local_result(start, client_id, side):
    """What the client has after training one side."""
    trained = learns_noise(5)(client_id, start)
    return AdapterState(
        {
            m: LoraFactors(f.A, trained[m].B, f.scaling)
            if side == "B"
            else LoraFactors(trained[m].A, f.B, f.scaling)
            for m, f in start.items()
        }
    )


@pytest.mark.parametrize(("round_index", "side"), [(0, "B"), (1, "A"), (2, "B"), (7, "A")])
def test_each_round_is_the_exact_mean_of_the_products(round_index, side):
    state = ServerState(round_index, random_adapter(1))
    after = one_round(
        RoLora(make_federation()), state, dict.fromkeys(COUNTS, RANKS), learns_noise(5), COUNTS
    ).state
    other = "A" if side == "B" else "B"
    for module, product in products(after.adapter).items():
        mean = sum(
            n / 100 * products(local_result(state.adapter, k, side))[module] for k, n in COUNTS.items()
        )
        np.testing.assert_allclose(product, mean, rtol=1e-11, atol=1e-11)
        assert torch.equal(getattr(after.adapter[module], other), getattr(state.adapter[module], other))
        assert not torch.equal(getattr(after.adapter[module], side), getattr(state.adapter[module], side))


def test_the_up_projection_comes_first_because_it_starts_at_zero():
    strategy = RoLora(make_federation())
    state = ServerState(0, initial_adapter(TARGETS, RANKS, ScalingRule(16.0), 0))
    plan = strategy.plan(state, Client(0, RANKS), strategy.download(state, RANKS))
    assert plan.trains == strategy.sends(state) == ONLY_B
    # the gradient of A is scaling * B^T G, whatever the gradient G of the product
    for factors in plan.start.values():
        gradient = factors.scaling * factors.B.T @ torch.ones(factors.B.shape[0], factors.A.shape[1])
        assert not gradient.any()
    state = ServerState(1, state.adapter)
    assert strategy.plan(state, Client(0, RANKS), state.adapter).trains == strategy.sends(state) == ONLY_A


@pytest.mark.parametrize("round_index", [0, 1])
def test_one_client_and_nothing_learned_keep_the_bits(round_index):
    strategy = RoLora(make_federation())
    state = ServerState(round_index, random_adapter(0, dtype=torch.float32))
    assert one_round(strategy, state, {3: RANKS}).state.adapter.equal(state.adapter)
    after = one_round(strategy, state, {3: RANKS}, learns_noise(5)).state
    assert after.adapter.equal(local_result(state.adapter, 3, "BA"[round_index]))


def test_contrast_both_factors_at_once_would_not_be_exact():
    trained = [random_adapter(k)["layers.1.fc1"] for k in range(3)]
    averaged = sum(f.B for f in trained) / 3 @ (sum(f.A for f in trained) / 3)
    assert not torch.allclose(averaged, sum(f.B @ f.A for f in trained) / 3, rtol=1e-1)
