"""The unit of work of a process: a pack of clients."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    """

    client_id: int
    examples: NDArray[np.int64]
    num_tokens: int
    local_epochs: int | None
    local_steps: int | None
    cost_tokens: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Clients that train together on one process. Its content does not depend on the number of processes."""

    index: int
    jobs: tuple[ClientJob, ...]

    @property
    def cost_tokens(self) -> int:
        """Tokens that the pack will process."""
        return sum(job.cost_tokens for job in self.jobs)


def pack_cohort(jobs: Sequence[ClientJob], max_clients: int) -> tuple[Pack, ...]:
    """Cut a cohort into packs of at most `max_clients`, of about equal cost.

    The most expensive client comes first and goes to the pack with the least so far, so packs differ little in cost.
    The result depends on the jobs alone.
    """
    num_packs = -(-len(jobs) // max_clients)
    packs: list[list[ClientJob]] = [[] for _ in range(num_packs)]
    loads = [0] * num_packs
    for job in sorted(jobs, key=lambda job: (-job.cost_tokens, job.client_id)):
        open_packs = [index for index in range(num_packs) if len(packs[index]) < max_clients]
        lightest = min(open_packs, key=lambda index: (loads[index], index))
        packs[lightest].append(job)
        loads[lightest] += job.cost_tokens
    return tuple(Pack(index, tuple(members)) for index, members in enumerate(packs))
