"""The aggregation of a round on one process: sums in packs, and the mean of the cohort, by the configured weights."""

import numpy as np
import pytest
import torch

from fedsim.aggregation.fedavg import FedAvg
from fedsim.comm.group import SoloGroup
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientUpdate
from fedsim.server.aggregation import Aggregator
from tests.cohorts import make_federation, make_report, random_adapter

EXAMPLES, TOKENS = (3, 1, 10, 4), (20, 90, 15, 7)
PACKS = ((3, 1), (0, 2))


@pytest.mark.parametrize(
    ("weighting", "weights"), [("examples", EXAMPLES), ("tokens", TOKENS), ("uniform", (1, 1, 1, 1))]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_clients_weigh_the_same_within_a_pack_and_between_packs(weighting, weights, sharded):
    state = ServerState(0, random_adapter(9))
    strategy = FedAvg(make_federation(weighting=weighting))
    updates = [
        ClientUpdate(make_report(client, EXAMPLES[client], num_tokens=TOKENS[client]), random_adapter(client))
        for client in range(4)
    ]
    aggregator = Aggregator(torch.device("cpu"), sharded, weighting)
    sent = {}
    for pack, members in enumerate(PACKS):
        sent |= aggregator.contribution(strategy, state, pack, [updates[client] for client in members])
    reports = [update.report for update in updates]
    aggregated, _ = aggregator.aggregate(SoloGroup(), strategy, state, reports, sent)

    assert list(sent) == [0, 1], "a sum for each pack"
    for module, factors in aggregated.state.adapter.items():
        for side in ("A", "B"):
            values = np.stack([getattr(update.adapter[module], side).numpy() for update in updates])
            expected = np.average(values, axis=0, weights=weights)
            np.testing.assert_allclose(getattr(factors, side).numpy(), expected, rtol=1e-12, atol=1e-12)
