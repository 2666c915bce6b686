"""Which process trains which pack."""

import heapq
from collections.abc import Sequence


def place(costs: Sequence[float], world_size: int) -> tuple[tuple[int, ...], ...]:
    """Deal packs to ranks: the most expensive first, each to the rank with the least so far.

    Ties go to the lower pack index and the lower rank, so every rank computes the same placement.

    Args:
        costs: expected cost of each pack, in any unit.
        world_size: number of ranks; may exceed the number of packs.

    Returns:
        For each rank, the indices of its packs in the order it trains them (most expensive first).
    """
    loads = [(0.0, rank) for rank in range(world_size)]
    placed: list[list[int]] = [[] for _ in range(world_size)]
    for pack in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, rank = heapq.heappop(loads)
        placed[rank].append(pack)
        heapq.heappush(loads, (load + costs[pack], rank))
    return tuple(tuple(packs) for packs in placed)
