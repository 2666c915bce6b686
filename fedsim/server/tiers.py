"""Resource tiers: which LoRA ranks each client has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ConfigError
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.seeding import numpy_generator


@dataclass(frozen=True, slots=True)
class Tiers:
    """LoRA ranks by resource tier, and the tier of each client; fixed for the whole run.

    Attributes:
        ranks: for each tier, module -> LoRA rank.
        tier_of: (number of clients,) int64.
    """

    ranks: tuple[Mapping[str, int], ...]
    tier_of: NDArray[np.int64]

    def lora_ranks(self, client_id: int) -> Mapping[str, int]:
        """Module -> LoRA rank of a client, the same object for all of its tier; the pooled client has the largest."""
        return self.max_ranks if client_id == POOLED_CLIENT else self.ranks[int(self.tier_of[client_id])]

    @property
    def max_ranks(self) -> Mapping[str, int]:
        """Module -> largest LoRA rank of any client."""
        present = [self.ranks[tier] for tier in np.unique(self.tier_of)]
        return {module: max(ranks[module] for ranks in present) for module in present[0]}

    @property
    def are_mixed(self) -> bool:
        """Whether clients differ."""
        present = [self.ranks[tier] for tier in np.unique(self.tier_of)]
        return any(ranks != present[0] for ranks in present)

    @property
    def num_clients(self) -> tuple[int, ...]:
        """Clients of each tier."""
        return tuple(np.bincount(self.tier_of, minlength=len(self.ranks)).tolist())


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


def draw_tiers(
    ranks: Sequence[Mapping[str, int]], shares: Sequence[float], num_clients: int, seed: int
) -> Tiers:
    """Give each client a tier, independently of the others, with the probabilities `shares`; stream (seed, "tiers")."""
    probabilities = np.asarray(shares, dtype=np.float64) / sum(shares)
    drawn = numpy_generator(seed, "tiers").choice(len(ranks), size=num_clients, p=probabilities)
    return Tiers(tuple(ranks), drawn.astype(np.int64))
