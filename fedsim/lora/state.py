"""What one round hands to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedsim.lora.factors import AdapterState


@dataclass(frozen=True, slots=True)
class BestSoFar:
    """What early stopping knows of the states so far.

    Attributes:
        score: the best one, finite.
        rounds: rounds that the state with this score had completed.
        waited: evaluations in a row since then that were no better.
    """

    score: float
    rounds: int
    waited: int


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server between two rounds. A checkpoint is this, the clients' own state, and the configuration.

    Attributes:
        round_index: the round to run next, from 0.
        adapter: the global adapter.
        strategy_state: whatever else the strategy keeps, as named adapters (momentum, control variates, ...).
        base_update: what the base's weights have gained so far, as factors with `delta_weight()` = the gain; None for a
            base that is as it was loaded.
        client_versions: client -> round in which the newest version of its own state was written. The tensors lie on
            disk; see `fedsim.server.client_store`.
        best: the best state so far, this one included; None without early stopping, or before an evaluation.
        simulated_s: simulated seconds of all rounds so far; 0 without a simulated clock.
    """

    round_index: int
    adapter: AdapterState
    strategy_state: Mapping[str, AdapterState] = field(default_factory=dict)
    base_update: AdapterState | None = None
    client_versions: Mapping[int, int] = field(default_factory=dict)
    best: BestSoFar | None = None
    simulated_s: float = 0.0

    def adapters(self) -> dict[str, AdapterState]:
        """All adapters of the state by a name of their own: "adapter", "base_update", "strategy/...."."""
        named = {"adapter": self.adapter}
        if self.base_update is not None:
            named["base_update"] = self.base_update
        return named | {f"strategy/{name}": entry for name, entry in self.strategy_state.items()}

    def with_adapters(self, adapters: Mapping[str, AdapterState]) -> "ServerState":
        """The state with these adapters, named as in `adapters()`, instead of its own."""
        entries = {
            name.removeprefix("strategy/"): entry
            for name, entry in adapters.items()
            if name.startswith("strategy/")
        }
        return ServerState(
            self.round_index,
            adapters["adapter"],
            entries,
            adapters.get("base_update"),
            self.client_versions,
            self.best,
            self.simulated_s,
        )

    def to(self, device: torch.device | str) -> "ServerState":
        """The state with all its tensors on `device`; itself if they are there."""
        if all(factors.A.device == torch.device(device) for factors in self.adapter.values()):
            return self
        return self.with_adapters({name: entry.to(device) for name, entry in self.adapters().items()})
