"""What holds for every strategy on factors, and the functions that they share."""

import numpy as np
import pytest
import torch

from fedsim.aggregation.common import mean_of_sides, noted_bytes, rank_note
from fedsim.aggregation.fedex import FedExLora
from fedsim.aggregation.fedsa import FedSaLora
from fedsim.aggregation.ffa import FfaLora
from fedsim.aggregation.flora import Flora
from fedsim.aggregation.hetlora import HetLora, HetLoraNaive
from fedsim.aggregation.rbla import Rbla
from fedsim.aggregation.rolora import RoLora
from fedsim.aggregation.scaffold import Scaffold
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import BOTH, NEITHER, ONLY_A, ONLY_B, absent
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

KINDS = [FedExLora, FedSaLora, FfaLora, Flora, HetLora, HetLoraNaive, Rbla, RoLora, Scaffold]
RANKS = dict.fromkeys(TARGETS, 4)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
"""Strategies with a `Federation` alone."""


def tiers_for(strategy):
    if strategy.traits.mixed_ranks:
        return {1: dict.fromkeys(TARGETS, 2), 4: RANKS, 6: {"layers.0.q_proj": 1, "layers.1.fc1": 3}}
    return dict.fromkeys((1, 4, 6), RANKS)


def after_rounds(strategy, rounds=2, dtype=torch.float32, tiers=None):
    state, kept = ServerState(0, initial_adapter(TARGETS, RANKS, ScalingRule(16.0), 0, dtype)), {}
    for r in range(rounds):
        ranks = tiers or tiers_for(strategy)
        state = one_round(strategy, state, ranks, learns_noise(r), {1: 10, 4: 30, 6: 5}, kept).state
    return state


def same(first: ServerState, second: ServerState) -> bool:
    mine, other = first.adapters(), second.adapters()
    return mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in mine)


def uploads_of(strategy, state):
    """What would arrive in the round after `state`, and its reports; sides that do not travel are NaN."""
    sides = strategy.sends(state)
    adapters = []
    for k in (1, 4, 6):
        whole = random_adapter(k, tiers_for(strategy)[k], dtype=torch.float32)
        adapters.append(
            AdapterState(
                {
                    m: LoraFactors(
                        f.A if "A" in sides else absent(tuple(f.A.shape), f.A.dtype, f.A.device),
                        f.B if "B" in sides else absent(tuple(f.B.shape), f.B.dtype, f.B.device),
                        f.scaling,
                    )
                    for m, f in whole.items()
                }
            )
        )
    return adapters, [make_report(k, 10 * k) for k in (1, 4, 6)]


@every_kind
def test_the_next_state_is_whole_and_finite(kind):
    strategy = kind(make_federation())
    state = after_rounds(strategy, 3)
    assert state.round_index == 3
    assert list(state.adapter) == list(TARGETS)
    for adapter in state.adapters().values():
        for factors in adapter.values():
            assert factors.A.dtype == factors.B.dtype == torch.float32
            assert torch.isfinite(factors.A).all()
            assert torch.isfinite(factors.B).all()
    assert (state.base_update is not None) == strategy.traits.changes_base


@every_kind
def test_order_of_arrival_and_a_second_run_leave_the_bits_alone(kind):
    strategy = kind(make_federation())
    tiers = tiers_for(strategy)
    turned = dict(reversed(tiers.items()))
    assert same(after_rounds(strategy, tiers=tiers), after_rounds(strategy, tiers=turned))


@every_kind
@pytest.mark.parametrize("rounds", [0, 1])
def test_each_module_is_aggregated_by_itself(kind, rounds):
    strategy = kind(make_federation())
    state = after_rounds(strategy, rounds)
    adapters, reports = uploads_of(strategy, state)
    whole = strategy.aggregate(state, reports, stream(adapters))
    for module in TARGETS:
        part = strategy.aggregate(state, reports, stream(adapters, [module]))
        assert part.by_module == {m: figures for m, figures in whole.by_module.items() if m == module}
        adapters_of_whole = whole.state.adapters()
        assert part.state.adapters().keys() == adapters_of_whole.keys()
        for name, adapter in part.state.adapters().items():
            assert adapter.equal(AdapterState({module: adapters_of_whole[name][module]}))


@every_kind
def test_nothing_is_written_into_arguments_or_kept_from_the_stream(kind):
    strategy = kind(make_federation())
    state = after_rounds(strategy, 1)
    adapters, reports = uploads_of(strategy, state)
    before, sent = (
        state.with_adapters({name: adapter.map(torch.clone) for name, adapter in state.adapters().items()}),
        [a.map(torch.clone) for a in adapters],
    )
    after = strategy.aggregate(state, reports, stream(adapters)).state
    assert same(state, before)
    for mine, copy in zip(adapters, sent, strict=True):
        for module, factors in mine.items():
            assert torch.equal(factors.A.nan_to_num(7.0), copy[module].A.nan_to_num(7.0))
            assert torch.equal(factors.B.nan_to_num(7.0), copy[module].B.nan_to_num(7.0))
    kept = after.with_adapters({name: adapter.map(torch.clone) for name, adapter in after.adapters().items()})
    for adapter in adapters:  # the buffer of the stream is used again
        for factors in adapter.values():
            for tensor in (factors.A, factors.B):
                if tensor.stride() != (0, 0):
                    tensor.fill_(1e6)
    assert same(after, kept)


@every_kind
def test_clients_state_survives_elsewhere(kind):
    """What the server knows of the clients' files is not the strategy's to change."""
    strategy = kind(make_federation())
    state = ServerState(1, random_adapter(0, dtype=torch.float32), client_versions={4: 0})
    adapters, reports = uploads_of(strategy, state)
    assert strategy.aggregate(state, reports, stream(adapters)).state.client_versions == {4: 0}


def test_mean_of_sides():
    server = random_adapter(0)["layers.1.fc1"]
    cohort = [random_adapter(k)["layers.1.fc1"] for k in (1, 2)]
    weights = (0.25, 0.75)
    for sides in (BOTH, ONLY_A, ONLY_B, NEITHER):
        mean = mean_of_sides(server, cohort, weights, sides)
        for side in "AB":
            expected = sum(w * getattr(f, side).numpy() for w, f in zip(weights, cohort, strict=True))
            wanted = expected if side in sides else getattr(server, side).numpy()
            np.testing.assert_allclose(getattr(mean, side), wanted, rtol=1e-12)
    with pytest.raises(AggregationError, match=r"\(rank, scaling\) \[\(3, .*\), \(4, 4\.0\)\]"):
        mean_of_sides(server, [random_adapter(1, 3)["layers.1.fc1"]], [1.0], BOTH)


def test_notes_of_ranks_count_full_factors():
    adapter = random_adapter(0, {"layers.0.q_proj": 2, "layers.1.fc1": 30}, dtype=torch.float32)
    notes = AdapterState({m: rank_note(f.rank, f) for m, f in adapter.items()})
    assert noted_bytes(notes, TARGETS) == adapter.num_bytes
    assert notes.num_bytes == 4 * 2 * 32
    assert noted_bytes(None, TARGETS) == 0
    assert not any(product.any() for product in products(notes).values())
