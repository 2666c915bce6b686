"""Sections `cohort` and `clients`: who takes part in a round, and how they come to fail or be late."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedsim.config.node import Node, key


class CohortConfig(Node):
    """Which clients take part in a round. Set one of size, fraction and client_ids."""

    sampling: Literal["fixed", "poisson", "flexlora"] = key(
        "fixed",
        "fixed: exactly so many clients, without replacement; poisson: each client by itself with probability size / "
        "num_clients, as differential privacy needs it; a round may then be empty; flexlora: as fixed, but the very "
        "clients that the code of arXiv 2402.11505 draws (its seed is run.seed=42)",
    )
    size: int | None = key(
        8,
        "clients of a round, drawn without replacement; null when one of the others is set",
        "clients",
        gt=0,
    )
    fraction: float | None = key(
        None, "share of all clients, rounded down, at least one client", "fraction", gt=0, le=1
    )
    client_ids: tuple[Annotated[int, Field(ge=0)], ...] | None = key(
        None, "the same clients in every round, counted from 0", min_length=1
    )

    @model_validator(mode="before")
    @classmethod
    def _size_gives_way(cls, node: Any) -> Any:
        """The default size stands only while neither of the other two is set."""
        if not isinstance(node, dict) or "size" in node:
            return node
        others_are_set = any(node.get(other) is not None for other in ("fraction", "client_ids"))
        return {**node, "size": None} if others_are_set else node

    def clients_a_round(self, num_clients: int) -> float:
        """Clients of a round, of so many in all; a whole number, unless they are drawn independently, then the mean."""
        if self.client_ids is not None:
            return len(self.client_ids)
        if self.fraction is None:
            assert self.size is not None
            return self.size
        if self.sampling == "poisson":
            return self.fraction * num_clients
        # the epsilon keeps 0.3 of 10 clients at 3, not 2
        return max(1, math.floor(self.fraction * num_clients + 1e-9))


def over_selected(size: int, factor: float) -> int:
    """Clients drawn where `size` are wanted and `clients.over_selection` is `factor`; rounded up."""
    return math.ceil(size * factor - 1e-9)  # 1.1 times 100 is a little more than 110


class OutageConfig(Node):
    """Clients that cannot be drawn in some rounds."""

    from_round: int = key(..., "first round of the outage, counted from 0", "rounds", ge=0)
    until_round: int = key(..., "first round in which the clients are back", "rounds", gt=0)
    client_ids: tuple[Annotated[int, Field(ge=0)], ...] = key((), "who; empty: a share of all clients")
    share: float = key(
        1.0, "share of all clients, drawn with run.seed and rounded down", "fraction", gt=0, le=1
    )


class DeviceConfig(Node):
    """The hardware and the link of a client, as simulated."""

    tokens_per_s: float = key(..., "tokens of local training in a second", "tokens/s", gt=0)
    uplink_mbps: float = key(..., "from the client to the server", "Mbit/s", gt=0)
    downlink_mbps: float = key(..., "from the server to the client", "Mbit/s", gt=0)


class SlownessConfig(Node):
    """A random factor on the simulated time of local training."""

    name: Literal["none", "lognormal", "pareto", "uniform"] = key(
        "none",
        "lognormal: exp(spread z); pareto: at least 1, with tail index spread; uniform: in [1, 1 + spread)",
    )
    spread: float = key(1.0, "see name", gt=0, le=1000)
    each_round: bool = key(True, "drawn anew in each round; false: once for each client")


class CorruptionConfig(Node):
    """Updates that arrive broken, to see what the server does with them; what stays with their clients is whole."""

    probability: float = key(0.0, "of an update", "probability", ge=0, le=1)
    kind: Literal["nan", "inf", "scaled"] = key(
        "nan", "nan, inf: a value of each factor becomes that; scaled: the update is multiplied by scale"
    )
    scale: float = key(100.0, "kind=scaled: factor on the update")


class ClientsConfig(Node):
    """How reliable clients are, and how fast; a simulated clock runs where devices are given."""

    availability: float = key(
        1.0, "probability with which a client can be drawn in a round", "probability", gt=0, le=1
    )
    outages: tuple[OutageConfig, ...] = key(
        (),
        "clients that cannot be drawn in some rounds, such as [{from_round: 3, until_round: 5, share: 0.5}]",
    )
    dropout: float = key(
        0.0, "probability with which a drawn client never reports back", "probability", ge=0, lt=1
    )
    over_selection: float = key(
        1.0,
        "clients drawn for each one wanted, rounded up; the server goes on with the first that report",
        ge=1,
        le=100,
    )
    deadline_s: float | None = key(
        None,
        "simulated seconds after which the server no longer waits for a client; null: it waits for all",
        "seconds",
        gt=0,
    )
    devices: tuple[DeviceConfig, ...] = key(
        (),
        "one for all clients, or one for each resource tier in their order, such as [{tokens_per_s: 500, "
        "uplink_mbps: 10, downlink_mbps: 50}]; empty: no clock",
    )
    slowness: SlownessConfig = Field(default_factory=SlownessConfig)
    corruption: CorruptionConfig = Field(default_factory=CorruptionConfig)
