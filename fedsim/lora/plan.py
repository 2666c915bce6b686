"""What a client is told to do in a round, and what it hands back: the vocabulary of strategies and trainers.

Shapes: r = LoRA rank, i = in features, o = out features of an adapted module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fedsim.lora.factors import AdapterState, LoraFactors

Side = Literal["A", "B"]
Sides = frozenset[Side]
"""Which of the two factors something is about."""

BOTH: Sides = frozenset(("A", "B"))
ONLY_A: Sides = frozenset(("A",))
ONLY_B: Sides = frozenset(("B",))
NEITHER: Sides = frozenset()

ClientState = Mapping[str, Tensor]
"""Named tensors that belong to one client and stay with it from round to round, on the CPU while it is not drawn."""

NO_STATE: ClientState = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Client:
    """What a strategy may know about a client before its local run.

    Attributes:
        client_id: from 0, or `POOLED_CLIENT`.
        lora_ranks: module -> LoRA rank of the client's resource tier.
        state: what the strategy kept for it; empty before its first round.
    """

    client_id: int
    lora_ranks: Mapping[str, int]
    state: ClientState = field(default_factory=lambda: NO_STATE)


@dataclass(frozen=True, slots=True)
class TailPenalty:
    """HetLoRA's penalty on the last rank rows (Cho et al. 2024), added to the loss of each step:

        weight * sum over modules of ||B[:, t:]||_F * ||A[t:]||_F,    t = first_row of the module

    A module whose tail is empty adds nothing.

    Attributes:
        weight: lambda, >= 0.
        first_rows: module -> t, for every adapted module; t = r for an empty tail.
    """

    weight: float
    first_rows: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """How a client trains in a round.

    The gradient of a step is that of the data loss, plus the proximal term (`LocalSettings.proximal_mu`, towards
    `start`), plus the tail penalty's, plus `correction`; then it is set to 0 where nothing trains, and clipped. Values
    that do not train keep their bits: no weight decay either.

    Attributes:
        start: the adapter it starts from.
        trains: factors that are trained at all; at least one of them.
        mask: bool factors of the shapes of `start`, true where a value trains; None for all values of `trains`.
        tail_penalty: see there.
        correction: added to the gradient of each step, same shapes as `start` (SCAFFOLD's c - c_k).
        downlink_bytes: what the client receives; None for the bytes of `start`.
        uplink_bytes: what it sends; None for the bytes of the sides that the strategy sends.
    """

    start: AdapterState
    trains: Sides = BOTH
    mask: AdapterState | None = None
    tail_penalty: TailPenalty | None = None
    correction: AdapterState | None = None
    downlink_bytes: int | None = None
    uplink_bytes: int | None = None

    @property
    def received_bytes(self) -> int:
        """What the client receives."""
        return self.start.num_bytes if self.downlink_bytes is None else self.downlink_bytes

    def sent_bytes(self, sides: Sides, adapter: AdapterState | None = None) -> int:
        """What the client sends.

        Args:
            sides: that the strategy sends.
            adapter: what it hands back; None as long as it has not trained, for one of the ranks of `start`.
        """
        if self.uplink_bytes is not None:
            return self.uplink_bytes
        return sides_bytes(self.start if adapter is None else adapter, sides)


@dataclass(frozen=True, slots=True)
class Upload:
    """What a client returns after its local run.

    Attributes:
        adapter: the factors for the server; of these only the sides that the strategy sends travel.
        client_state: replaces what the strategy keeps for the client; None leaves it as it is.
    """

    adapter: AdapterState
    client_state: ClientState | None = None


def absent(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor that did not travel: every value is NaN, without memory behind it, so that whoever uses it finds out."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


def sides_bytes(adapter: AdapterState, sides: Sides) -> int:
    """Bytes of some sides of an adapter's factors, in their own dtype."""
    return sum(
        getattr(factors, side).numel() * getattr(factors, side).element_size()
        for factors in adapter.values()
        for side in sides
    )


def pack_state(name: str, adapter: AdapterState, sides: Sides = BOTH) -> dict[str, Tensor]:
    """An adapter, or one side of it, as named tensors: `name|module|A`, `name|module|B`."""
    return {
        f"{name}|{module}|{side}": getattr(factors, side)
        for module, factors in adapter.items()
        for side in sorted(sides)
    }


def unpack_state(name: str, state: ClientState, like: AdapterState) -> AdapterState | None:
    """The adapter that `pack_state` wrote under `name`; None if there is none.

    Sides that are not in `state` are those of `like`, as are scalings and the order of modules.
    """
    if not any(key.startswith(f"{name}|") for key in state):
        return None
    return AdapterState(
        {
            module: LoraFactors(
                state.get(f"{name}|{module}|A", factors.A),
                state.get(f"{name}|{module}|B", factors.B),
                factors.scaling,
            )
            for module, factors in like.items()
        }
    )
