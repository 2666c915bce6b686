"""Which clients of a cohort report back, and when, on a simulated clock.

Everything here follows from (seed, round) and from what the clients do: the same on every process, and nothing is
carried from round to round but the clock itself, which is in `ServerState`. A client that does not report back is not
trained: what it would have computed never reaches the server.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.seeding import numpy_generator
from fedsim.training.packs import ClientJob

SlownessName = Literal["none", "lognormal", "pareto", "uniform"]


@dataclass(frozen=True, slots=True)
class Device:
    """The hardware and the link of one resource tier, as simulated.

    Attributes:
        tokens_per_s: tokens of local training.
        uplink_bytes_per_s: from the client to the server.
        downlink_bytes_per_s: from the server to the client.
    """

    tokens_per_s: float
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Slowness:
    """A random factor on the time that local training takes.

        lognormal: exp(spread * z), z standard normal;  pareto: (1 - u)^(-1 / spread), u uniform in [0, 1), at least 1;
        uniform: 1 + spread * u

    Attributes:
        name: of the distribution; "none" for a factor of 1.
        spread: see above.
        each_round: drawn anew in each round; else once for each client.
    """

    name: SlownessName = "none"
    spread: float = 1.0
    each_round: bool = True

    def factors(self, num_clients: int, seed: int, round_index: int) -> NDArray[np.float64]:
        """(num_clients,) factors > 0, from the stream (seed, "client_slowness") or, by round, (.., round)."""
        key = (round_index,) if self.each_round else ()
        generator = numpy_generator(seed, "client_slowness", *key)
        if self.name == "lognormal":
            return np.exp(self.spread * generator.standard_normal(num_clients))
        if self.name == "pareto":
            return np.asarray((1.0 - generator.random(num_clients)) ** (-1.0 / self.spread))
        if self.name == "uniform":
            return np.asarray(1.0 + self.spread * generator.random(num_clients))
        return np.ones(num_clients)


@dataclass(frozen=True, slots=True)
class Outage:
    """Clients that cannot be drawn in some rounds.

    Attributes:
        from_round: first round.
        until_round: first round in which they are back.
        client_ids: who; empty for a share of all clients.
        share: of all clients, drawn once for the outage and rounded down.
    """

    from_round: int
    until_round: int
    client_ids: tuple[int, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Participation:
    """How reliable clients are, and how long the server waits for them.

    Attributes:
        availability: probability with which a client can be drawn in a round.
        outages: clients that certainly cannot.
        dropout: probability with which a drawn client never reports back.
        over_selection: clients drawn for each one wanted; the server goes on with the first ones that report.
        deadline_s: simulated seconds after which the server no longer waits; None to wait for all.
        devices: none without a clock, one for all clients, or one for each resource tier.
        tier_of: (number of clients,) resource tier of each client.
        slowness: random factor on local training.
    """

    availability: float = 1.0
    outages: tuple[Outage, ...] = ()
    dropout: float = 0.0
    over_selection: float = 1.0
    deadline_s: float | None = None
    devices: tuple[Device, ...] = ()
    tier_of: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    slowness: Slowness = field(default_factory=Slowness)

    @property
    def has_clock(self) -> bool:
        """Whether simulated times are known."""
        return bool(self.devices)

    def available(self, num_clients: int, seed: int, round_index: int) -> NDArray[np.int64]:
        """The clients that can be drawn in a round, ascending.

        From the streams (seed, "client_availability", round) and (seed, "client_outage", index of the outage).
        """
        present = np.ones(num_clients, dtype=bool)
        if self.availability < 1:
            tosses = numpy_generator(seed, "client_availability", round_index).random(num_clients)
            present &= tosses < self.availability
        for index, outage in enumerate(self.outages):
            if outage.from_round <= round_index < outage.until_round:
                present[self._away(outage, index, num_clients, seed)] = False
        return np.flatnonzero(present)

    @staticmethod
    def _away(outage: Outage, index: int, num_clients: int, seed: int) -> NDArray[np.int64]:
        if outage.client_ids:
            return np.asarray(outage.client_ids, dtype=np.int64)
        order = numpy_generator(seed, "client_outage", index).permutation(num_clients)
        return order[: int(outage.share * num_clients + 1e-9)]

    def client_seconds(
        self,
        jobs: Sequence[ClientJob],
        traffic: Mapping[int, tuple[int, int]],
        seed: int,
        round_index: int,
    ) -> dict[int, float]:
        """Simulated seconds from the server's first byte to the client's last one, by client; empty without a clock.

            T_k = downlink_bytes / downlink + slowness_k * tokens_k / tokens_per_s + uplink_bytes / uplink

        Args:
            jobs: what the clients do; their `cost_tokens` are tokens_k.
            traffic: client -> (bytes received, bytes sent).
            seed: of the run.
            round_index: from 0.
        """
        if not self.has_clock:
            return {}
        slow = self.slowness.factors(len(self.tier_of), seed, round_index)
        seconds = {}
        for job in jobs:
            client = job.client_id
            device = self.devices[int(self.tier_of[client]) if len(self.devices) > 1 else 0]
            received, sent = traffic[client]
            seconds[client] = (
                received / device.downlink_bytes_per_s
                + float(slow[client]) * job.cost_tokens / device.tokens_per_s
                + sent / device.uplink_bytes_per_s
            )
        return seconds

    def turnout(
        self,
        client_ids: Sequence[int],
        wanted: int,
        seconds: Mapping[int, float],
        seed: int,
        round_index: int,
        num_clients: int,
    ) -> "Turnout":
        """Who reports back, from the stream (seed, "client_dropout", round).

        Args:
            client_ids: that were drawn.
            wanted: reports that the server waits for.
            seconds: simulated, see `client_seconds`.
            seed: of the run.
            round_index: from 0.
            num_clients: of the federation.
        """
        lost: set[int] = set()
        if self.dropout > 0:
            tosses = numpy_generator(seed, "client_dropout", round_index).random(num_clients)
            lost = {client for client in client_ids if tosses[client] < self.dropout}
        left = [client for client in client_ids if client not in lost]
        deadline = float("inf") if self.deadline_s is None else self.deadline_s
        in_time = [client for client in left if seconds.get(client, 0.0) <= deadline]
        in_time.sort(key=lambda client: (seconds.get(client, 0.0), client))
        accepted = sorted(in_time[:wanted])
        round_s = None
        if self.has_clock:
            last = max((seconds[client] for client in accepted), default=0.0)
            # a server that still waits for somebody gives up at the deadline; without one it is told who is lost
            still_waits = len(accepted) < wanted and len(accepted) < len(client_ids)
            round_s = deadline if still_waits and self.deadline_s is not None else last
        return Turnout(
            tuple(accepted),
            num_drawn=len(client_ids),
            num_lost=len(lost),
            num_late=len(left) - len(in_time),
            num_surplus=len(in_time) - len(accepted),
            seconds=dict(seconds),
            round_s=round_s,
            lost=frozenset(lost),
        )


@dataclass(frozen=True, slots=True)
class Turnout:
    """The clients of a round that report back, and those that do not.

    Attributes:
        reporting: ascending.
        num_drawn: clients that were drawn.
        num_lost: of these, clients that dropped out.
        num_late: clients that needed longer than the deadline.
        num_surplus: clients that reported when the server had enough.
        seconds: simulated, of each drawn client; empty without a clock.
        round_s: simulated seconds of the round; None without a clock.
        lost: the clients that dropped out.
        unused_downlink_bytes: what clients received that do not report back.
        unused_uplink_bytes: what clients sent that were too late, or not needed.
    """

    reporting: tuple[int, ...]
    num_drawn: int
    num_lost: int
    num_late: int
    num_surplus: int
    seconds: Mapping[int, float]
    round_s: float | None
    lost: frozenset[int] = frozenset()
    unused_downlink_bytes: int = 0
    unused_uplink_bytes: int = 0
