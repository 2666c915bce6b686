"""FLoRIST (arXiv 2506.09199): the mean of the products, cut at the rank that keeps a share of its energy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.spectrum import factors_of, spectrum_figures
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.state import ServerState
from fedsim.lora.svd import Svd, sum_svd
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class Florist:
    """Each round, for each module:

        W = sum_k p_k scaling_k B_k A_k        U S V^T = svd(W)
        p = the smallest rank with sum_{j <= p} s_j^2 >= energy ||W||_F^2
        a client of tier rank r gets the first min(r, p) components: A = V^T, B = U S / scaling(min(r, p))

    Our reading of the paper's abstract: one global pair of factors, its rank by a threshold on singular values. That
    the threshold is on the energy, and that a client whose rank is smaller cuts the pair to it, is our choice. While W
    is 0 the initial adapter stays.

    p may exceed the rank of every client, up to min(R, o, i): it is the global adapter, which is tested and exported,
    that keeps the energy. Clients train at the rank that they received.

    Attributes:
        energy: share of ||W||_F^2 that is kept, in (0, 1].
    """

    federation: Federation
    energy: float = 0.99
    name: str = "florist"
    traits: Traits = Traits(reduce="stack", mixed_ranks=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both factors."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """The first min(r, p) components of the global adapter."""
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
        """The weighted mean of the clients' products, as factors of the rank that the energy asks for."""
        weights = client_weights(reports, self.federation.weighting)
        adapter, figures, spectra = {}, {}, {}
        for module, cohort in factors:
            largest = self.federation.max_ranks[module]
            total = WeightedSum(cohort, weights)
            svd = sum_svd(total)
            rank = _rank_of(svd, self.energy) or largest
            adapter[module] = factors_of(svd, self.federation, module, rank, cohort[0].A.dtype)
            figures[module] = spectrum_figures(
                svd,
                [client.rank for client in cohort],
                total.total_rank,
                self.federation.ranks_by_tier(module),
            )
            spectra[module] = tuple(svd.S[: max(rank, largest)].tolist())
        after = replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter))
        return Aggregated(after, figures, spectra)

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter


def _rank_of(svd: Svd, energy: float) -> int:
    """p; 0 for W = 0."""
    if not bool((svd.S > 0).any()):
        return 0
    kept = svd.S.square().cumsum(0)
    # rounding must not ask for components that hold nothing
    enough = kept >= min(energy * svd.energy, float(kept[-1]))
    return 1 + int(enough.to(torch.uint8).argmax())
