"""Centralized training on the pooled data: the bound that federated methods are compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.strategy import Aggregated, FactorStream, Traits
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class Centralized:
    """One virtual client trains on the pooled data of all clients.

    A round sees as many examples as the cohort of that round would have seen, so the budget is that of the federated
    run with the same configuration. Optimizer and schedule start afresh each round, as a client's do. With resource
    tiers the virtual client has the largest one.
    """

    name: str = "centralized"
    traits: Traits = Traits(reduce="stack", mixed_ranks=True, trains_pool=True, uses_client_weights=False)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both factors."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The adapter so far."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Train on."""
        return ClientPlan(received)

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The whole adapter."""
        return Upload(trained)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Take over the adapter of the one virtual client."""
        if len(reports) != 1:
            raise AggregationError(f"centralized training has one virtual client, got {len(reports)} updates")
        # a copy, since the stream's tensors are views of a buffer
        adapter = AdapterState({module: cohort[0].map(lambda f: f.clone()) for module, cohort in factors})
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=adapter))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The adapter so far."""
        return state.adapter
