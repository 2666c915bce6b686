"""FLoRA: the exact mean of products, in the base."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.flora import Flora
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
    restated,
    stream,
)

RULE = ScalingRule(16.0)


def ranks_of(lora_rank):
    return dict.fromkeys(TARGETS, lora_rank)


def fresh_state(lora_rank=4, dtype=torch.float64):
    return ServerState(0, initial_adapter(TARGETS, ranks_of(lora_rank), RULE, 0, dtype))


def aggregate(cohort, counts, largest=4, state=None):
    reports = [make_report(k, n) for k, n in enumerate(counts)]
    return Flora(make_federation(largest)).aggregate(state or fresh_state(), reports, stream(cohort)).state


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5), st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_base_gains_the_mean_of_the_products(ranks, seed, one_is_zero):
    counts = np.random.default_rng(seed).integers(1, 50, len(ranks)).tolist()
    cohort = [random_adapter(seed + k, rank) for k, rank in enumerate(ranks)]
    if one_is_zero:
        cohort[0] = cohort[0].map(torch.zeros_like)
    state = aggregate(cohort, counts)
    for module, gained in products(state.base_update).items():
        mean = sum(n / sum(counts) * products(a)[module] for n, a in zip(counts, cohort, strict=True))
        np.testing.assert_allclose(gained, mean, rtol=1e-10, atol=1e-10)
    assert not any(factors.B.any() for factors in state.adapter.values())


def test_rounds_add_up_also_beyond_full_rank():
    strategy, state, total = Flora(make_federation()), fresh_state(), dict.fromkeys(TARGETS, 0.0)
    tiers = {0: ranks_of(1), 1: ranks_of(3), 4: {"layers.0.q_proj": 4, "layers.1.fc1": 2}}
    for r in range(4):
        train = learns_noise(r)
        for k, ranks in tiers.items():
            start = strategy.plan(state, Client(k, ranks), strategy.download(state, ranks)).start
            for module, product in products(train(k, start)).items():
                total[module] = total[module] + product / 3
        state = one_round(strategy, state, tiers, train).state
    for module, gained in products(state.base_update).items():
        np.testing.assert_allclose(gained, total[module], rtol=1e-10, atol=1e-10)
        assert state.base_update[module].rank <= min(TARGETS[module])


def test_each_client_starts_afresh_at_its_rank():
    strategy, state, starts = Flora(make_federation()), fresh_state(dtype=torch.float32), {}
    for r in (0, 1):
        for k, rank in ((0, 2), (1, 4), (2, 4)):
            now = ServerState(r, state.adapter)
            received = strategy.download(now, ranks_of(rank))
            start = strategy.plan(now, Client(k, ranks_of(rank)), received).start
            again = strategy.plan(now, Client(k, ranks_of(rank)), received).start
            assert start.equal(again)
            for factors in start.values():
                assert (factors.rank, factors.scaling, factors.A.dtype) == (rank, RULE(rank), torch.float32)
                assert not factors.B.any()
                assert factors.A.any()
            starts[r, k] = start["layers.1.fc1"].A[:2]
    pairs = [(a, b) for a in starts for b in starts if a < b]
    assert not any(torch.equal(starts[a], starts[b]) for a, b in pairs)


def test_nothing_learned_adds_nothing():
    strategy, state = Flora(make_federation()), aggregate([random_adapter(1)], [1])
    after = one_round(strategy, state, {0: ranks_of(2), 1: ranks_of(4)}).state
    for module, gained in products(after.base_update).items():
        np.testing.assert_allclose(gained, products(state.base_update)[module], rtol=1e-12)
    assert not any(factors.delta_weight().any() for factors in strategy.export(after).values())


def test_one_clients_product_is_kept():
    trained = random_adapter(5, 3)
    for module, gained in products(aggregate([trained], [7]).base_update).items():
        np.testing.assert_allclose(gained, products(trained)[module], rtol=1e-12, atol=1e-12)


def test_another_alpha_of_one_clients_product_changes_nothing():
    cohort = [random_adapter(0, 2), random_adapter(1, 4)]
    plain = products(aggregate(cohort, [1, 3]).base_update)
    other = products(aggregate([restated(cohort[0], 0.125), cohort[1]], [1, 3]).base_update)
    for module in TARGETS:
        np.testing.assert_allclose(other[module], plain[module], rtol=1e-12, atol=1e-12)


def test_contrast_published_errors_are_not_this():
    """The first client alone (times its weight), and products without alpha / r."""
    cohort, counts = [random_adapter(0, 2), random_adapter(1, 4), random_adapter(2, 1)], [10, 30, 5]
    for module, gained in products(aggregate(cohort, counts).base_update).items():
        first = 10 / 45 * products(cohort[0])[module]
        unscaled = sum(
            n / 45 * a[module].B.numpy() @ a[module].A.numpy() for n, a in zip(counts, cohort, strict=True)
        )
        assert np.linalg.norm(gained - first) > 0.5 * np.linalg.norm(gained)
        assert np.linalg.norm(gained - unscaled) > 0.5 * np.linalg.norm(gained)


def test_a_client_receives_the_last_stack():
    strategy, state = Flora(make_federation()), fresh_state(dtype=torch.float32)
    client, received = Client(0, ranks_of(2)), strategy.download(state, ranks_of(2))
    assert strategy.plan(state, client, received).downlink_bytes == 0
    for tiers in ({0: 2, 1: 4}, {3: 1}):  # the second round's stack, not all so far
        state = one_round(strategy, state, {k: ranks_of(r) for k, r in tiers.items()}, learns_noise(1)).state
        values = sum(tiers.values()) * sum(sum(sizes) for sizes in TARGETS.values())
        received = strategy.download(state, ranks_of(2))
        assert strategy.plan(state, client, received).downlink_bytes == 4 * values


@pytest.mark.parametrize("lora_rank", [1, 4])
def test_what_is_downloaded_has_no_product(lora_rank):
    received = Flora(make_federation()).download(fresh_state(), ranks_of(lora_rank))
    assert {factors.rank for factors in received.values()} == {lora_rank}
    assert not any(factors.B.any() for factors in received.values())


def test_golden_vectors_of_published_code(shared):
    """The stack that FLoRA's repository built, and the mean of products; both without alpha / r."""
    facts = json.loads((shared / "golden" / "aggregation.json").read_text())
    golden = np.load(shared / "golden" / "aggregation.npz")
    cohort = [
        AdapterState(
            {
                m: LoraFactors(
                    torch.from_numpy(golden[f"in/c{k}/{m}/A"]),
                    torch.from_numpy(golden[f"in/c{k}/{m}/B"]),
                    1.0,
                )
                for m in facts["modules"]
            }
        )
        for k in range(len(facts["ranks"]))
    ]
    targets = dict.fromkeys(facts["modules"], (facts["d_in"], facts["d_out"]))
    state = ServerState(0, random_adapter(0, 8, targets, dtype=torch.float32))
    gained = products(aggregate(cohort, facts["num_samples"], state=state).base_update)
    for m in facts["modules"]:
        stack = golden[f"flora_stack/{m}/B"].astype(float) @ golden[f"flora_stack/{m}/A"].astype(float)
        np.testing.assert_allclose(gained[m], stack, rtol=0, atol=1e-6)
        np.testing.assert_allclose(gained[m], golden[f"sum_p_BA/{m}"], rtol=0, atol=1e-6)
