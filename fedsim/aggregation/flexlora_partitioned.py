"""FlexLoRA with weights for each block of ranks, against its rank collapse (our reading of arXiv 2602.13486)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.spectrum import factors_of, spectrum_figures
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.state import ServerState
from fedsim.lora.svd import sum_svd
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FlexLoraPartitioned:
    """As FlexLoRA, but each block of rank rows is averaged over the clients that hold it. With the distinct
    ranks r_1 < r_2 < ... of the cohort, r_0 = 0, and rows J_b = r_{b-1} + 1 ... r_b:

        W = sum_b [sum_{k: r_k >= r_b} p_k scaling_k B_k[:, J_b] A_k[J_b]] / [sum_{k: r_k >= r_b} p_k]

    then redistribution as in FlexLoRA. Without training nothing decays. Our reading of raFLoRA's abstract
    (arXiv 2602.13486: updates are split by rank, and each part is weighted by its effective contributors). Rows that no
    client of the cohort holds stay as they are, which is our choice.
    """

    federation: Federation
    name: str = "flexlora_partitioned"
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
        """The mean of the clients' products, block by block of ranks, as factors of the largest rank."""
        weights = client_weights(reports, self.federation.weighting)
        adapter, figures, spectra = {}, {}, {}
        for module, cohort in factors:
            largest = self.federation.max_ranks[module]
            total = partitioned_sum(state.adapter[module], cohort, weights)
            ranks = [client.rank for client in cohort]
            svd = sum_svd(total, largest)
            adapter[module] = factors_of(svd, self.federation, module, largest, cohort[0].A.dtype)
            figures[module] = spectrum_figures(svd, ranks, sum(ranks), self.federation.ranks_by_tier(module))
            spectra[module] = tuple(svd.S.tolist())
        after = replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter))
        return Aggregated(after, figures, spectra)

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter: the best approximation of the largest rank."""
        return state.adapter


def partitioned_sum(
    server: LoraFactors, cohort: Sequence[LoraFactors], weights: Sequence[float]
) -> WeightedSum:
    """W as its terms: for each block of rank rows those of the clients that hold it, with weights that sum to 1.

    Args:
        server: the global factors; rows beyond the cohort's largest rank are taken from here.
        cohort: K factors whose row j stands for the server's row j.
        weights: K weights p_k.
    """
    terms: list[LoraFactors] = []
    shares: list[float] = []
    begin = 0
    for end in sorted({client.rank for client in cohort}):
        holders = [(p, client) for p, client in zip(weights, cohort, strict=True) if client.rank >= end]
        held = sum(p for p, _ in holders)
        # clients without examples alone hold nothing that counts
        for p, client in holders if held > 0 else [(1.0, server)]:
            terms.append(_rows(client, begin, end))
            shares.append(p / held if held > 0 else p)
        begin = end
    if begin < server.rank:
        terms.append(_rows(server, begin, server.rank))
        shares.append(1.0)
    return WeightedSum(terms, shares)


def _rows(factors: LoraFactors, begin: int, end: int) -> LoraFactors:
    return LoraFactors(factors.A[begin:end], factors.B[:, begin:end], factors.scaling)
