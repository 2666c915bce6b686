"""HLoRA (arXiv 2503.00813): the mean of the products, decomposed, with the singular values in A."""

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
class HLora:
    """As FlexLoRA, but the singular values go into A:

        W = sum_k p_k scaling_k B_k A_k        U S V^T = svd(W)
        a client of rank r gets A = S_r V_r^T, B = U_r / scaling(r)

    The product is FlexLoRA's; local training differs, since the gradient of each factor scales with the other one. That
    S stands in A is what the authors' code does in its base class (one of its tasks puts it in B); the paper was not
    read. Departs from that code, which ignores alpha / r and so mis-scales clients of different ranks.
    """

    federation: Federation
    name: str = "hlora"
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
        return aggregate_by_svd(self.federation, state, reports, factors, holder="A")

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter: the best approximation of the largest rank."""
        return state.adapter
