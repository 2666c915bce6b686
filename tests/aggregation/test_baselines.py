"""The baselines without federation: local and centralized."""

import pytest
import torch

from fedsim.aggregation.build import build_strategy
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule
from fedsim.lora.plan import NO_STATE, Client
from fedsim.lora.state import ServerState
from fedsim.lora.updates import POOLED_CLIENT
from tests.cohorts import make_federation, make_report, one_round, stream


def adapter(value: float) -> AdapterState:
    return AdapterState({"x": LoraFactors(torch.full((1, 3), value), torch.full((2, 1), value), 2.0)})


def test_local_clients_keep_their_own_adapters_and_share_nothing():
    strategy = build_strategy("local", make_federation(targets={"x": (3, 2)}, scaling=ScalingRule(2.0)))
    start = ServerState(0, adapter(0.0))
    kept: dict = {}
    ranks = {"x": 1}
    learn = lambda client_id, _: adapter(float(client_id))  # noqa: E731
    after = one_round(strategy, start, {2: ranks, 5: ranks}, learn, client_states=kept).state
    later = one_round(strategy, after, {5: ranks}, lambda *_: adapter(6.0), client_states=kept).state
    exported = {c: strategy.export(later, Client(c, ranks, kept.get(c, NO_STATE))) for c in (0, 2, 5)}
    assert exported[2].equal(adapter(2.0))
    assert exported[5].equal(adapter(6.0))
    assert exported[0].equal(adapter(0.0)), "a client that was never drawn starts afresh"
    assert later.adapter.equal(adapter(0.0))
    assert later.round_index == 2
    assert not strategy.traits.has_global_model


def test_centralized_takes_over_the_one_pooled_client():
    strategy = build_strategy("centralized", make_federation())
    start = ServerState(0, adapter(0.0))
    after = strategy.aggregate(start, [make_report(POOLED_CLIENT)], stream([adapter(3.0)])).state
    assert after.adapter.equal(adapter(3.0))
    assert strategy.traits.trains_pool
    with pytest.raises(AggregationError, match="one virtual client"):
        strategy.aggregate(start, [make_report(0), make_report(1)], stream([adapter(1.0), adapter(2.0)]))
