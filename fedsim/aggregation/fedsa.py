"""FedSA-LoRA: share A, keep B with the client (Guo et al. 2024, arXiv 2410.01463)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.common import mean_of_sides
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import (
    ONLY_A,
    ONLY_B,
    Client,
    ClientPlan,
    Sides,
    Upload,
    pack_state,
    sides_bytes,
    unpack_state,
)
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FedSaLora:
    """Both factors are trained; only A is sent and averaged, B stays with its client from round to round:

        A = sum_k p_k A_k,    client k uses s B_k A

    A client's first B is that of the initial adapter, which is zero; the server's adapter keeps it for good. There is
    no adapter that speaks for all clients.
    """

    federation: Federation
    name: str = "fedsa"
    traits: Traits = Traits(reduce="sum", takes_mean=True, keeps_client_state=True, has_global_model=False)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """A."""
        return ONLY_A

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global A, and the B of a client's first round."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Start from the global A and the client's own B; A travels."""
        return ClientPlan(_with_own_up(received, client), downlink_bytes=sides_bytes(received, ONLY_A))

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The trained A; B is kept for the client."""
        return Upload(trained, client_state=pack_state("own", trained, ONLY_B))

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Average A of each module; see `mean_of_sides`."""
        weights = client_weights(reports, self.federation.weighting)
        adapter = {
            module: mean_of_sides(state.adapter[module], cohort, weights, ONLY_A)
            for module, cohort in factors
        }
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter)))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """The global A with the client's own B; with the initial B for no client, and for one not drawn so far."""
        return state.adapter if client is None else _with_own_up(state.adapter, client)


def _with_own_up(shared: AdapterState, client: Client) -> AdapterState:
    own = unpack_state("own", client.state, shared)
    return shared if own is None else own
