"""FlexLoRA (arXiv 2402.11505): average the products, redistribute by singular value decomposition."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from fedsim.aggregation.spectrum import aggregate_by_svd
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FlexLora:
    """Each round, for each module:

        W = sum_k p_k scaling_k B_k A_k        U S V^T = svd(W)
        a client of rank r gets A = V_r^T, B = U_r S_r / scaling(r)

    so that scaling(r) B A is the best approximation of W of rank r. The server keeps the factors of the largest rank of
    any client; sorted by singular value, their first r components are what a client of rank r gets. W is not formed
    unless that is cheaper; see `fedsim.lora.svd`.

    Known weakness: what only clients of large ranks hold is averaged with the zeros of the others, so that without
    training the singular value j shrinks by P(r_k >= j) a round (rank collapse, arXiv 2602.13486). `flexlora_delta` and
    `flexlora_partitioned` are two corrections.
    """

    federation: Federation
    name: str = "flexlora"
    traits: Traits = Traits(reduce="stack", mixed_ranks=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both factors."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """The first r components of the global adapter: the best approximation of rank r."""
        return truncated(state.adapter, lora_ranks, self.federation.scaling)

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
        """The weighted mean of the clients' products, as factors of the largest rank."""
        return aggregate_by_svd(self.federation, state, reports, factors, holder="B")

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter: the best approximation of the largest rank."""
        return state.adapter
