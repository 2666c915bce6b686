"""FFA-LoRA: freeze A, train and average B (Sun et al. 2024, arXiv 2403.12313)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.common import mean_of_sides
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import ONLY_B, Client, ClientPlan, Sides, Upload, sides_bytes
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FfaLora:
    """A stays at its random start, which all draw from the run's seed; only B is trained, sent and averaged.

        B = sum_k p_k B_k,    so that s B A = sum_k p_k s B_k A exactly

    A client that knows the seed draws A itself, so that B alone travels in both directions.
    """

    federation: Federation
    name: str = "ffa"
    traits: Traits = Traits(reduce="sum", takes_mean=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """B."""
        return ONLY_B

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Train B, starting from the global adapter."""
        return ClientPlan(received, trains=ONLY_B, downlink_bytes=sides_bytes(received, ONLY_B))

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The trained B."""
        return Upload(trained)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Average B of each module; see `mean_of_sides`."""
        weights = client_weights(reports, self.federation.weighting)
        adapter = {
            module: mean_of_sides(state.adapter[module], cohort, weights, ONLY_B)
            for module, cohort in factors
        }
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter)))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter
