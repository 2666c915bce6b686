"""FedSVD (arXiv 2505.12805): clients train B, and the server makes A anew from the product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.common import mean_of_sides
from fedsim.aggregation.spectrum import factors_of, spectrum_figures
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import ONLY_B, Client, ClientPlan, Sides, Upload
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.state import ServerState
from fedsim.lora.svd import sum_svd
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class FedSVD:
    """Clients share A and train B; each round, for each module:

        B = sum_k p_k B_k        U S V^T = svd(scaling B A)        A <- V^T, B <- U S / scaling

    With A shared, the mean is exact: scaling B A = sum_k p_k scaling B_k A. A's new rows are orthonormal, which bounds
    the gradient of B. Where the product has a smaller rank than the adapter, rows of the run's initial A fill it up,
    also in round 0.

    It is declared as "stack" although only the mean of B enters: a server optimizer's moments would be kept in the
    coordinates of an A that is replaced each round.
    """

    federation: Federation
    name: str = "fedsvd"
    traits: Traits = Traits(reduce="stack")

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """B."""
        return ONLY_B

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Train B of what was received."""
        return ClientPlan(received, trains=ONLY_B)

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,  # noqa: ARG002
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The trained adapter, of which B travels."""
        return Upload(trained)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """The mean of B, and the product's decomposition."""
        weights = client_weights(reports, self.federation.weighting)
        adapter, figures, spectra = {}, {}, {}
        for module, cohort in factors:
            mean = mean_of_sides(state.adapter[module], cohort, weights, ONLY_B)
            total = WeightedSum((mean,), (1.0,))
            svd = sum_svd(total, mean.rank)
            adapter[module] = factors_of(svd, self.federation, module, mean.rank, mean.A.dtype)
            figures[module] = spectrum_figures(svd, [mean.rank], total.total_rank)
            spectra[module] = tuple(svd.S.tolist())
        after = replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter))
        return Aggregated(after, figures, spectra)

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter
