"""FlexLoRA with changes instead of averages: a correction of its rank collapse (our reading of arXiv 2505.18494)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.spectrum import factors_of, spectrum_figures
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.lowrank import full_rank
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.state import ServerState
from fedsim.lora.svd import sum_svd
from fedsim.lora.truncate import first_rows, truncated
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FlexLoraDelta:
    """The server keeps the full-rank product of each module and adds to it what the clients changed:

        W <- W + sum_k p_k (scaling_k B_k A_k - what was sent to k)
        a client of rank r gets the best approximation of W of rank r, as in FlexLoRA

    A client that was sent a truncated W and learned nothing changes nothing, where FlexLoRA would average in the
    truncation. So no singular value decays. Our reading of FedHL's abstract (arXiv 2505.18494: a full-rank global model
    as the basis of calibration); its optimal weights are not built, p_k are the client weights.

    `state.strategy_state["full"]` holds W as factors with scaling 1, an (o, i) matrix and an identity: the size of a
    dense update of all adapted modules.
    """

    federation: Federation
    name: str = "flexlora_delta"
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
        """Add the mean change of the clients' products to the server's, and decompose."""
        weights = client_weights(reports, self.federation.weighting)
        full, adapter, figures, spectra = {}, {}, {}, {}
        before = state.strategy_state.get("full")
        for module, cohort in factors:
            server = state.adapter[module]
            full[module] = full_rank(
                self._change(server, server if before is None else before[module], cohort, weights)
                .dense()
                .to(server.A.dtype)
            )
            total = WeightedSum((full[module],), (1.0,))
            largest = self.federation.max_ranks[module]
            svd = sum_svd(total, largest, "dense")
            adapter[module] = factors_of(svd, self.federation, module, largest, server.A.dtype)
            ranks = [client.rank for client in cohort]
            figures[module] = spectrum_figures(svd, ranks, sum(ranks), self.federation.ranks_by_tier(module))
            spectra[module] = tuple(svd.S.tolist())
        after = replace(
            state,
            round_index=state.round_index + 1,
            adapter=AdapterState(adapter),
            strategy_state={**state.strategy_state, "full": AdapterState(full)},
        )
        return Aggregated(after, figures, spectra)

    def _change(
        self,
        server: LoraFactors,
        full: LoraFactors,
        cohort: Sequence[LoraFactors],
        weights: Sequence[float],
    ) -> WeightedSum:
        """W and what the clients changed, as one sum; what was sent is subtracted once for each rank."""
        share = {
            rank: sum(p for p, client in zip(weights, cohort, strict=True) if client.rank == rank)
            for rank in sorted({client.rank for client in cohort})
        }
        sent = [first_rows(server, rank, self.federation.scaling(rank)) for rank in share]
        return WeightedSum((full, *cohort, *sent), (1.0, *weights, *(-p for p in share.values())))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter: the best approximation of the largest rank."""
        return state.adapter
