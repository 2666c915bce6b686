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


def plan_slots_within(
    steps: Sequence[int], lora_ranks: Sequence[int], max_slots: int, max_rows: int
) -> tuple[SlotPlan, list[int]]:
    """The plan with the most slots whose rank rows are few enough; one slot may have more.

    Args:
        steps: optimizer steps of each client, > 0.
        lora_ranks: of each client.
        max_slots: clients that train at the same time.
        max_rows: rank rows of all slots together.

    Returns:
        The plan, and the largest LoRA rank that each of its slots will hold.
    """
    num_slots = min(max_slots, len(steps))
    while True:
        plan = plan_slots(steps, num_slots)
        capacities = [max(lora_ranks[client] for client in queue) for queue in plan.queues]
        if num_slots == 1 or sum(capacities) <= max_rows:
            return plan, capacities
        num_slots -= 1


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
