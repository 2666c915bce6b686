"""Bytes that processes exchange in a round, from shapes alone.

Letters: r = LoRA rank, i / o = in / out features of a module.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsim.lora.plan import Sides


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one process sends and receives in a round as tensors; small Python objects are not counted.

    Attributes:
        gathered_bytes: it sends to the owners of modules, padding to the longest rank's included.
        received_bytes: the owner that gets most gets, its own part included.
        broadcast_bytes: of the new adapter that goes from rank 0 to each.
        longest_shares: of each module, the bytes that it puts in.
        module_bytes: of each module, the factors of the whole cohort.
    """

    gathered_bytes: int
    received_bytes: int
    broadcast_bytes: int
    longest_shares: tuple[int, ...]
    module_bytes: tuple[int, ...]


def round_traffic(
    targets: Mapping[str, tuple[int, int]],
    lora_ranks: Sequence[Sequence[Mapping[str, int]]],
    sides: Sides,
    global_ranks: Mapping[str, int],
    factor_bytes: int,
    owners: Mapping[str, int],
    sent_bytes: int | None = None,
) -> Traffic:
    """The exchange of a round, as `gather_stacks` and `broadcast_state` do it.

    Args:
        targets: module -> (i, o).
        lora_ranks: for each process, module -> r of each adapter that it sends.
        sides: factors that travel.
        global_ranks: module -> r of the global adapter.
        factor_bytes: bytes of a factor's value.
        owners: module -> process that aggregates it.
        sent_bytes: bytes of a value of what is sent; None for factor_bytes.
    """
    longest, whole = [], []
    value_bytes = factor_bytes if sent_bytes is None else sent_bytes
    for module, (i, o) in targets.items():
        width = (i if "A" in sides else 0) + (o if "B" in sides else 0)
        loads = [sum(ranks[module] for ranks in clients) * width * value_bytes for clients in lora_ranks]
        longest.append(max(loads))
        whole.append(sum(loads))
    world_size = len(lora_ranks)
    received = dict.fromkeys(owners.values(), 0)
    for module, share in zip(targets, longest, strict=True):
        received[owners[module]] += share * world_size
    alone = world_size == 1  # nothing leaves a process that is alone
    new_state = sum(global_ranks[module] * (i + o) for module, (i, o) in targets.items()) * factor_bytes
    return Traffic(
        gathered_bytes=0 if alone else sum(longest),
        received_bytes=0 if alone else max(received.values(), default=0),
        broadcast_bytes=0 if alone else new_state,
        longest_shares=tuple(longest),
        module_bytes=tuple(whole),
    )
