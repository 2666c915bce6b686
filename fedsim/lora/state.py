"""What one round hands to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fedsim.lora.factors import AdapterState


@dataclass(frozen=True, slots=True)
class ServerState:
    """The server between two rounds. A checkpoint is this and the configuration.

    Attributes:
        round_index: the round to run next, from 0.
        adapter: the global adapter.
        strategy_state: whatever else the strategy keeps, as named adapters (momentum, personal adapters, ...).
    """

    round_index: int
    adapter: AdapterState
    strategy_state: Mapping[str, AdapterState] = field(default_factory=lambda: MappingProxyType({}))
