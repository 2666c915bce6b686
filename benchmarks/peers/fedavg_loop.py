"""FedAvg over the processes of torchrun, for the peers that bring no server of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from workload import Step, Workload, deal, end_of_round, save_result, trained


def run(
    workload: Workload,
    out: Path,
    model: Any,
    train: Callable[[Any, list[Step], dict[str, Any]], None],
    rank: int,
) -> None:
    """All rounds: clients dealt by cost, a weighted sum on each process, one flat all-reduce at the end of a round."""
    live = trained(model)
    weights = workload.settings["client_weights"]
    for round_index, clients in enumerate(workload.rounds):
        start = [value.detach().clone() for value in live.values()]
        total = [torch.zeros_like(value) for value in start]
        mine = deal(workload.costs(round_index), dist.get_world_size())[rank]
        for client in mine:
            with torch.no_grad():
                for value, before in zip(live.values(), start, strict=True):
                    value.copy_(before)
            train(model, clients[client], workload.settings)
            with torch.no_grad():
                for sums, value in zip(total, live.values(), strict=True):
                    sums.add_(value, alpha=weights[client])
        flat = torch.cat([value.flatten() for value in total])
        dist.all_reduce(flat)
        with torch.no_grad():
            for value, part in zip(live.values(), flat.split([t.numel() for t in total]), strict=True):
                value.copy_(part.view_as(value))
        if rank == 0:
            end_of_round(out)
    if rank == 0:
        save_result(out, dict(live))
