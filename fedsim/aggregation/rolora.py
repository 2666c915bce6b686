"""RoLoRA: train and average one factor per round, in turn (Chen et al. 2024, arXiv 2409.02346)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.common import mean_of_sides
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import ONLY_A, ONLY_B, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class RoLora:
    """One factor is trained, sent and averaged in a round; the other is the same for all, so that the mean is exact:

        round_index 0, 2, ...:  B = sum_k p_k B_k,    s B A = sum_k p_k s B_k A
        round_index 1, 3, ...:  A = sum_k p_k A_k,    s B A = sum_k p_k s B A_k

    The paper counts rounds from 1: odd ones train B, even ones A. B comes first also because it starts at zero, where
    the gradient of A is zero.

    Clients receive both factors: which ones they still have depends on when they were last drawn.
    """

    federation: Federation
    name: str = "rolora"
    traits: Traits = Traits(reduce="sum", takes_mean=True)

    def sends(self, state: ServerState) -> Sides:
        """B in rounds of even index, else A."""
        return ONLY_B if state.round_index % 2 == 0 else ONLY_A

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Train this round's factor, starting from the global adapter."""
        return ClientPlan(received, trains=self.sends(state))

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The trained factor."""
        return Upload(trained)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Average this round's factor of each module; see `mean_of_sides`."""
        weights = client_weights(reports, self.federation.weighting)
        sides = self.sends(state)
        adapter = {
            module: mean_of_sides(state.adapter[module], cohort, weights, sides) for module, cohort in factors
        }
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter)))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter
