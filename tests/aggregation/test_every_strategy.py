"""Every strategy on cohorts of any shape: values stay finite, shapes are those declared, the matrix's claims hold.

docs/strategies.md says which strategies keep what equal clients have learned, and which have the mean of the products;
`test_properties.py` measures that for one cohort. Here whatever it promises is held against dense products.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.build import build_strategy
from fedsim.aggregation.server_optimizers import ServerOptimizerSettings
from fedsim.aggregation.strategy import Federation, Strategy
from fedsim.config.strategy_section import STRATEGY_NAMES
from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState
from fedsim.lora.lowrank import combine
from fedsim.lora.plan import Client, ClientState
from fedsim.lora.state import ServerState
from fedsim.lora.updates import POOLED_CLIENT
from tests.aggregation.test_properties import BEGIN, DOCS, END, best_of_rank
from tests.cohorts import (
    CohortCase,
    cohort_cases,
    make_federation,
    one_round,
    products,
    random_adapter,
    settled,
)

SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
STAGE_ONE, STAGE_TWO, PRUNING = "slora, stage 1", "slora, stage 2", "hetlora, pruning"
NAMES = (
    *(name for name in STRATEGY_NAMES if name != "slora"),
    *(STAGE_ONE, STAGE_TWO, PRUNING),
    *(f"fedavg, {optimizer}" for optimizer in SERVER_OPTIMIZERS),
)
ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "florist": {"energy": 1.0},
    STAGE_ONE: {"rounds": 2, "density": 0.4, "then": "flexlora"},
    STAGE_TWO: {"rounds": 2, "density": 0.4, "then": "flexlora"},
    "hetlora": {"pruning_factor": 1.0, "tail_penalty": 0.0, "min_rank": 1},
    PRUNING: {"pruning_factor": 0.5, "tail_penalty": 0.0, "min_rank": 1},
}
EXAMPLES = 25


def federation_of(name: str, case: CohortCase) -> Federation:
    return make_federation(
        case.largest,
        case.targets,
        cohort_size=len(case.ranks),
        weighting="uniform" if name == "scaffold" else "examples",
    )


def make(name: str, case: CohortCase) -> Strategy:
    plain, _, rest = name.partition(", ")
    optimizer = ServerOptimizerSettings.published(rest) if rest in SERVER_OPTIMIZERS else None
    return build_strategy(plain, federation_of(name, case), ARGUMENTS.get(name), server_optimizer=optimizer)


def admitted(name: str, case: CohortCase) -> CohortCase:
    """The case, as far as the strategy takes it: one rank for all; FLoRA's fresh adapters fit into their module."""
    if name == "flora":
        case = case.within_the_module()
    return case if make(name, case).traits.mixed_ranks else case.with_one_rank()


def start_of(name: str, case: CohortCase) -> ServerState:
    adapter = random_adapter(5, case.largest, case.targets)
    if case.fresh:
        adapter = AdapterState({m: replace(f, B=torch.zeros_like(f.B)) for m, f in adapter.items()})
    return ServerState(2 if name == STAGE_TWO else 0, adapter)


class Round:
    """One round of a case, and what its clients started from and ended with, all of them as dense products."""

    def __init__(
        self, name: str, case: CohortCase, state: ServerState, kept: dict[int, ClientState] | None = None
    ) -> None:
        self.strategy, self.case, self.before = make(name, case), case, state
        self.kept = {} if kept is None else kept
        pooled = self.strategy.traits.trains_pool
        who = [POOLED_CLIENT] if pooled else range(len(case.ranks))
        self.ranks = {
            client: dict.fromkeys(case.targets, case.largest if pooled else case.ranks[client])
            for client in who
        }
        examples = {client: 1 if pooled else case.examples[client] for client in who}
        self.starts: dict[int, AdapterState] = {}
        self.ends: dict[int, AdapterState] = {}
        states = dict(self.kept)

        def train(client_id: int, start: AdapterState) -> AdapterState:
            client = Client(client_id, self.ranks[client_id], states.get(client_id, {}))
            received = self.strategy.download(state, client.lora_ranks)
            plan = self.strategy.plan(state, client, received)
            self.starts[client_id] = start
            self.ends[client_id] = settled(plan, case.train(client_id, start))
            return self.ends[client_id]

        self.after = one_round(self.strategy, state, self.ranks, train, examples, self.kept).state
        weights = np.array([1.0 if name == "scaffold" else examples[client] for client in sorted(examples)])
        self.shares = weights / weights.sum()
        (self.module,) = case.targets

    def model(self) -> np.ndarray:
        """What the weights have gained; under client 0's adapter where there is no global one."""
        client = None
        if not self.strategy.traits.has_global_model:
            client = Client(0, self.ranks[0], self.kept[0])
        return products(combine(self.strategy.export(self.after, client), self.after.base_update))[
            self.module
        ]

    def own(self, client: int) -> np.ndarray:
        return products(combine(self.ends[client], self.before.base_update))[self.module]

    def mean(self, adapters: Mapping[int, AdapterState]) -> np.ndarray:
        dense = [products(adapters[client])[self.module] for client in sorted(adapters)]
        return sum(share * one for share, one in zip(self.shares, dense, strict=True))

    def is_close(self, found: np.ndarray, expected: np.ndarray) -> bool:
        """To 1e-9 of the factors' size: products may cancel."""
        factors = [adapter[self.module] for adapter in (*self.ends.values(), self.before.adapter)]
        size = max(abs(f.scaling) * float(f.A.norm()) * float(f.B.norm()) for f in factors)
        return bool(np.linalg.norm(found - expected) <= 1e-9 * size + 1e-300)


def promises(name: str) -> dict[str, str]:
    """Column -> cell of the property matrix; `slora` stands there for its second stage."""
    found = re.search(f"{BEGIN}\n(.*?)\n?{END}", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    header, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()
    )
    rows = {cells[0].strip("`"): dict(zip(header, cells, strict=True)) for cells in lines}
    return rows["fedavg" if name == "fedavg, fedavgm" else name.partition(", ")[0]]


def check_finite(adapters: Mapping[str, AdapterState]) -> None:
    for entry, adapter in adapters.items():
        for factors in adapter.values():
            assert bool(torch.isfinite(factors.A).all()), entry
            assert bool(torch.isfinite(factors.B).all()), entry
            assert np.isfinite(factors.scaling), entry


