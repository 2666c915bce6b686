"""The baselines without federation: local and centralized."""

import pytest
import torch

from fedsim.aggregation.build import build_strategy
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.lora.updates import POOLED_CLIENT, ClientReport


def report(client_id: int) -> ClientReport:
    return ClientReport(client_id, 1, 1, 2, 1, 1.0, 1.0, 1.0, 1, 0, 0, 0, 0, 1.0)


def adapter(value: float) -> AdapterState:
    return AdapterState({"x": LoraFactors(torch.full((1, 3), value), torch.full((2, 1), value), 2.0)})


def stream(cohort: list[AdapterState]):
    return ((module, tuple(member[module] for member in cohort)) for module in cohort[0])


def test_local_clients_keep_their_own_adapters_and_share_nothing():
    strategy = build_strategy("local", "examples")
    start = ServerState(0, adapter(0.0))
    after = strategy.aggregate(start, [report(2), report(5)], stream([adapter(2.0), adapter(5.0)]))
    later = strategy.aggregate(after, [report(5)], stream([adapter(6.0)]))
    assert strategy.download(later, 2).equal(adapter(2.0))
    assert strategy.download(later, 5).equal(adapter(6.0))
    assert strategy.download(later, 0).equal(adapter(0.0)), "a client that was never drawn starts afresh"
    assert later.adapter.equal(adapter(0.0))
    assert strategy.download(after, 5).equal(adapter(5.0)), "an older state is not written to"
    assert not strategy.has_global_model


def test_centralized_takes_over_the_one_pooled_client():
    strategy = build_strategy("centralized", "examples")
    start = ServerState(0, adapter(0.0))
    after = strategy.aggregate(start, [report(POOLED_CLIENT)], stream([adapter(3.0)]))
    assert after.adapter.equal(adapter(3.0))
    assert strategy.trains_pool
    with pytest.raises(AggregationError, match="one virtual client"):
        strategy.aggregate(start, [report(0), report(1)], stream([adapter(1.0), adapter(2.0)]))
