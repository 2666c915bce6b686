"""Local training without any aggregation: the baseline that shows what federation gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import NEITHER, Client, ClientPlan, Sides, Upload, pack_state, unpack_state
from fedsim.lora.state import ServerState
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport

OWN = "adapter"


@final
@dataclass(frozen=True, slots=True)
class LocalOnly:
    """Each client goes on from its own adapter whenever it is drawn; nothing is shared, and nothing travels."""

    federation: Federation
    name: str = "local"
    traits: Traits = Traits(
        reduce="stack",
        mixed_ranks=True,
        keeps_client_state=True,
        has_global_model=False,
        uses_client_weights=False,
    )

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Nothing."""
        return NEITHER

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """The first rows of the initial adapter, which is what a client starts from on its first round."""
        return truncated(state.adapter, lora_ranks, self.federation.scaling)

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Go on from the client's own adapter, if it has one."""
        own = unpack_state(OWN, client.state, like=received)
        return ClientPlan(received if own is None else own, downlink_bytes=0)

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """Keep the adapter on the client."""
        return Upload(trained, client_state=pack_state(OWN, trained))

    def aggregate(
        self,
        state: ServerState,
        reports: Sequence[ClientReport],  # noqa: ARG002
        factors: FactorStream,
    ) -> Aggregated:
        """Nothing but the next round."""
        modules = [module for module, _ in factors]
        initial = state.adapter  # as it is, which is then not sent anew
        if len(modules) < len(initial):
            initial = AdapterState({module: initial[module] for module in modules})
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=initial))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """A client's adapter; the untrained initial one if no client is named, for there is no global adapter."""
        if client is None:
            return state.adapter
        received = self.download(state, client.lora_ranks)
        return self.plan(state, client, received).start
