"""flexlora_delta and flexlora_partitioned: what FlexLoRA does, without its decay."""

import numpy as np
import pytest
import torch

from fedsim.aggregation.flexlora import FlexLora
from fedsim.aggregation.flexlora_delta import FlexLoraDelta
from fedsim.aggregation.flexlora_partitioned import FlexLoraPartitioned, partitioned_sum
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import initial_adapter
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, make_federation, make_report, one_round, random_adapter, stream

BOTH_KINDS = pytest.mark.parametrize("kind", [FlexLoraDelta, FlexLoraPartitioned])
MIXED = {k: dict.fromkeys(TARGETS, rank) for k, rank in enumerate((4, 2, 2, 1))}


def start(max_rank: int = 4) -> ServerState:
    f = make_federation(max_rank)
    return ServerState(0, initial_adapter(TARGETS, f.max_ranks, f.scaling, f.seed, torch.float64))


def product(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.numpy() @ factors.A.numpy()


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def learning(seed: int):
    """Adds noise to what a client received."""

    def train(client_id: int, received: AdapterState) -> AdapterState:
        generator = torch.Generator().manual_seed(100 * seed + client_id)
        return received.map(
            lambda t: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=torch.float64)
        )

    return train


def trained_state(strategy, rounds: int = 1) -> ServerState:
    state = start()
    for seed in range(rounds):
        state = one_round(strategy, state, MIXED, learning(seed)).state
    return state


@BOTH_KINDS
def test_without_training_nothing_decays(kind):
    strategy = kind(make_federation(4))
    state = trained_state(strategy, 3)
    after = one_round(strategy, state, MIXED).state
    decayed = one_round(FlexLora(make_federation(4)), state, MIXED).state
    for module, factors in state.adapter.items():
        np.testing.assert_allclose(product(after.adapter[module]), product(factors), atol=1e-9)
        assert np.linalg.norm(product(decayed.adapter[module]) - product(factors)) > 1e-3


@BOTH_KINDS
def test_clients_of_one_rank_that_is_the_largest_make_it_flexlora(kind):
    """For the first round, and for any round of the partitioned one."""
    ranks = {k: dict.fromkeys(TARGETS, 4) for k in range(3)}
    strategy, plain = kind(make_federation(4)), FlexLora(make_federation(4))
    mine, theirs = (one_round(s, start(), ranks, learning(1)).state for s in (strategy, plain))
    for module, factors in mine.adapter.items():
        np.testing.assert_allclose(product(factors), product(theirs.adapter[module]), atol=1e-10)


@BOTH_KINDS
def test_one_client_keeps_its_product(kind):
    strategy = kind(make_federation(4))
    state = trained_state(strategy)
    seen = {}

    def train(client_id: int, received: AdapterState) -> AdapterState:
        seen["trained"] = learning(9)(client_id, received)
        return seen["trained"]

    after = one_round(strategy, state, {0: MIXED[0]}, train).state
    for module, factors in strategy.download(after, MIXED[0]).items():
        before = state.strategy_state["full"][module] if kind is FlexLoraDelta else None
        lost = 0 if before is None else product(before) - product(state.adapter[module])
        expected = best(product(seen["trained"][module]) + lost, 4)
        np.testing.assert_allclose(product(factors), expected, atol=1e-9)


@BOTH_KINDS
def test_round_0_is_finite_and_keeps_the_initial_adapter(kind):
    aggregated = one_round(kind(make_federation(4)), start(), MIXED)
    assert aggregated.state.adapter.equal(start().adapter)
    for figures in aggregated.by_module.values():
        assert all(np.isfinite(value) for value in figures.values())


@BOTH_KINDS
def test_each_module_by_itself(kind):
    strategy = kind(make_federation(4))
    state = trained_state(strategy)
    cohort = [random_adapter(k, MIXED[k]) for k in MIXED]
    reports = [make_report(k) for k in MIXED]
    whole = strategy.aggregate(state, reports, stream(cohort)).state
    for module in TARGETS:
        part = strategy.aggregate(state, reports, stream(cohort, [module])).state
        assert list(part.adapter) == [module]
        assert all(list(entry) == [module] for entry in part.strategy_state.values())
        assert torch.equal(part.adapter[module].B, whole.adapter[module].B)


def test_delta_adds_the_changes_to_the_full_product():
    """Against the definition, in numpy, over three rounds."""
    strategy = FlexLoraDelta(make_federation(4))
    state = start()
    full = {module: np.zeros((o, i)) for module, (i, o) in TARGETS.items()}
    counts = {0: 10, 1: 20, 2: 5, 3: 5}
    for seed in range(3):
        train = learning(seed)
        for k, ranks in MIXED.items():
            received = strategy.download(state, ranks)
            for module, factors in train(k, received).items():
                full[module] += counts[k] / 40 * (product(factors) - product(received[module]))
        state = one_round(strategy, state, MIXED, train, counts).state
        for module, factors in state.adapter.items():
            np.testing.assert_allclose(
                product(state.strategy_state["full"][module]), full[module], atol=1e-10
            )
            np.testing.assert_allclose(product(factors), best(full[module], 4), atol=1e-10)


def test_delta_keeps_what_no_adapter_can_hold():
    """Truncation to the largest rank is not fed back: the server's product is of full rank."""
    state = trained_state(FlexLoraDelta(make_federation(4)), 3)
    for factors in state.strategy_state["full"].values():
        assert np.linalg.matrix_rank(product(factors)) > 4


def test_blocks_are_averaged_over_the_clients_that_hold_them():
    server = random_adapter(9, 4)
    cohort = [random_adapter(k, ranks) for k, ranks in MIXED.items()]
    weights = (0.4, 0.1, 0.3, 0.2)
    for module in TARGETS:
        expected = 0.0
        for j in range(4):
            held = [(p, a[module]) for p, a in zip(weights, cohort, strict=True) if a[module].rank > j]
            for p, f in held:
                term = f.scaling * np.outer(f.B.numpy()[:, j], f.A.numpy()[j])
                expected = expected + p / sum(q for q, _ in held) * term
        found = partitioned_sum(server[module], [a[module] for a in cohort], weights)
        np.testing.assert_allclose(found.dense(), expected, atol=1e-10)


def test_rows_that_no_client_of_the_cohort_holds_stay():
    strategy = FlexLoraPartitioned(make_federation(4))
    state = trained_state(strategy)
    after = one_round(strategy, state, {1: MIXED[1], 3: MIXED[3]}).state
    for module, factors in state.adapter.items():
        np.testing.assert_allclose(product(after.adapter[module]), product(factors), atol=1e-10)


def test_a_block_whose_holders_have_no_examples_stays():
    server = random_adapter(9, 4)["layers.1.fc1"]
    cohort = [random_adapter(k, MIXED[k])["layers.1.fc1"] for k in (0, 1)]
    found = partitioned_sum(server, cohort, (0.0, 1.0)).dense()
    expected = product(cohort[1]) + server.scaling * server.B[:, 2:].numpy() @ server.A[2:].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-10)
