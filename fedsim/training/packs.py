"""The unit of work of a process: a pack of clients."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data.batches import local_batches
from fedsim.training.settings import LocalSettings


@dataclass(frozen=True, slots=True)
class ClientJob:
    """What one client does in a round. Exactly one of `local_epochs` and `local_steps` is set.

    Attributes:
        client_id: from 0, or `POOLED_CLIENT`.
        examples: (n,) int64 indices of its training examples in the token store.
        num_tokens: label tokens of these examples.
        local_epochs: passes over the examples.
        local_steps: optimizer steps.
        cost_tokens: tokens that its local run will process, for balance between processes.
        settings: how it trains.
    """

    client_id: int
    examples: NDArray[np.int64]
    num_tokens: int
    local_epochs: int | None
    local_steps: int | None
    cost_tokens: int
    settings: LocalSettings

    def batches(self, round_index: int) -> list[list[NDArray[np.int64]]]:
        """The examples of each micro-batch of each optimizer step of a round, in the client's seeded order."""
        steps = local_batches(
            len(self.examples),
            batch_size=self.settings.batch_size,
            local_epochs=self.local_epochs,
            local_steps=self.local_steps,
            accumulation=self.settings.accumulation,
            seed=self.settings.seed,
            round_index=round_index,
            client_id=self.client_id,
        )
        return [[self.examples[chosen] for chosen in micro_batches] for micro_batches in steps]


@dataclass(frozen=True, slots=True)
class Pack:
    """Clients that train together on one process. Its content does not depend on the number of processes."""

    index: int
    jobs: tuple[ClientJob, ...]

    @property
    def cost_tokens(self) -> int:
        """Tokens that the pack will process."""
        return sum(job.cost_tokens for job in self.jobs)


def pack_cohort(jobs: Sequence[ClientJob], num_packs: int) -> tuple[Pack, ...]:
    """Cut a cohort into `num_packs` packs of about equal cost, or into as many as there are clients.

    The most expensive client comes first and goes to the pack with the least so far. The result depends on the jobs
    alone, so it is the same for any number of processes.
    """
    packs: list[list[ClientJob]] = [[] for _ in range(min(num_packs, len(jobs)))]
    loads = [(0, index) for index in range(len(packs))]
    for job in sorted(jobs, key=lambda job: (-job.cost_tokens, job.client_id)):
        load, lightest = heapq.heappop(loads)
        packs[lightest].append(job)
        heapq.heappush(loads, (load + job.cost_tokens, lightest))
    return tuple(Pack(index, tuple(members)) for index, members in enumerate(packs))
