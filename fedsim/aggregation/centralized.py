"""Centralized training on the pooled data: the bound that federated methods are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from fedsim.aggregation.strategy import FactorStream
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class Centralized:
    """One virtual client trains on the pooled data of all clients.

    A round sees as many examples as the cohort of that round would have seen, so the budget is that of the federated
    run with the same configuration. Optimizer and schedule start afresh each round, as a client's do.
    """

    name: str = "centralized"
    reduce: Literal["sum"] = "sum"
    trains_pool: bool = True
    has_global_model: bool = True

    def download(self, state: ServerState, client_id: int) -> AdapterState:  # noqa: ARG002
        """The adapter so far."""
        return state.adapter

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> ServerState:
        """Take over the adapter of the one virtual client."""
        if len(reports) != 1:
            raise AggregationError(f"centralized training has one virtual client, got {len(reports)} updates")
        adapter = AdapterState({module: cohort[0] for module, cohort in factors})
        return ServerState(state.round_index + 1, adapter, state.strategy_state)

    def export(self, state: ServerState, client_id: int | None = None) -> AdapterState:  # noqa: ARG002
        """The adapter so far."""
        return state.adapter
