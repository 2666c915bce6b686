"""Local training without any aggregation: the baseline that shows what federation gains."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from fedsim.aggregation.strategy import FactorStream
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class LocalOnly:
    """Each client goes on from its own adapter whenever it is drawn; nothing is shared.

    The adapters of all clients that have been drawn so far are part of the server state.
    """

    name: str = "local"
    reduce: Literal["stack"] = "stack"
    trains_pool: bool = False
    has_global_model: bool = False

    def download(self, state: ServerState, client_id: int) -> AdapterState:
        """The client's own adapter, or the initial one on its first round."""
        return state.strategy_state.get(_entry(client_id), state.adapter)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> ServerState:
        """Keep each client's adapter under its name."""
        trained: list[dict[str, LoraFactors]] = [{} for _ in reports]
        for module, cohort in factors:
            for modules, client_factors in zip(trained, cohort, strict=True):
                # a copy, since the stream's tensors are views of one buffer for the whole cohort
                modules[module] = client_factors.map(lambda factor: factor.clone())
        kept = dict(state.strategy_state)
        for report, modules in zip(reports, trained, strict=True):
            kept[_entry(report.client_id)] = AdapterState(modules)
        return ServerState(state.round_index + 1, state.adapter, kept)

    def export(self, state: ServerState, client_id: int | None = None) -> AdapterState:
        """A client's adapter; the untrained initial one if no client is named, for there is no global adapter."""
        return state.adapter if client_id is None else self.download(state, client_id)


def _entry(client_id: int) -> str:
    return f"client/{client_id:06d}"
