"""LoRA ranks by a function of the user's own (`lora.rank_policy`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ConfigError
from fedsim.own import call_own, shown
from fedsim.server.tiers import Tier, Tiers, check_ranks

KEY = "lora.rank_policy"


def tiers_by_policy(
    name: str, targets: Mapping[str, tuple[int, int]], sizes: NDArray[np.int64], lora_rank: int, seed: int
) -> Tiers:
    """The tiers that a function makes of the clients: those with equal LoRA ranks are one, in the order of appearance.

    The function is called once, on every process with the same arguments, and must answer the same:

        policy(targets, sizes, lora_rank, seed) -> for each client an int, or module -> int

    Args:
        name: `package.module:function`.
        targets: dotted module path -> (in features, out features).
        sizes: (K,) int64, training examples of each client.
        lora_rank: `lora.rank`, for the function's use.
        seed: `run.seed`, for the function's use.

    Raises:
        ConfigError: the function cannot be imported, or answers something else, or a rank does not fit its module.
    """
    answers = _answers(name, targets, sizes, lora_rank, seed)
    distinct: dict[tuple[int, ...], int] = {}
    tier_of = [
        distinct.setdefault(_ranks(name, k, answer, targets), len(distinct))
        for k, answer in enumerate(answers)
    ]
    tiers = [
        Tier(f"{KEY}={name}, tier {place}", dict(zip(targets, ranks, strict=True)), 1.0)
        for ranks, place in distinct.items()
    ]
    check_ranks(tiers, targets)
    names = tuple(f"rank {'/'.join(map(str, sorted(set(ranks))))}" for ranks in distinct)
    return Tiers(tuple(tier.ranks for tier in tiers), np.array(tier_of, dtype=np.int64), names)


def _answers(
    name: str, targets: Mapping[str, tuple[int, int]], sizes: NDArray[np.int64], lora_rank: int, seed: int
) -> Sequence[Any]:
    answers = call_own(
        KEY, name, "targets, sizes, lora_rank, seed", dict(targets), sizes.copy(), lora_rank, seed
    )
    if not isinstance(answers, Sequence | np.ndarray) or len(answers) != len(sizes):
        raise ConfigError(
            f"{KEY}={name} must return LoRA ranks of each of {len(sizes)} clients, got {shown(answers)}"
        )
    return list(answers)


def _ranks(name: str, client_id: int, answer: Any, targets: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """A client's LoRA ranks in the order of the modules."""
    by_module = answer if isinstance(answer, Mapping) else dict.fromkeys(targets, answer)
    ranks: list[Any] = [by_module.get(module) for module in targets]
    whole = all(
        isinstance(rank, int | np.integer) and not isinstance(rank, bool) and rank > 0 for rank in ranks
    )
    if not whole or len(by_module) != len(targets):
        raise ConfigError(
            f"{KEY}={name} must give each client a LoRA rank > 0, or one for each of the modules {', '.join(targets)}, "
            f"got {shown(answer)} for client {client_id}"
        )
    return tuple(int(rank) for rank in ranks)
