"""HetLoRA: clients of different LoRA ranks by zero-padding and truncation (Cho et al. 2024, arXiv 2401.06432).

Shapes: K clients in the cohort; A (r, i) and B (o, r) of one module, r = LoRA rank, R = largest rank of any client.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.padding import padded_mean
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.lowrank import frobenius_norm
from fedsim.lora.plan import BOTH, Client, ClientPlan, ClientState, Sides, TailPenalty, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport


@final
@dataclass(frozen=True, slots=True)
class HetLoraNaive:
    """The zero-padding and truncation of HetLoRA with plain client weights:

        A = sum_k p_k pad(A_k),    B = sum_k p_k (s_k / s) pad(B_k);    a client of rank r receives the first r rows

    A round in which nobody learns multiplies rank row j of both factors by P_j = sum of the p_k with r_k > j, and so
    its product by P_j^2: what few clients hold fades. Our reading: the scaling s_k goes into B (see `padding`).
    """

    federation: Federation
    name: str = "hetlora_naive"
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
        """Average the padded factors of each module."""
        weights = client_weights(reports, self.federation.weighting)
        adapter = {module: padded_mean(cohort, weights, state.adapter[module]) for module, cohort in factors}
        return Aggregated(replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter)))

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """The global adapter of the largest rank, or the slice that the client receives."""
        return state.adapter if client is None else self.download(state, client.lora_ranks)


@final
@dataclass(frozen=True, slots=True)
class HetLora:
    """HetLoRA in full: sparsity-weighted aggregation, and rank self-pruning with a penalty on the tail.

    Server, for each module:

        A = sum_k w_k pad(A_k),    B = sum_k w_k (s_k / s) pad(B_k),    w_k = ||s_k B_k A_k||_F / sum_j ...

    Client, with t = max(min_rank, floor(gamma r)) in each module:

        loss + lambda * tail,    tail = sum over modules of ||B[:, t:]||_F ||A[t:]||_F
        r <- t if the tail is smaller after training than at its start

    A client that has pruned uploads t rows and goes on with that rank for good.

    Our reading, where the paper was not read in full:
    - the weights are per module; where all products of a module are zero, they are equal;
    - one decision, by the sum over modules, prunes all modules of a client;
    - a module that cannot be pruned further (t = r, always at `min_rank`) has an empty tail, without penalty;
    - the tail that decides contains the scaling of each module, so that it is about products; the penalty's does not,
      which is the paper's formula;
    - a pruned client starts from the first t rows of what its tier receives;
    - the scaling s_k goes into B (see `padding`).

    Attributes:
        federation: see there; its client weights have no effect.
        pruning_factor: gamma, in (0, 1]; at 1 nothing is pruned or penalised.
        tail_penalty: lambda, >= 0.
        min_rank: the rank at which pruning stops, at least 1.
    """

    federation: Federation
    pruning_factor: float = 0.99
    tail_penalty: float = 1e-3
    min_rank: int = 1
    name: str = "hetlora"
    traits: Traits = Traits(
        reduce="stack", mixed_ranks=True, keeps_client_state=True, uses_client_weights=False
    )

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """The first rank rows of the server's adapter, with B rescaled to the rank's scaling."""
        return truncated(state.adapter, lora_ranks, self.federation.scaling)

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:  # noqa: ARG002
        """Train the rows that the client has not pruned, with the tail penalty."""
        start = self._kept_rows(received, client)
        penalty = TailPenalty(self.tail_penalty, self._pruned_ranks(start)) if self.tail_penalty > 0 else None
        return ClientPlan(start, tail_penalty=penalty)

    def upload(
        self,
        state: ServerState,  # noqa: ARG002
        client: Client,  # noqa: ARG002
        plan: ClientPlan,
        trained: AdapterState,
        report: ClientReport,  # noqa: ARG002
    ) -> Upload:
        """The trained adapter, without its tail if that has become smaller."""
        ranks = self._pruned_ranks(trained)
        if tail_size(trained, ranks) >= tail_size(plan.start, ranks):
            return Upload(trained)
        kept: ClientState = {"lora_ranks": torch.tensor([ranks[module] for module in trained])}
        return Upload(truncated(trained, ranks, self.federation.scaling), client_state=kept)

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """Average the padded factors of each module with its Frobenius weights."""
        adapter, figures = {}, {}
        for module, cohort in factors:
            adapter[module] = padded_mean(cohort, frobenius_weights(cohort), state.adapter[module])
            figures[module] = {"hetlora/mean_rank": sum(client.rank for client in cohort) / len(reports)}
        after = replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter))
        return Aggregated(after, figures)

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:
        """The global adapter of the largest rank, or the slice that the client starts from."""
        if client is None:
            return state.adapter
        return self._kept_rows(self.download(state, client.lora_ranks), client)

    def _kept_rows(self, received: AdapterState, client: Client) -> AdapterState:
        if "lora_ranks" not in client.state:
            return received
        kept = dict(zip(received, client.state["lora_ranks"].tolist(), strict=True))
        return truncated(received, kept, self.federation.scaling)

    def _pruned_ranks(self, adapter: AdapterState) -> dict[str, int]:
        return {
            module: pruned_rank(factors.rank, self.pruning_factor, self.min_rank)
            for module, factors in adapter.items()
        }


def pruned_rank(lora_rank: int, pruning_factor: float, min_rank: int) -> int:
    """max(min_rank, floor(gamma r)), at most r. For r = 8 and gamma = 0.99 it is 7; rounding would never prune 8."""
    # 0.29 * 100 is 28.999999999999996 in floating point, and means 29
    return min(lora_rank, max(min_rank, math.floor(pruning_factor * lora_rank + 1e-9)))


def tail_size(adapter: AdapterState, first_rows: Mapping[str, int]) -> float:
    """Sum over modules of scaling ||B[:, t:]||_F ||A[t:]||_F, t = first row of the module."""
    total = 0.0
    for module, factors in adapter.items():
        first = first_rows[module]
        norms = factors.B[:, first:].double().norm() * factors.A[first:].double().norm()
        total += abs(factors.scaling) * float(norms)
    return total


def frobenius_weights(cohort: Sequence[LoraFactors]) -> tuple[float, ...]:
    """w_k = ||s_k B_k A_k||_F / sum_j ||s_j B_j A_j||_F of one module; equal weights where all products are zero."""
    norms = [frobenius_norm(factors) for factors in cohort]
    total = sum(norms)
    return tuple(norm / total if total > 0 else 1 / len(norms) for norm in norms)
