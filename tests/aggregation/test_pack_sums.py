"""Sums over packs give the cohort's mean, for every strategy that takes it, and do not depend on who added up."""

from typing import Any

import numpy as np
import pytest
import torch

from fedsim.aggregation.build import build_strategy
from fedsim.aggregation.pack_sums import mean_stream, pack_sum, virtual_report
from fedsim.aggregation.strategy import ClientWeights
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, NEITHER, ONLY_A, ONLY_B, Sides
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientUpdate
from tests.cohorts import TARGETS, make_federation, make_report, random_adapter, stream

EXAMPLES = (3, 1, 10, 4, 7)
PACKS = ((4, 1), (0,), (2, 3))
"""Clients of each pack, in an order of its own."""


def updates() -> list[ClientUpdate]:
    return [
        ClientUpdate(
            make_report(client, examples, num_tokens=examples**2), random_adapter(client, dtype=torch.float32)
        )
        for client, examples in enumerate(EXAMPLES)
    ]


def sums(like: AdapterState, weighting: ClientWeights, sides: Sides) -> list[AdapterState]:
    cohort = updates()
    return [pack_sum([cohort[client] for client in pack], like, weighting, sides) for pack in PACKS]


def mean_of(like: AdapterState, weighting: ClientWeights, sides: Sides) -> AdapterState:
    reports = [update.report for update in updates()]
    means = mean_stream(stream(sums(like, weighting, sides)), reports, like, weighting, sides)
    return AdapterState({module: factors for module, (factors,) in means})


@pytest.mark.parametrize("weighting", ["examples", "tokens", "uniform"])
def test_the_mean_is_numpys_weighted_average(weighting: ClientWeights) -> None:
    cohort = updates()
    weights = {
        "examples": EXAMPLES,
        "tokens": [examples**2 for examples in EXAMPLES],
        "uniform": [1] * len(EXAMPLES),
    }[weighting]
    mean = mean_of(random_adapter(9, dtype=torch.float32), weighting, BOTH)
    for module in TARGETS:
        for side in ("A", "B"):
            stacked = np.stack([getattr(update.adapter[module], side).double().numpy() for update in cohort])
            expected = np.average(stacked, axis=0, weights=weights)
            np.testing.assert_allclose(getattr(mean[module], side).numpy(), expected, rtol=1e-6, atol=1e-7)
            # the likely mistake: means of packs weigh a small pack as much as a large one
            of_means = np.mean([np.average(stacked[list(pack)], axis=0) for pack in PACKS], axis=0)
            assert np.abs(of_means - expected).max() > 0.05


@pytest.mark.parametrize("sides", [BOTH, ONLY_A, ONLY_B, NEITHER])
def test_what_does_not_travel_is_absent(sides: Sides) -> None:
    like = random_adapter(9, dtype=torch.float32)
    mean = mean_of(like, "examples", sides)
    whole = mean_of(like, "examples", BOTH)
    for module, factors in mean.items():
        for side in ("A", "B"):
            value = getattr(factors, side)
            assert value.shape == getattr(like[module], side).shape
            assert torch.equal(value, getattr(whole[module], side)) if side in sides else value.isnan().all()
        assert factors.scaling == like[module].scaling


@pytest.mark.parametrize("name", ["fedavg", "ffa", "rolora", "fedsa"])
@pytest.mark.parametrize("around", [{}, {"server_optimizer": "fedadam"}])
def test_strategies_do_the_same_with_the_mean_as_with_the_clients(name: str, around: dict[str, Any]) -> None:
    from fedsim.aggregation.server_optimizers import ServerOptimized, ServerOptimizerSettings

    federation = make_federation()
    strategy = build_strategy(name, federation, None)
    if around:
        strategy = ServerOptimized(strategy, ServerOptimizerSettings("fedadam", 0.1, 0.9, 0.99, 1e-3))
    assert strategy.traits.takes_mean
    state = ServerState(0, random_adapter(9, dtype=torch.float32))
    sides = strategy.sends(state)
    cohort = updates()
    reports = [update.report for update in cohort]

    by_client = strategy.aggregate(state, reports, stream([update.adapter for update in cohort])).state
    means = mean_stream(
        stream(sums(state.adapter, "examples", sides)), reports, state.adapter, "examples", sides
    )
    by_mean = strategy.aggregate(state, [virtual_report(state.adapter)], means).state

    assert by_mean.round_index == by_client.round_index == 1
    expected, found = by_client.adapters(), by_mean.adapters()
    assert expected.keys() == found.keys()
    for entry, adapter in expected.items():
        for module, factors in adapter.items():
            for side in ("A", "B"):
                torch.testing.assert_close(
                    getattr(found[entry][module], side), getattr(factors, side), rtol=2e-6, atol=1e-6
                )
    assert not by_mean.adapter.equal(state.adapter)


def test_a_client_of_another_rank_or_scaling_is_refused() -> None:
    like = random_adapter(9)
    for other in (
        random_adapter(1, 3),
        random_adapter(1).map(lambda x: x[:, :3] if x.shape[1] == 4 else x[:3]),
    ):
        with pytest.raises(AggregationError, match="one LoRA rank and scaling"):
            pack_sum([ClientUpdate(make_report(0), other)], like, "examples", BOTH)


def test_weights_must_have_a_positive_sum() -> None:
    like = random_adapter(9)
    nothing = [make_report(0, 0)]
    part = pack_sum([ClientUpdate(nothing[0], like)], like, "examples", BOTH)
    with pytest.raises(AggregationError, match=r"client weights \(examples\) must have a positive sum"):
        list(mean_stream(stream([part]), nothing, like, "examples", BOTH))
