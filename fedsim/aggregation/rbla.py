"""RBLA: each rank row is averaged over the clients that hold it (arXiv 2408.08699).

Shapes: r_k = LoRA rank of client k, R = largest rank of any client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.padding import padded_sums
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class Rbla:
    """For rank row j < R, x_j being row j of A, or column j of B times s_k / s:

        x_j = sum_{k: r_k > j} p_k x_kj / sum_{k: r_k > j} p_k

    A client of rank r receives the first r rows. Zero-padding would divide by the weights of all clients instead, and
    so shrink the rows that few clients hold.

    Our reading, from the formula above in other implementations (the paper's text was not read): rows that no client of
    the cohort holds keep the server's value, and the scaling s_k goes into B (see `padding`).
    """

    federation: Federation
    name: str = "rbla"
    traits: Traits = Traits(reduce="stack", mixed_ranks=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """The first rank rows of the server's adapter, with B rescaled to the rank's scaling."""
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
        """The trained adapter."""
        return Upload(trained)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Average each module row by row; see `mean_over_holders`."""
        weights = client_weights(reports, self.federation.weighting)
        adapter = {
            module: mean_over_holders(cohort, weights, state.adapter[module]) for module, cohort in factors
        }
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter)))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """The global adapter of the largest rank, or the slice that the client receives."""
        return state.adapter if client is None else self.download(state, client.lora_ranks)


def mean_over_holders(
    cohort: Sequence[LoraFactors], weights: Sequence[float], bank: LoraFactors
) -> LoraFactors:
    """The equation of `Rbla` for one module.

    Args:
        cohort: K factors of any ranks up to the bank's.
        weights: K weights >= 0.
        bank: the server's factors; rows whose holders weigh nothing together are taken from it.

    Returns:
        Factors of the bank's rank, scaling and dtype, newly allocated.

    Raises:
        AggregationError: there are no clients, or a rank exceeds the bank's.
    """
    down, up = padded_sums(cohort, weights, bank)
    held = torch.zeros(bank.rank, dtype=torch.float64, device=bank.A.device)
    for factors, weight in zip(cohort, weights, strict=True):
        held[: factors.rank] += weight
    somebody = held > 0
    share = torch.where(somebody, held, 1.0)
    return LoraFactors(
        torch.where(somebody[:, None], (down / share[:, None]).to(bank.A.dtype), bank.A),
        torch.where(somebody[None, :], (up / share[None, :]).to(bank.B.dtype), bank.B),
        bank.scaling,
    )
