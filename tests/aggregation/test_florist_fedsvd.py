"""FLoRIST and FedSVD."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.aggregation.fedsvd import FedSVD
from fedsim.aggregation.florist import Florist
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import initial_adapter
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, make_federation, make_report, one_round, random_adapter, stream


def start(max_rank: int = 4) -> ServerState:
    f = make_federation(max_rank)
    return ServerState(0, initial_adapter(TARGETS, f.max_ranks, f.scaling, f.seed, torch.float64))


def product(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.numpy() @ factors.A.numpy()


def noisy(client_id: int, received: AdapterState) -> AdapterState:
    generator = torch.Generator().manual_seed(client_id)
    return received.map(lambda t: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=torch.float64))


def ranks_of(rank: int) -> dict[str, int]:
    return dict.fromkeys(TARGETS, rank)


@given(st.floats(0.05, 1.0), st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_florist_keeps_the_smallest_rank_with_enough_energy(energy, ranks, seed):
    cohort = [random_adapter(seed + k, rank) for k, rank in enumerate(ranks)]
    strategy = Florist(make_federation(8), energy)
    after = strategy.aggregate(start(8), [make_report(k) for k in range(len(ranks))], stream(cohort)).state
    for module, factors in after.adapter.items():
        mean = sum(product(adapter[module]) for adapter in cohort) / len(cohort)
        U, S, Vh = np.linalg.svd(mean, full_matrices=False)
        share = np.cumsum(S**2) / np.sum(S**2)
        needed = 1 + int(np.argmax(share >= min(energy, 1 - 1e-12)))
        assert factors.rank == needed
        assert factors.scaling == 16 / needed
        expected = U[:, :needed] * S[:needed] @ Vh[:needed]
        np.testing.assert_allclose(product(factors), expected, atol=1e-9)


@pytest.mark.parametrize(("energy", "global_rank"), [(1e-9, 1), (1.0, 9)])
def test_florist_records_what_its_adapter_or_the_largest_client_holds(energy, global_rank):
    """Three clients of rank 3: nine components."""
    cohort = [random_adapter(k, 3) for k in range(3)]
    result = Florist(make_federation(3), energy).aggregate(
        start(3), [make_report(k) for k in range(3)], stream(cohort)
    )
    for module, spectrum in result.spectra.items():
        values = np.linalg.svd(sum(product(adapter[module]) for adapter in cohort) / 3, compute_uv=False)
        assert result.state.adapter[module].rank == global_rank
        np.testing.assert_allclose(spectrum, values[: max(3, global_rank)], rtol=1e-9)


def test_florist_gives_clients_no_more_than_their_tier_and_no_more_than_there_is():
    strategy = Florist(make_federation(4), 0.5)
    state = one_round(strategy, start(), {0: ranks_of(4), 1: ranks_of(4)}, noisy).state
    for module, factors in state.adapter.items():
        assert factors.rank < 4
        assert strategy.download(state, ranks_of(1))[module].rank == 1
        assert strategy.download(state, ranks_of(4))[module].rank == factors.rank


def test_florist_keeps_the_initial_adapter_while_nothing_is_learned():
    state = one_round(Florist(make_federation(4)), start(), {0: ranks_of(4), 1: ranks_of(2)}).state
    assert state.adapter.equal(start().adapter)


def test_florist_without_training_keeps_what_clients_can_hold():
    strategy = Florist(make_federation(4), 1.0)
    ranks = {k: ranks_of(4) for k in range(3)}
    state = one_round(strategy, start(), ranks, noisy).state
    after = one_round(strategy, state, ranks).state
    for module, factors in state.adapter.items():
        assert factors.rank > 4, "the global adapter may exceed every client's rank"
        U, S, Vh = np.linalg.svd(product(factors), full_matrices=False)
        np.testing.assert_allclose(product(after.adapter[module]), U[:, :4] * S[:4] @ Vh[:4], atol=1e-10)


def test_fedsvd_is_the_exact_mean_of_products_with_an_orthonormal_a():
    strategy = FedSVD(make_federation(4))
    state = start()
    ranks = {k: ranks_of(4) for k in range(3)}
    counts = {0: 10, 1: 20, 2: 30}
    for _ in range(2):
        expected = {}
        for module, server in state.adapter.items():
            trained = [noisy(k, state.adapter)[module] for k in ranks]
            # clients train B alone, with the server's A
            expected[module] = sum(
                counts[k] / 60 * product(LoraFactors(server.A, t.B, t.scaling))
                for k, t in zip(ranks, trained, strict=True)
            )
        state = one_round(strategy, state, ranks, noisy, counts).state
        for module, factors in state.adapter.items():
            np.testing.assert_allclose(product(factors), expected[module], atol=1e-10)
            np.testing.assert_allclose(factors.A @ factors.A.T, np.eye(4), atol=1e-10)


def test_fedsvd_never_reads_what_did_not_travel():
    state = one_round(FedSVD(make_federation(4)), start(), {0: ranks_of(4)}, noisy).state
    for factors in state.adapter.values():
        assert bool(factors.A.isfinite().all())


def test_fedsvd_keeps_the_initial_adapter_while_nothing_is_learned():
    ranks = {0: ranks_of(4), 1: ranks_of(4)}
    strategy = FedSVD(make_federation(4))
    assert one_round(strategy, start(), ranks).state.adapter.equal(start().adapter)
    state = one_round(strategy, start(), ranks, noisy).state
    after = one_round(strategy, state, ranks).state
    for module, factors in state.adapter.items():
        np.testing.assert_allclose(product(after.adapter[module]), product(factors), atol=1e-10)


def test_fedsvd_refuses_mixed_ranks():
    cohort = [random_adapter(0, 4), random_adapter(1, 2)]
    with pytest.raises(AggregationError, match="one LoRA rank and scaling"):
        FedSVD(make_federation(4)).aggregate(start(), [make_report(0), make_report(1)], stream(cohort))
