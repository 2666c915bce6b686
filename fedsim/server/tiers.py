"""Resource tiers: which LoRA ranks each client has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.config.strategy_traits import scaled_rank
from fedsim.errors import ConfigError
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.seeding import numpy_generator
from fedsim.server.flexlora_tiers import ATTENTION, DISTRIBUTIONS, FEED_FORWARD, TYPES, ResourceType


class Tier(NamedTuple):
    """A resource tier before clients are given to it: its name, module -> LoRA rank, and its share of the clients."""

    name: str
    ranks: Mapping[str, int]
    share: float


@dataclass(frozen=True, slots=True)
class Tiers:
    """LoRA ranks by resource tier, and the tier of each client, which is fixed for the whole run.

    Attributes:
        ranks: for each tier, module -> LoRA rank.
        tier_of: (number of clients,) int64.
        names: of the tiers, for people; empty where nobody named them.
        phases: first round, and what takes the place of `ranks` from it on, ascending; never larger than `ranks`.
    """

    ranks: tuple[Mapping[str, int], ...]
    tier_of: NDArray[np.int64]
    names: tuple[str, ...] = ()
    phases: tuple[tuple[int, tuple[Mapping[str, int], ...]], ...] = ()

    def lora_ranks(self, client_id: int, round_index: int) -> Mapping[str, int]:
        """Module -> LoRA rank of a client in a round; the pooled client has the largest.

        The same object for all clients of a tier in a round.
        """
        if client_id == POOLED_CLIENT:
            return self.max_ranks
        begun = [ranks for first_round, ranks in self.phases if first_round <= round_index]
        return (begun[-1] if begun else self.ranks)[int(self.tier_of[client_id])]

    @property
    def max_ranks(self) -> Mapping[str, int]:
        """Module -> largest LoRA rank of any client."""
        present = [self.ranks[tier] for tier in np.unique(self.tier_of)]
        return {module: max(ranks[module] for ranks in present) for module in present[0]}

    def ranks_with_clients(self) -> dict[int, Mapping[str, int]]:
        """Tier -> module -> LoRA rank, of the tiers that have clients."""
        return {tier: self.ranks[tier] for tier in np.unique(self.tier_of).tolist()}

    @property
    def are_mixed(self) -> bool:
        """Whether clients differ, or rounds do."""
        everywhere = [self.ranks, *(ranks for _, ranks in self.phases)]
        present = [ranks[tier] for ranks in everywhere for tier in np.unique(self.tier_of)]
        return any(ranks != present[0] for ranks in present)

    @property
    def num_clients(self) -> tuple[int, ...]:
        """Clients of each tier."""
        return tuple(np.bincount(self.tier_of, minlength=len(self.ranks)).tolist())

    def to_json(self) -> dict[str, object]:
        """Who has which LoRA ranks: `tiers`, in order, and `tier_of`, the tier of each client.

        `lora_ranks` of a tier is by the last part of the modules' names, with each rank that occurs there once.
        """
        names = self.names or tuple(f"tier {index}" for index in range(len(self.ranks)))
        return {
            "tiers": [
                {"name": name, "num_clients": count, "lora_ranks": _ranks_by_last_name(ranks)}
                for name, count, ranks in zip(names, self.num_clients, self.ranks, strict=True)
            ],
            "tier_of": self.tier_of.tolist(),
        }


def _ranks_by_last_name(ranks: Mapping[str, int]) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {}
    for module, rank in ranks.items():
        found.setdefault(module.rpartition(".")[2], set()).add(rank)
    return {name: sorted(values) for name, values in found.items()}


def module_ranks(modules: Sequence[str], lora_rank: int, exceptions: Mapping[str, int]) -> dict[str, int]:
    """Module -> LoRA rank, where some modules are excepted by their names, or the ends of their dotted names.

    Raises:
        ConfigError: an exception names no module, or two of them name one.
    """
    ranks = dict.fromkeys(modules, lora_rank)
    named: dict[str, str] = {}
    for name, rank in exceptions.items():
        chosen = [module for module in modules if module == name or module.endswith("." + name)]
        if not chosen:
            raise ConfigError(
                f"lora.tiers: module_ranks must name adapted modules or the ends of their names, got '{name}'; adapted "
                f"are {', '.join(dict.fromkeys(module.rpartition('.')[2] for module in modules))}"
            )
        for module in chosen:
            if module in named:
                raise ConfigError(
                    f"lora.tiers: module_ranks must name each module once, got '{named[module]}' and '{name}' for "
                    f"{module}"
                )
            named[module] = name
            ranks[module] = rank
    return ranks


def distributed_types(
    distribution: str, targets: Mapping[str, tuple[int, int]], rank_scale: float
) -> list[Tier]:
    """The types of arXiv 2402.11505 that one of its distributions gives to clients, on the modules of a model.

    Args:
        distribution: a name in `DISTRIBUTIONS`.
        targets: dotted module path -> (in features, out features).
        rank_scale: ranks are multiplied by it and rounded, halves up, to 1 at least.

    Raises:
        ConfigError: a module belongs to neither attention nor the feed-forward, or is too small for a rank.
    """
    shares = enumerate(zip(TYPES, DISTRIBUTIONS[distribution], strict=True), start=1)
    present = [(number, kind, share) for number, (kind, share) in shares if share > 0]
    published = {number: {m: _published_rank(kind, m) for m in targets} for number, kind, _ in present}
    fits = min(min(targets[m]) / rank for ranks in published.values() for m, rank in ranks.items())
    tiers = [
        Tier(
            f"type {number}",
            scaled_ranks(published[number], rank_scale),
            share,
        )
        for number, _, share in present
    ]
    remedy = f"; set lora.rank_scale to {math.floor(1000 * fits) / 1000:g} or less"
    check_ranks(tiers, targets, f"lora.distribution={distribution}, ", remedy)
    return tiers


def scaled_ranks(ranks: Mapping[str, int], scale: float) -> dict[str, int]:
    """Module -> LoRA rank times `scale`, rounded, halves up, to 1 at least."""
    return {module: scaled_rank(rank, scale) for module, rank in ranks.items()}


def with_phases(tiers: Tiers, phases: Sequence[tuple[int, float]]) -> Tiers:
    """The same tiers with ranks that change with the round.

    Args:
        tiers: with the largest ranks.
        phases: first round, and a factor on the ranks in (0, 1]; ascending.
    """
    scaled = [(first, tuple(scaled_ranks(ranks, scale) for ranks in tiers.ranks)) for first, scale in phases]
    return replace(tiers, phases=tuple(scaled))


def _published_rank(kind: ResourceType, module: str) -> int:
    last = module.rpartition(".")[2]
    if last in ATTENTION:
        return kind.attention
    if last in FEED_FORWARD:
        return kind.feed_forward
    raise ConfigError(
        f"lora.target_modules must be of attention ({', '.join(ATTENTION)}) or the feed-forward "
        f"({', '.join(FEED_FORWARD)}) when lora.distribution is set, got {module}; use lora.tiers instead"
    )


def check_ranks(
    tiers: Sequence[Tier], targets: Mapping[str, tuple[int, int]], where: str = "", remedy: str = ""
) -> None:
    """Check that no LoRA rank exceeds the smaller side of its module, in tiers that got no client as well.

    Args:
        tiers: their names say which one is wrong.
        targets: dotted module path -> (in features, out features).
        where: put before a tier's name.
        remedy: put at the end.

    Raises:
        ConfigError: a rank does.
    """
    for tier in tiers:
        for module, rank in tier.ranks.items():
            in_features, out_features = targets[module]
            side = min(in_features, out_features)
            if rank > side:
                raise ConfigError(
                    f"{where}{tier.name}: LoRA ranks must be at most {side}, the smaller side of {module} "
                    f"({out_features} x {in_features}), got {rank}{remedy}"
                )


def draw_tiers(tiers: Sequence[Tier], num_clients: int, seed: int) -> Tiers:
    """Give each client a tier, independently of the others, with the tiers' shares as probabilities.

    The shares are divided by their sum. From the stream (seed, "tiers").
    """
    shares = [tier.share for tier in tiers]
    probabilities = np.asarray(shares, dtype=np.float64) / sum(shares)
    drawn = numpy_generator(seed, "tiers").choice(len(tiers), size=num_clients, p=probabilities)
    names = tuple(tier.name for tier in tiers)
    return Tiers(tuple(tier.ranks for tier in tiers), drawn.astype(np.int64), names)


def tiers_by_size(modules: Sequence[str], sizes: NDArray[np.int64], largest_rank: int) -> Tiers:
    """LoRA ranks that grow with the clients' data, as in the code of HLoRA (arXiv 2503.00813).

        r_k = max(floor(o_k / K * r_max), 1),    o_k = clients with fewer examples than client k

    Clients with equally many examples have equal ranks, and where all have, everyone's is 1; r_max itself is never
    reached.

    Args:
        modules: that are adapted, each with the client's rank.
        sizes: (K,) int64, training examples of each client.
        largest_rank: r_max.
    """
    # Departs from HLoRA's code: all sizes are known from the start. There, K counts the clients seen so far, and a
    # client has r_max until its size is known.
    fewer = np.searchsorted(np.sort(sizes), sizes, side="left")
    ranks = np.maximum(fewer * largest_rank // len(sizes), 1)
    present, tier_of = np.unique(ranks, return_inverse=True)
    return Tiers(
        tuple(dict.fromkeys(modules, rank) for rank in present.tolist()),
        tier_of.astype(np.int64),
        tuple(f"rank {rank}" for rank in present.tolist()),
    )
