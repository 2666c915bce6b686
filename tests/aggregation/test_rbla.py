"""RBLA: each rank row is a mean over those that hold it."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.hetlora import HetLoraNaive
from fedsim.aggregation.rbla import Rbla, mean_over_holders
from fedsim.errors import AggregationError
from fedsim.lora.initial import ScalingRule, initial_adapter
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

RULE = ScalingRule(16.0)


def ranks_of(lora_rank):
    return dict.fromkeys(TARGETS, lora_rank)


def row_by_row(cohort, weights, bank):
    """The published rule in plain loops: A and s * B."""
    down, up = bank.A.numpy().copy(), bank.scaling * bank.B.numpy()
    for j in range(bank.rank):
        holders = [(w, f) for w, f in zip(weights, cohort, strict=True) if f.rank > j]
        total = sum(w for w, _ in holders)
        if total > 0:
            down[j] = sum(w * f.A.numpy()[j] for w, f in holders) / total
            up[:, j] = sum(w * f.scaling * f.B.numpy()[:, j] for w, f in holders) / total
    return down, up


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_equals_plain_loops_for_any_ranks(ranks, seed):
    counts = np.random.default_rng(seed).integers(0, 50, len(ranks))
    counts[0] += 1
    bank = random_adapter(seed + 99, 16)
    cohort = [random_adapter(seed + k, rank) for k, rank in enumerate(ranks)]
    reports = [make_report(k, int(n)) for k, n in enumerate(counts)]
    after = Rbla(make_federation(16)).aggregate(ServerState(0, bank), reports, stream(cohort)).state.adapter
    for module, factors in after.items():
        down, up = row_by_row([a[module] for a in cohort], counts / counts.sum(), bank[module])
        np.testing.assert_allclose(factors.A, down, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(factors.scaling * factors.B, up, rtol=1e-10, atol=1e-12)


def test_nothing_learned_keeps_the_function():
    state = ServerState(0, random_adapter(0))
    ranks = {0: ranks_of(1), 1: ranks_of(2), 2: ranks_of(3)}
    after = one_round(Rbla(make_federation()), state, ranks, num_examples={0: 90, 1: 9, 2: 1}).state
    for module, product in products(after.adapter).items():
        np.testing.assert_allclose(product, products(state.adapter)[module], rtol=1e-12, atol=1e-12)


def test_contrast_zero_padding_shrinks_what_few_hold():
    state, ranks = ServerState(0, random_adapter(0)), {0: ranks_of(1), 1: ranks_of(4)}
    padded = one_round(HetLoraNaive(make_federation()), state, ranks).state
    for module, product in products(padded.adapter).items():
        assert not np.allclose(product, products(state.adapter)[module], rtol=1e-1)


def test_rows_that_nobody_holds_keep_the_servers_bits():
    state = ServerState(0, random_adapter(0, dtype=torch.float32))
    ranks = {0: ranks_of(1), 1: ranks_of(2)}
    after = one_round(Rbla(make_federation()), state, ranks, learns_noise(2)).state
    for module, factors in after.adapter.items():
        assert torch.equal(factors.A[2:], state.adapter[module].A[2:])
        assert torch.equal(factors.B[:, 2:], state.adapter[module].B[:, 2:])
        assert not torch.equal(factors.A[:2], state.adapter[module].A[:2])


@pytest.mark.parametrize("lora_rank", [1, 4])
def test_one_client_is_local_training_in_its_rows(lora_rank):
    strategy, state = Rbla(make_federation()), ServerState(0, random_adapter(0))
    after = one_round(strategy, state, {2: ranks_of(lora_rank)}, learns_noise(4)).state
    local = learns_noise(4)(2, strategy.download(state, ranks_of(lora_rank)))
    back = strategy.download(after, ranks_of(lora_rank))
    for module, product in products(back).items():
        np.testing.assert_allclose(product, products(local)[module], rtol=1e-12, atol=1e-12)


def test_another_alpha_of_one_clients_product_changes_nothing():
    state, ranks = ServerState(0, random_adapter(0)), {0: ranks_of(2), 1: ranks_of(4), 2: ranks_of(3)}
    strategy = Rbla(make_federation())
    plain = one_round(strategy, state, ranks, learns_noise(3)).state
    other = one_round(strategy, state, ranks, learns_noise(3, {0: 0.25, 2: 5.0})).state
    for module, product in products(plain.adapter).items():
        np.testing.assert_allclose(products(other.adapter)[module], product, rtol=1e-12, atol=1e-12)


def test_no_update_at_all_stays_finite():
    state = ServerState(0, initial_adapter(TARGETS, ranks_of(4), RULE, 0))
    after = one_round(Rbla(make_federation()), state, {0: ranks_of(4), 1: ranks_of(2)}).state
    for module, factors in after.adapter.items():
        torch.testing.assert_close(factors.A, state.adapter[module].A)
        assert not factors.B.any()


def test_ranks_beyond_the_bank_are_refused():
    bank = random_adapter(0, 2)["layers.1.fc1"]
    with pytest.raises(AggregationError, match="at most 2"):
        mean_over_holders([random_adapter(1, 3)["layers.1.fc1"]], [1.0], bank)
    with pytest.raises(AggregationError, match="one weight for each client, got 0 for 0"):
        mean_over_holders([], [], bank)
