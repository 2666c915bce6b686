"""FLoRA: stack the clients' factors into the base (Wang et al. 2024, arXiv 2409.05976).

Shapes: K clients in the cohort; A_k (r_k, i) and B_k (o, r_k) of one module, o / i = out / in features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.common import noted_bytes, rank_note
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation, Traits
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import initial_adapter
from fedsim.lora.lowrank import accumulate, weighted_stack
from fedsim.lora.plan import BOTH, Client, ClientPlan, Sides, Upload
from fedsim.lora.state import ServerState
from fedsim.lora.truncate import truncated
from fedsim.lora.updates import ClientReport

STACK = "stack"
"""Name of the last stack's ranks in `strategy_state`; see `rank_note`."""


@final
@dataclass(frozen=True, slots=True)
class Flora:
    """The base gains the exact mean of the clients' products, and every client starts each round from a fresh adapter.

        W <- W + [p_1 s_1 B_1, ..., p_K s_K B_K] [A_1; ...; A_K] = W + sum_k p_k s_k B_k A_k

    At the start of a round, client k draws its own A (a stream of seed, module, round and client) at its own rank, and
    B = 0. The server's adapter has a zero product at all times: what was learned is in the base.

    A client receives the last stack; it is counted as if each client had got those before when they were made. There is
    none in round 0. After a round that nobody reported in, the same one is counted again.
    """

    federation: Federation
    name: str = "flora"
    traits: Traits = Traits(reduce="stack", mixed_ranks=True, changes_base=True)

    def sends(self, state: ServerState) -> Sides:  # noqa: ARG002
        """Both."""
        return BOTH

    def download(self, state: ServerState, lora_ranks: Mapping[str, int]) -> AdapterState:
        """An adapter of these ranks with a zero product."""
        return truncated(state.adapter, lora_ranks, self.federation.scaling)

    def plan(self, state: ServerState, client: Client, received: AdapterState) -> ClientPlan:
        """Start from the client's own fresh draw of this round."""
        like = next(iter(received.values())).A
        fresh = initial_adapter(
            self.federation.targets,
            client.lora_ranks,
            self.federation.scaling,
            self.federation.seed,
            like.dtype,
            state.round_index,
            client.client_id,
        )
        stack_bytes = noted_bytes(state.strategy_state.get(STACK), self.federation.targets)
        return ClientPlan(fresh.to(like.device), downlink_bytes=stack_bytes)

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
        """Add each module's stack to what the base has gained."""
        weights = client_weights(reports, self.federation.weighting)
        adapter, gained, notes = {}, {}, {}
        for module, cohort in factors:
            up, down = weighted_stack(cohort, weights)
            server = state.adapter[module]
            stack = LoraFactors(down.to(server.A.dtype), up.to(server.B.dtype), 1.0)
            gained[module] = accumulate(
                None if state.base_update is None else state.base_update[module], stack
            )
            adapter[module] = LoraFactors(server.A, torch.zeros_like(server.B), server.scaling)
            notes[module] = rank_note(stack.rank, stack)
        return Aggregated(
            replace(
                state,
                round_index=state.round_index + 1,
                adapter=AdapterState(adapter),
                base_update=AdapterState(gained),
                strategy_state={**state.strategy_state, STACK: AdapterState(notes)},
            )
        )

    def export(self, state: ServerState, client: Client | None = None) -> AdapterState:  # noqa: ARG002
        """An adapter with a zero product: the updated base has everything."""
        return state.adapter
