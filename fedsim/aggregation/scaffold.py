"""SCAFFOLD on LoRA factors (Karimireddy et al. 2020, arXiv 1910.06378, Algorithm 1, option II).

Shapes: K clients in the cohort, N in the federation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fedsim.aggregation.averaging import weighted_sum
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload, pack_state, unpack_state
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport

CONTROL = "control"
"""Name of c in `strategy_state`, and of c_k in the clients' state. Absent ones are zero."""


@final
@dataclass(frozen=True, slots=True)
class Scaffold:
    """Control variates correct each local step for the client's drift; x stands for A and for B.

        client k, each step:   y <- y - lr (g_k(y) + c - c_k),    from y = x
        client k, afterwards:  c_k <- c_k - c + (x - y_k) / L_k,    L_k = sum of the step's learning rates
        server:                x <- (1/K) sum_k y_k,    c <- c + (1/N) sum_k (change of c_k)

    The paper's K * lr is L_k, so that schedules are right too. Server learning rate 1 and uniform weights, as in the
    paper. It holds for plain SGD only: with momentum or Adam, (x - y_k) / L_k is no mean gradient.

    The change of c_k, (x - y_k) / L_k - c, follows from the upload and L_k, so that no control variate travels up.
    A client whose learning rates sum to 0 has not moved, and keeps its c_k.

    Attributes:
        federation: see there; its client weights have no effect.
    """

    federation: Federation
    name: str = "scaffold"
    traits: Traits = Traits(reduce="stack", keeps_client_state=True, uses_client_weights=False)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:  # noqa: ARG002
        """The global adapter, the same for all."""
        return state.adapter

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:
        """Start from the global adapter, with c - c_k added to each gradient; x and c travel."""
        zero = received.map(torch.zeros_like)
        common = state.strategy_state.get(CONTROL, zero)
        own = unpack_state(CONTROL, client.state, received) or zero
        correction = {
            module: LoraFactors(common[module].A - own[module].A, common[module].B - own[module].B, f.scaling)
            for module, f in received.items()
        }
        return ClientPlan(
            received, correction=AdapterState(correction), downlink_bytes=2 * received.num_bytes
        )

    def upload(
        self,
        state: ServerState,
        client: Client,
        plan: ClientPlan,
        trained: AdapterState,
        report: ClientReport,
    ) -> Upload:
        """The trained adapter; the new c_k is kept for the client."""
        own = unpack_state(CONTROL, client.state, trained) or trained.map(torch.zeros_like)
        control = {}
        for module, factors in trained.items():
            change = control_change(plan.start[module], factors, _common(state, module), report.lr_sum)
            control[module] = LoraFactors(
                _plus(own[module].A, change.A), _plus(own[module].B, change.B), factors.scaling
            )
        return Upload(trained, client_state=pack_state(CONTROL, AdapterState(control)))

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> Aggregated:
        """The mean of the clients' adapters, and c moved by the changes of their c_k."""
        adapter, control = {}, {}
        for module, cohort in factors:
            server, common = state.adapter[module], _common(state, module)
            _check_alike(server, cohort)
            changes = [
                control_change(server, client, common, report.lr_sum)
                for client, report in zip(cohort, reports, strict=True)
            ]
            adapter[module] = _scaled_sum(cohort, 1 / len(cohort))
            moved = _scaled_sum(changes, 1 / self.federation.num_clients)
            control[module] = LoraFactors(_plus(common.A, moved.A), _plus(common.B, moved.B), server.scaling)
        return Aggregated(
            replace(
                state,
                round_index=state.round_index + 1,
                adapter=AdapterState(adapter),
                strategy_state={**state.strategy_state, CONTROL: AdapterState(control)},
            )
        )

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """The global adapter."""
        return state.adapter


def control_change(
    start: LoraFactors, trained: LoraFactors, common: LoraFactors, lr_sum: float
) -> LoraFactors:
    """New c_k minus old c_k of one module, (start - trained) / lr_sum - c, in float64; zero if `lr_sum` is 0."""

    def change(before: Tensor, after: Tensor, control: Tensor) -> Tensor:
        if lr_sum == 0:
            return torch.zeros_like(before, dtype=torch.float64)
        return (before.double() - after.double()) / lr_sum - control.double()

    return LoraFactors(
        change(start.A, trained.A, common.A), change(start.B, trained.B, common.B), start.scaling
    )


def _common(state: ServerState, module: str) -> LoraFactors:
    """c of a module."""
    if CONTROL in state.strategy_state:
        return state.strategy_state[CONTROL][module]
    return state.adapter[module].map(torch.zeros_like)


def _plus(value: Tensor, change: Tensor) -> Tensor:
    """`value + change` in float64, in the dtype of `value`."""
    return (value.double() + change).to(value.dtype)


def _scaled_sum(cohort: Sequence[LoraFactors], share: float) -> LoraFactors:
    """`share` times the sum of each factor."""
    shares = [share] * len(cohort)
    return LoraFactors(
        weighted_sum([factors.A for factors in cohort], shares),
        weighted_sum([factors.B for factors in cohort], shares),
        cohort[0].scaling,
    )


def _check_alike(server: LoraFactors, cohort: Sequence[LoraFactors]) -> None:
    if any((factors.A.shape, factors.scaling) != (server.A.shape, server.scaling) for factors in cohort):
        found = sorted({(factors.rank, factors.scaling) for factors in (server, *cohort)})
        raise AggregationError(
            "SCAFFOLD needs one LoRA rank and scaling among server and clients, got (rank, scaling) "
            f"{found[:8]}"
        )