def check_shapes(name: str, case: CohortCase, played: Round) -> None:
    """The server's adapter has the largest rank, a client's start the client's, both with the rank's scaling."""
    scaling = federation_of(name, case).scaling
    o, i = case.out_features, case.in_features
    (factors,) = played.after.adapter.values()
    rank = case.largest
    if name == "florist":
        rank = factors.rank
        assert 1 <= rank <= max(case.largest, min(o, i))
    assert (factors.A.shape, factors.B.shape, factors.scaling) == ((rank, i), (o, rank), scaling(rank))
    assert factors.A.dtype == factors.B.dtype == torch.float64
    if played.after.base_update is not None:
        assert played.strategy.traits.changes_base
        assert products(played.after.base_update)[played.module].shape == (o, i)
    for client, start in played.starts.items():
        (found,) = start.values()
        rank = played.ranks[client][played.module]
        if name == "florist":
            rank = min(rank, played.before.adapter[played.module].rank)
        if name == PRUNING:
            assert max(1, rank // 4) <= found.rank <= rank  # twice halved at most
            rank = found.rank
        expected = ((rank, i), (o, rank), scaling(rank))
        if name == STAGE_ONE:  # the whole weight, next to an identity
            expected = ((min(o, i), i), (o, min(o, i)), 1.0)
        assert (found.A.shape, found.B.shape, found.scaling) == expected


@pytest.mark.parametrize("name", NAMES)
@given(case=cohort_cases(), other=cohort_cases())
@settings(max_examples=EXAMPLES, deadline=None)
def test_values_stay_finite_and_shapes_are_those_declared(
    name: str, case: CohortCase, other: CohortCase
) -> None:
    """Over two rounds, the second one with other values of the same shapes."""
    case = admitted(name, case)
    state, kept = start_of(name, case), {}
    for content, size, alike in (
        (case.content, case.size, case.alike),
        (other.content, other.size, other.alike),
    ):
        of_round = replace(case, content=content, size=size, alike=alike and len(set(case.ranks)) == 1)
        played = Round(name, of_round, state, kept)
        check_finite(played.after.adapters())
        assert all(bool(torch.isfinite(tensor).all()) for own in kept.values() for tensor in own.values())
        check_shapes(name, of_round, played)
        state = played.after
        assert state.round_index == played.before.round_index + 1


WITHOUT_OWN_PRODUCT = (PRUNING, *(f"fedavg, {optimizer}" for optimizer in SERVER_OPTIMIZERS[1:]))
"""A client that prunes itself sends less than it has learned; adaptive optimizers take steps of another length."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_OWN_PRODUCT])
@given(case=cohort_cases())
@settings(max_examples=EXAMPLES, deadline=None)
def test_equal_clients_give_the_clients_own_product(name: str, case: CohortCase) -> None:
    """All have the largest rank; `flexlora_delta` is exact in a first round alone, where nothing was cut off before."""
    case = admitted(name, replace(case, alike=True).with_one_rank())
    assert promises(name)["one client = local"] == "yes" or name == "flexlora_delta"
    played = Round(name, case, start_of(name, case))
    assert played.is_close(played.model(), played.own(min(played.ends)))


MEANS = [name for name in NAMES if name == STAGE_ONE or promises(name)["mean of products"] not in ("no", "-")]


@pytest.mark.parametrize("name", MEANS)
@given(case=cohort_cases())
@settings(max_examples=EXAMPLES, deadline=None)
def test_the_model_is_the_mean_of_the_products_where_that_is_promised(name: str, case: CohortCase) -> None:
    case = admitted(name, case)
    played = Round(name, case, start_of(name, case))
    mean = played.mean(played.ends)
    if name == "flexlora_delta":
        mean = products(played.before.adapter)[played.module] + mean - played.mean(played.starts)
        assert played.is_close(products(played.after.strategy_state["full"])[played.module], mean)
    exact = name == STAGE_ONE or promises(name)["mean of products"] == "exact"
    assert played.is_close(played.model(), mean if exact else best_of_rank(mean, case.largest))


PLAIN = CohortCase(
    6, 5, 2, (2, 2, 2), (3, 9, 1), alike=False, content="random", size=1.0, fresh=False, seed=1
)


def test_a_mean_of_factors_would_be_seen() -> None:
    """Contrast: the mean of A times the mean of B is not the mean of the products, but for equal clients."""
    played = Round("fedavg", PLAIN, start_of("fedavg", PLAIN))
    assert not played.is_close(played.model(), played.mean(played.ends))
    assert not played.is_close(played.model(), played.own(0))


def test_zero_padding_of_mixed_ranks_would_be_seen() -> None:
    mixed = replace(PLAIN, ranks=(1, 2, 1))
    played = Round("hetlora_naive", mixed, start_of("hetlora_naive", mixed))
    assert not played.is_close(played.model(), played.mean(played.ends))


def test_a_fresh_adapter_larger_than_its_module_is_refused() -> None:
    """FLoRA draws one for each client and round; all others start from what the server has."""
    wide = replace(PLAIN, largest=7).with_one_rank()
    with pytest.raises(AdapterError, match=r"must be at most 5, the smaller side of .*, got 7"):
        Round("flora", wide, start_of("flora", wide))
