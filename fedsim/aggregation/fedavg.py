"""FedAvg over LoRA factors: CLLoRA's Algorithm 1 (arXiv 2502.18910), and FedIT (arXiv 2305.05644) with AdamW."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import average_factors, client_weights
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FedAvg:
    """Each round: A = sum_k p_k A_k and B = sum_k p_k B_k over the cohort, p_k as `client_weights` says.

    CLLoRA writes the same as a sum of changes, w + sum_k p_k (w_k - w), which is equal since the p_k sum to 1.
    """

    federation: Federation
    name: str = "fedavg"
    traits: Traits = Traits(reduce="sum", takes_mean=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both factors."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Train what was received."""
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
        """Average the factors of each module; see `average_factors`."""
        weights = client_weights(reports, self.federation.weighting)
        adapter = AdapterState({module: average_factors(cohort, weights) for module, cohort in factors})
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=adapter))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter
