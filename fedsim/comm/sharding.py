"""The processes that share one copy of a base that none of them holds whole."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fedsim.comm.group import Group
from fedsim.errors import ConfigError


class ShardingGroup:
    """The ranks that share one copy of the base.

    Args:
        group: all processes; each of them makes it.
        size: ranks of a group; None for all.
        offload: keep the parts in the memory of the CPU, and gather on the GPU.
        timeout_s: after which an exchange among them fails.

    Raises:
        ConfigError: the group's size does not divide the number of processes; on all of them.
        LostRankError: some process does not take part.
    """

    def __init__(self, group: Group, size: int | None, offload: bool, timeout_s: float = 1800.0) -> None:
        rank, world_size = group.rank, group.world_size
        self.size = world_size if size is None else size
        if self.size < 2 or world_size % self.size:
            raise ConfigError(
                "model.sharding=zero3 needs a number of processes that is a multiple of model.sharding_group_size, at "
                f"least 2, got {world_size} processes and groups of {self.size}; start another number, or set "
                f"model.sharding=none"
            )
        self.index = rank % self.size
        self.offload = offload
        self._all = group
        self.group: Any = None
        group.note("making the sharding groups")
        for first in range(0, world_size, self.size):  # every rank takes part in making every group
            with group.exchange():
                made = dist.new_group(
                    list(range(first, first + self.size)), timeout=timedelta(seconds=timeout_s)
                )
            if first <= rank < first + self.size:
                self.group = made

    def highest(self, value: int) -> int:
        """The largest value that any of them gives; each of them calls it.

        Raises:
            LostRankError: one of them does not.
        """
        told = torch.tensor([value], device=self._all.device)
        with self._all.exchange(of_all=False):
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
            return int(told.item())

    # what DeepSpeed asks of a "model parallel unit"; each rank is a data-parallel one of its group
    def get_data_parallel_group(self) -> Any:
        """Ranks that share the weights."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """How many."""
        return self.size

    def get_data_parallel_rank(self) -> int:
        """The place among them."""
        return self.index

    def get_model_parallel_group(self) -> Any:
        """Nobody splits a layer."""
        return None

    def get_model_parallel_world_size(self) -> int:
        """Nobody splits a layer."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """Nobody splits a layer."""
        return 0
