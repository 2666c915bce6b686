"""HetLoRA, naive and full: padding, Frobenius weights, decay, self-pruning."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.hetlora import HetLora, HetLoraNaive, frobenius_weights, pruned_rank, tail_size
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
    restated,
    stream,
)

RULE = ScalingRule(16.0)


def ranks_of(lora_rank):
    return dict.fromkeys(TARGETS, lora_rank)


def padded(matrix, rank, axis):
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - matrix.shape[axis])
    return np.pad(matrix, missing)


def padded_mean_product(cohort, weights, rank):
    """Mean of zero-padded factors in numpy, with sqrt-free scaling: s_k goes into B."""
    down = sum(w * padded(f.A.numpy(), rank, 0) for w, f in zip(weights, cohort, strict=True))
    up = sum(w * f.scaling * padded(f.B.numpy(), rank, 1) for w, f in zip(weights, cohort, strict=True))
    return up @ down


shapes = st.tuples(
    st.integers(1, 12), st.lists(st.integers(1, 16), min_size=1, max_size=5), st.integers(0, 2**31 - 1)
)


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_naive_equals_numpy_for_any_ranks(shape):
    extra, ranks, seed = shape
    largest = max(*ranks, extra)  # beyond both sides of both modules, too
    counts = np.random.default_rng(seed).integers(1, 50, len(ranks)).tolist()
    cohort = [random_adapter(seed % 2**20 + k, rank) for k, rank in enumerate(ranks)]
    strategy = HetLoraNaive(make_federation(largest))
    reports = [make_report(k, n) for k, n in enumerate(counts)]
    state = strategy.aggregate(ServerState(0, random_adapter(1, largest)), reports, stream(cohort)).state
    weights = [n / sum(counts) for n in counts]
    for module, product in products(state.adapter).items():
        assert state.adapter[module].scaling == RULE(largest)
        expected = padded_mean_product([a[module] for a in cohort], weights, largest)
        np.testing.assert_allclose(product, expected, rtol=1e-10, atol=1e-10)


def test_nothing_learned_multiplies_each_row_by_the_squared_weight_of_its_holders():
    """Rank row j is multiplied by P_j in both factors, so its product by P_j^2."""
    tiers, counts = {0: 1, 1: 2, 2: 4, 3: 4}, {0: 10, 1: 30, 2: 5, 3: 15}
    state = ServerState(0, random_adapter(0))
    after = one_round(
        HetLoraNaive(make_federation()),
        state,
        {k: ranks_of(r) for k, r in tiers.items()},
        num_examples=counts,
    ).state
    held = [sum(counts[k] for k, r in tiers.items() if r > j) / 60 for j in range(4)]
    assert held == [1, 50 / 60, 20 / 60, 20 / 60]
    for module, product in products(after.adapter).items():
        factors = state.adapter[module]
        expected = factors.scaling * sum(
            held[j] ** 2 * np.outer(factors.B[:, j], factors.A[j]) for j in range(4)
        )
        np.testing.assert_allclose(product, expected, rtol=1e-12, atol=1e-12)


def test_a_client_starts_from_the_first_rows_of_the_servers_product():
    state = ServerState(0, random_adapter(0))
    received = HetLoraNaive(make_federation()).download(state, {"layers.0.q_proj": 2, "layers.1.fc1": 3})
    for module, rank in (("layers.0.q_proj", 2), ("layers.1.fc1", 3)):
        server = state.adapter[module]
        assert (received[module].rank, received[module].scaling) == (rank, RULE(rank))
        expected = server.scaling * server.B[:, :rank] @ server.A[:rank]
        torch.testing.assert_close(received[module].delta_weight(), expected)


@pytest.mark.parametrize("kind", [HetLoraNaive, HetLora])
@pytest.mark.parametrize("lora_rank", [1, 3, 4])
def test_one_clients_product_is_kept(kind, lora_rank):
    state = ServerState(0, random_adapter(0))
    trained = random_adapter(5, lora_rank).map(lambda x: 3 * x)  # a larger tail, so that nothing is pruned
    after = one_round(kind(make_federation()), state, {2: ranks_of(lora_rank)}, lambda *_: trained).state
    for module, product in products(after.adapter).items():
        np.testing.assert_allclose(product, products(trained)[module], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [HetLoraNaive, HetLora])
def test_another_alpha_of_one_clients_product_changes_nothing(kind):
    state, ranks = ServerState(0, random_adapter(0)), {0: ranks_of(2), 1: ranks_of(4), 2: ranks_of(3)}
    strategy = kind(make_federation())
    plain = one_round(strategy, state, ranks, learns_noise(3)).state
    other = one_round(strategy, state, ranks, learns_noise(3, {0: 0.25, 2: 5.0})).state
    for module, product in products(plain.adapter).items():
        np.testing.assert_allclose(products(other.adapter)[module], product, rtol=1e-12, atol=1e-12)


def test_contrast_a_lost_scaling_is_noticed():
    state = ServerState(0, random_adapter(0))
    cohort = [random_adapter(1, 2), random_adapter(2, 4)]
    lost = [AdapterState({m: LoraFactors(f.A, f.B, RULE(4)) for m, f in a.items()}) for a in cohort]
    strategy, reports = HetLoraNaive(make_federation()), [make_report(0), make_report(1)]
    right = products(strategy.aggregate(state, reports, stream(cohort)).state.adapter)
    wrong = products(strategy.aggregate(state, reports, stream(lost)).state.adapter)
    for module in TARGETS:
        assert not np.allclose(right[module], wrong[module], rtol=1e-1)


@pytest.mark.parametrize("kind", [HetLoraNaive, HetLora])
def test_no_update_at_all_stays_finite(kind):
    """B is zero in every client, as in a first round without learning."""
    state = ServerState(0, initial_adapter(TARGETS, ranks_of(4), RULE, 0))
    after = one_round(kind(make_federation()), state, {0: ranks_of(4), 1: ranks_of(2)}).state
    for factors in after.adapter.values():
        assert torch.isfinite(factors.A).all()
        assert factors.A.any()
        assert not factors.B.any()


@pytest.mark.parametrize("kind", [HetLoraNaive, HetLora])
def test_equal_clients_are_a_fixed_point(kind):
    state, trained = ServerState(0, random_adapter(0)), random_adapter(5).map(lambda x: 3 * x)
    ranks = dict.fromkeys(range(3), ranks_of(4))
    after = one_round(kind(make_federation()), state, ranks, lambda *_: trained, {0: 1, 1: 5, 2: 9}).state
    for module, product in products(after.adapter).items():
        np.testing.assert_allclose(product, products(trained)[module], rtol=1e-12, atol=1e-12)


def test_ranks_beyond_the_largest_tier_are_refused():
    state = ServerState(0, random_adapter(0))
    with pytest.raises(AggregationError, match="at most 4, the largest of any resource tier, got 5"):
        HetLoraNaive(make_federation()).aggregate(state, [make_report(0)], stream([random_adapter(1, 5)]))


def test_frobenius_weights_equal_numpy():
    cohort = [random_adapter(k, rank)["layers.1.fc1"] for k, rank in enumerate((1, 3, 12))]
    cohort.append(cohort[0].map(torch.zeros_like))
    norms = [np.linalg.norm(f.scaling * f.B.numpy() @ f.A.numpy()) for f in cohort]
    np.testing.assert_allclose(frobenius_weights(cohort), np.array(norms) / sum(norms), rtol=1e-10)
    assert frobenius_weights(cohort[-1:] * 4) == (0.25,) * 4
    np.testing.assert_allclose(
        frobenius_weights([f.map(lambda x: 10 * x) for f in cohort]), frobenius_weights(cohort), rtol=1e-10
    )


def test_full_weighs_by_the_norm_of_each_module():
    cohort = [random_adapter(1, 2), random_adapter(2, 4).map(lambda x: 2 * x)]
    reports = [make_report(0, 1000), make_report(1, 1)]  # examples have no effect
    strategy = HetLora(make_federation())
    result = strategy.aggregate(ServerState(0, random_adapter(0)), reports, stream(cohort))
    for module, product in products(result.state.adapter).items():
        norms = np.array([np.linalg.norm(products(a)[module]) for a in cohort])
        expected = padded_mean_product([a[module] for a in cohort], norms / norms.sum(), 4)
        np.testing.assert_allclose(product, expected, rtol=1e-10, atol=1e-10)
        assert result.by_module[module]["hetlora/mean_rank"] == 3


@pytest.mark.parametrize(
    ("lora_rank", "factor", "min_rank", "expected"),
    [(8, 0.99, 1, 7), (30, 0.99, 1, 29), (200, 0.99, 1, 198), (1, 0.99, 1, 1), (8, 1.0, 1, 8), (100, 0.29, 1, 29),
     (8, 0.5, 6, 6), (4, 0.5, 6, 4), (10, 0.9, 1, 9), (2, 0.01, 1, 1)],
)  # fmt: skip
def test_pruned_rank(lora_rank, factor, min_rank, expected):
    assert pruned_rank(lora_rank, factor, min_rank) == expected


def test_contrast_rounding_instead_of_the_floor_leaves_an_empty_tail():
    assert round(0.99 * 8) == 8
    assert pruned_rank(8, 0.99, 1) == 7


def test_the_penalty_is_about_the_rows_that_pruning_would_remove():
    strategy = HetLora(make_federation(8), pruning_factor=0.7, tail_penalty=0.25)
    state = ServerState(0, random_adapter(0, 8))
    client = Client(0, {"layers.0.q_proj": 8, "layers.1.fc1": 1})
    plan = strategy.plan(state, client, strategy.download(state, client.lora_ranks))
    assert plan.tail_penalty.weight == 0.25
    assert plan.tail_penalty.first_rows == {"layers.0.q_proj": 5, "layers.1.fc1": 1}
    without = HetLora(make_federation(8), tail_penalty=0.0)
    assert without.plan(state, client, without.download(state, client.lora_ranks)).tail_penalty is None


def shrinks_tail(factor):
    """Training that multiplies rank row 7 of A by `factor`."""

    def train(client_id, start):
        return AdapterState(
            {m: LoraFactors(torch.cat([f.A[:7], factor * f.A[7:]]), f.B, f.scaling) for m, f in start.items()}
        )

    return train


def test_a_smaller_tail_prunes_the_client_for_good():
    strategy, state, kept = HetLora(make_federation(8)), ServerState(0, random_adapter(0, 8)), {}
    start = strategy.download(state, ranks_of(8))
    result = one_round(strategy, state, {0: ranks_of(8)}, shrinks_tail(0.9), client_states=kept)
    assert kept[0]["lora_ranks"].dtype == torch.int64
    assert kept[0]["lora_ranks"].tolist() == [7, 7]
    assert all(figures["hetlora/mean_rank"] == 7 for figures in result.by_module.values())
    for module, product in products(result.state.adapter).items():
        factors = start[module]
        np.testing.assert_allclose(product, factors.scaling * factors.B[:, :7] @ factors.A[:7], rtol=1e-12)
        assert not result.state.adapter[module].A[7:].any()
    client = Client(0, ranks_of(8), kept[0])
    plan = strategy.plan(result.state, client, strategy.download(result.state, client.lora_ranks))
    for module, factors in plan.start.items():
        assert (factors.rank, factors.scaling) == (7, RULE(7))
        np.testing.assert_allclose(
            products(plan.start)[module], products(result.state.adapter)[module], rtol=1e-12
        )
    assert strategy.export(result.state, client).equal(plan.start)
    assert set(plan.tail_penalty.first_rows.values()) == {6}


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_a_tail_that_is_not_smaller_stays(factor):
    kept = {}
    state = ServerState(0, random_adapter(0, 8))
    result = one_round(
        HetLora(make_federation(8)), state, {0: ranks_of(8)}, shrinks_tail(factor), client_states=kept
    )
    assert kept == {}
    assert all(figures["hetlora/mean_rank"] == 8 for figures in result.by_module.values())


def test_a_first_round_prunes_nobody():
    """B starts at zero, and nothing is smaller than a tail of zero."""
    kept = {}
    state = ServerState(0, initial_adapter(TARGETS, ranks_of(8), RULE, 0))
    one_round(HetLora(make_federation(8)), state, {0: ranks_of(8)}, learns_noise(0), client_states=kept)
    assert kept == {}


def test_pruning_goes_on_down_to_the_smallest_rank_and_stops():
    strategy = HetLora(make_federation(8), pruning_factor=0.6, min_rank=2)
    state, kept, seen = ServerState(0, random_adapter(0, 8)), {}, []
    for _ in range(4):
        one_round(
            strategy, state, {0: ranks_of(8)}, lambda _, a: a.map(lambda x: 0.9 * x), client_states=kept
        )
        seen.append(kept[0]["lora_ranks"].tolist())
    assert seen == [[4, 4], [2, 2], [2, 2], [2, 2]]


def test_a_factor_of_one_never_prunes():
    kept = {}
    strategy, state = HetLora(make_federation(8), pruning_factor=1.0), ServerState(0, random_adapter(0, 8))
    one_round(strategy, state, {0: ranks_of(8)}, lambda _, a: a.map(torch.zeros_like), client_states=kept)
    assert kept == {}


def test_tail_size_equals_numpy():
    adapter, first = random_adapter(0, 5), {"layers.0.q_proj": 3, "layers.1.fc1": 5}
    factors = adapter["layers.0.q_proj"]
    norms = np.linalg.norm(factors.B.numpy()[:, 3:]) * np.linalg.norm(factors.A.numpy()[3:])
    assert tail_size(adapter, first) == pytest.approx(16 / 5 * norms, rel=1e-12)
    assert tail_size(restated(adapter, 2.0), first) == pytest.approx(16 / 5 * norms, rel=1e-12)


@pytest.mark.parametrize("published", [0, 1])
def test_golden_vectors_of_published_code(shared, published):
    """Means of zero-padded factors: as they are (0), and with sqrt(alpha / r) in each of them (1).

    Both are one representation of clients whose scalings agree: in the first, the published code averages factors
    without any scaling; in the second, factors that carry it. How a scaling is shared between A and B is a choice in
    methods that average factors, so the second is compared in its own representation.
    """
    facts = json.loads((shared / "golden" / "aggregation.json").read_text())
    golden = np.load(shared / "golden" / "aggregation.npz")
    cohort = []
    for k, rank in enumerate(facts["ranks"]):
        root = (facts["alpha"] / rank) ** 0.5 if published else 1.0
        cohort.append(
            AdapterState(
                {
                    m: LoraFactors(
                        root * torch.from_numpy(golden[f"in/c{k}/{m}/A"]),
                        root * torch.from_numpy(golden[f"in/c{k}/{m}/B"]),
                        1.0,
                    )
                    for m in facts["modules"]
                }
            )
        )
    targets = dict.fromkeys(facts["modules"], (facts["d_in"], facts["d_out"]))
    bank = random_adapter(0, 8, targets, lambda _: 1.0, torch.float32)
    reports = [make_report(k, n) for k, n in enumerate(facts["num_samples"])]
    strategy = HetLoraNaive(make_federation(8, targets))
    after = strategy.aggregate(ServerState(0, bank), reports, stream(cohort)).state.adapter
    for m in facts["modules"]:
        np.testing.assert_allclose(after[m].A, golden[f"hetlora_alpha{published}/{m}/A"], atol=1e-6)
        np.testing.assert_allclose(after[m].B, golden[f"hetlora_alpha{published}/{m}/B"], atol=1e-6)
