"""FedEx-LoRA: average the factors, and give the base what the average misses (Singhal et al. 2024, arXiv 2410.09432).

Shapes: K clients in the cohort; A (r, i) and B (o, r) of one module, r = LoRA rank, i / o = in / out features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import average_factors, client_weights
from fedsim.aggregation.common import noted_bytes, rank_note
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.lowrank import accumulate, weighted_stack
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport

RESIDUAL = "residual"
"""Name of the last residual's ranks in `strategy_state`; see `rank_note`."""


@final
@dataclass(frozen=True, slots=True)
class FedExLora:
    """Base and adapter together gain the exact mean of the clients' products:

        A = sum_k p_k A_k,    B = sum_k p_k B_k
        W <- W + sum_k p_k s B_k A_k - s B A,    as [p_1 s B_1, ..., p_K s B_K, -s B] [A_1; ...; A_K; A]

    The published code takes p_k = 1/K; here p_k is as `client_weights` says.

    A client receives the adapter and the last residual of rank (K + 1) r; it is counted as if each client had got the
    residuals before when they were made. There is none in round 0. After a round that nobody reported in, the same one
    is counted again.
    """

    federation: Federation
    name: str = "fedex"
    traits: Traits = Traits(reduce="stack", changes_base=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Start from the global adapter; the residual of the base travels with it."""
        residual_bytes = noted_bytes(state.strategy_state.get(RESIDUAL), self.federation.targets)
        return ClientPlan(received, downlink_bytes=received.num_bytes + residual_bytes)

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The trained adapter."""
        return Upload(trained)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Average each module's factors, and add the residual to what the base has gained."""
        weights = client_weights(reports, self.federation.weighting)
        adapter, gained, notes = {}, {}, {}
        for module, cohort in factors:
            mean = average_factors(cohort, weights)
            up, down = weighted_stack((*cohort, mean), (*weights, -1.0))
            residual = LoraFactors(down.to(mean.A.dtype), up.to(mean.B.dtype), 1.0)
            gained[module] = accumulate(
                None if state.base_update is None else state.base_update[module], residual
            )
            adapter[module] = mean
            notes[module] = rank_note(residual.rank, residual)
        return Aggregated(
            replace(
                state,
                round_index=state.round_index + 1,
                adapter=AdapterState(adapter),
                base_update=AdapterState(gained),
                strategy_state={**state.strategy_state, RESIDUAL: AdapterState(notes)},
            )
        )

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter, for the updated base."""
        return state.adapter
