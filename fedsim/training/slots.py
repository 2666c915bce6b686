"""Which clients of a pack train at the same time: slots, refilled longest first."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """Who trains in which slot, and when; it follows from the step counts alone.

    Attributes:
        queues: for each slot, its clients (positions in the pack) one after another.
        num_steps: steps until all clients are done.
        occupancy: share of slot-steps in which a client trained.
    """

    queues: tuple[tuple[int, ...], ...]
    num_steps: int
    occupancy: float


def plan_slots(steps: Sequence[int], max_slots: int) -> SlotPlan:
    """Deal clients to slots: the longest first, each to the slot that is free earliest.

    Args:
        steps: optimizer steps of each client, > 0.
        max_slots: clients that train at the same time.
    """
    num_slots = min(max_slots, len(steps))
    free = [(0, slot) for slot in range(num_slots)]
    queues: list[list[int]] = [[] for _ in range(num_slots)]
    for client in sorted(range(len(steps)), key=lambda index: (-steps[index], index)):
        time, slot = heapq.heappop(free)
        queues[slot].append(client)
        heapq.heappush(free, (time + steps[client], slot))
    num_steps = max(time for time, _ in free)
    return SlotPlan(tuple(map(tuple, queues)), num_steps, sum(steps) / (num_slots * num_steps))
