"""FedAvg over LoRA factors: CLLoRA's Algorithm 1 (arXiv 2502.18910), and FedIT (arXiv 2305.05644) with AdamW."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from fedsim.aggregation.averaging import ClientWeights, average_factors, client_weights
from fedsim.aggregation.strategy import FactorStream
from fedsim.lora.factors import AdapterState
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FedAvg:
    """Each round: A = sum_k p_k A_k and B = sum_k p_k B_k over the cohort, p_k as `client_weights` says.

    CLLoRA writes the same as a sum of changes, w + sum_k p_k (w_k - w), which is equal since the p_k sum to 1.
    """

    weighting: ClientWeights
    name: str = "fedavg"
    reduce: Literal["sum"] = "sum"
    trains_pool: bool = False
    has_global_model: bool = True

    def download(self, state: ServerState, client_id: int) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> ServerState:
        """Average the factors of each module; see `average_factors`."""
        weights = client_weights(reports, self.weighting)
        adapter = AdapterState({module: average_factors(cohort, weights) for module, cohort in factors})
        return ServerState(state.round_index + 1, adapter, state.strategy_state)

    def export(self, state: ServerState, client_id: int | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter
