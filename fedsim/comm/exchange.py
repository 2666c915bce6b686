"""Adapters and updates between processes, streamed module by module.

Shapes: K clients in the cohort; of module m, client k has A (r_km, i_m) and B (o_m, r_km).
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.comm.group import Group
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, Side, Sides, absent
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport


@dataclass(frozen=True, slots=True)
class FactorsShape:
    """Everything about a module's factors but their values."""

    lora_rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype

    @classmethod
    def of(cls, factors: LoraFactors) -> "FactorsShape":
        """The shape of `factors`."""
        return cls(factors.rank, factors.A.shape[1], factors.B.shape[0], factors.scaling, factors.A.dtype)

    def num_values(self, sides: Sides = BOTH) -> int:
        """Values in these sides."""
        return self.lora_rank * sum(
            features
            for side, features in (("A", self.in_features), ("B", self.out_features))
            if side in sides
        )

    def unflatten(self, flat: Tensor, sides: Sides = BOTH) -> LoraFactors:
        """Factors whose sides are views of `flat`, (num_values(sides),); sides that are not in it are `absent`."""
        shapes: dict[Side, tuple[int, int]] = {
            "A": (self.lora_rank, self.in_features),
            "B": (self.out_features, self.lora_rank),
        }
        tensors: dict[Side, Tensor] = {}
        position = 0
        for side, shape in shapes.items():
            if side in sides:
                tensors[side] = flat[position : position + math.prod(shape)].view(shape)
                position += math.prod(shape)
            else:
                tensors[side] = absent(shape, flat.dtype, flat.device)
        return LoraFactors(tensors["A"], tensors["B"], self.scaling)


def flatten(factors: LoraFactors, sides: Sides = BOTH) -> Tensor:
    """(values of these sides,): A and then B, row by row."""
    parts = [getattr(factors, side).reshape(-1) for side in sorted(sides)]
    return torch.cat(parts) if parts else factors.A.new_empty(0)


def gather_reports(group: Group, mine: Sequence[ClientReport]) -> tuple[ClientReport, ...]:
    """The reports of the whole cohort, in client_id order, on every rank.

    Raises:
        AggregationError: a client was trained twice.
    """
    group.note_part("gathering the reports")
    everywhere = group.gather_objects(list(mine))
    reports = sorted((report for part in everywhere for report in part), key=lambda report: report.client_id)
    ids = [report.client_id for report in reports]
    if len(set(ids)) < len(ids):
        raise AggregationError(f"a client must be trained once a round, got client_id {ids}")
    return tuple(reports)


def gather_stacks(
    group: Group,
    adapters: Mapping[int, AdapterState],
    owners: Mapping[str, int],
    sides: Sides = BOTH,
    device: torch.device | None = None,
) -> Iterator[tuple[str, tuple[LoraFactors, ...]]]:
    """Send the factors of each module to the rank that owns it, one module after another.

    Each module is one collective, so every rank must consume the whole stream. While an owner works on what it got, the
    next `AHEAD` modules for every owner are already on their way; a rank never holds more than these, and the one it
    works on.

    Args:
        group: the processes.
        adapters: what this rank sends, by number: client_id, or whatever decides the order; none is fine.
        owners: module -> rank that gets it, for the modules of every adapter, in the order in which they travel.
        sides: factors that travel; the others are `absent` in the stream.
        device: of the factors in the stream; None for the group's. Each rank's buffer goes there in one piece.

    Yields:
        (module, factors of all K adapters in the order of their numbers) for the modules that this rank owns; they are
        in the stream even if nobody sends anything.

    Raises:
        AggregationError: adapters disagree about the modules or dtypes, or two have one number.
    """
    mine = {number: _shapes(adapter) for number, adapter in adapters.items()}
    by_rank: list[dict[int, dict[str, FactorsShape]]] = group.gather_objects(mine)
    shapes = [shape for part in by_rank for shape in part.values()]
    if any(shape.keys() != owners.keys() for shape in shapes):
        raise AggregationError("all clients of a round must train the same modules")
    if len({shape.dtype for client in shapes for shape in client.values()}) > 1:
        raise AggregationError("all clients of a round must hold factors of one dtype")
    if len({number for part in by_rank for number in part}) < len(shapes):
        raise AggregationError("what two processes send for a round must not have one number")
    under_way: deque[tuple[str, Callable[[], tuple[LoraFactors, ...]]]] = deque()
    limit = AHEAD * len(set(owners.values()))
    for module, owner in owners.items():
        under_way.append((module, _start_module(group, module, owner, adapters, by_rank, sides, device)))
        if len(under_way) > limit:
            yield from _arrived(group, owners, *under_way.popleft())
    while under_way:
        yield from _arrived(group, owners, *under_way.popleft())


AHEAD = 2
"""Modules for each owner that travel while it works on another one."""


def _arrived(
    group: Group, owners: Mapping[str, int], module: str, finish: Callable[[], tuple[LoraFactors, ...]]
) -> Iterator[tuple[str, tuple[LoraFactors, ...]]]:
    """Wait for a module; it is an item of the stream on its owner only."""
    group.note_part(f"gathering the factors of {module}")
    cohort = finish()
    if owners[module] == group.rank:
        yield module, cohort


def _start_module(
    group: Group,
    module: str,
    owner: int,
    adapters: Mapping[int, AdapterState],
    by_rank: Sequence[Mapping[int, Mapping[str, FactorsShape]]],
    sides: Sides,
    device: torch.device | None,
) -> Callable[[], tuple[LoraFactors, ...]]:
    """Begin to send one module to its owner, each rank one buffer, padded to the longest.

    Returns:
        Waits for it; the factors in the order of their numbers on the owner, nothing elsewhere.
    """
    lengths = [sum(shapes[module].num_values(sides) for shapes in part.values()) for part in by_rank]
    if not max(lengths):  # nothing travels: an empty buffer is not worth a collective, and every rank knows
        empty = torch.empty(0, dtype=_dtype(module, by_rank), device=group.device)
        return lambda: _unpacked(module, by_rank, [empty] * group.world_size, sides, device)
    parts = [
        getattr(adapters[number][module], side).reshape(-1).to(group.device)
        for number in by_rank[group.rank]
        for side in sorted(sides)
    ]
    padding = max(lengths) - lengths[group.rank]
    buffer = torch.cat([*parts, torch.zeros(padding, dtype=_dtype(module, by_rank), device=group.device)])
    finish = group.start_gather(buffer, owner)
    return lambda: _unpacked(module, by_rank, finish(), sides, device)


def _dtype(module: str, by_rank: Sequence[Mapping[int, Mapping[str, FactorsShape]]]) -> torch.dtype:
    found = (shapes[module].dtype for part in by_rank for shapes in part.values())
    return next(found, torch.float32)


def _unpacked(
    module: str,
    by_rank: Sequence[Mapping[int, Mapping[str, FactorsShape]]],
    everywhere: Sequence[Tensor],
    sides: Sides,
    device: torch.device | None,
) -> tuple[LoraFactors, ...]:
    """The factors that lie in the buffers of all ranks, in the order of their numbers; none without buffers."""
    received: dict[int, LoraFactors] = {}
    for part, buffer in zip(by_rank, everywhere, strict=False):
        data = buffer if device is None else buffer.to(device)
        position = 0
        for number, shapes in part.items():
            end = position + shapes[module].num_values(sides)
            received[number] = shapes[module].unflatten(data[position:end], sides)
            position = end
    return tuple(received[number] for number in sorted(received))


def broadcast_adapter(group: Group, adapter: AdapterState | None) -> AdapterState:
    """Rank 0's adapter on every rank, on the group's device, one message a module; other ranks pass None."""
    if group.world_size == 1:
        assert adapter is not None
        return adapter
    mine = None if adapter is None else _shapes(adapter)
    shapes: dict[str, FactorsShape] = group.broadcast_object(mine)
    return AdapterState(
        {
            module: _broadcast_factors(
                group, shape, adapter[module] if group.rank == 0 and adapter is not None else None, 0
            )
            for module, shape in shapes.items()
        }
    )


def _shapes(adapter: AdapterState) -> dict[str, FactorsShape]:
    return {module: FactorsShape.of(factors) for module, factors in adapter.items()}


def _broadcast_factors(
    group: Group, shape: FactorsShape, factors: LoraFactors | None, source: int
) -> LoraFactors:
    """Factors of rank `source`, which passes them, on every rank."""
    if factors is None:
        flat = torch.empty(shape.num_values(), dtype=shape.dtype, device=group.device)
    else:
        flat = flatten(factors).to(group.device)
    return shape.unflatten(group.broadcast(flat, source))


def broadcast_state(group: Group, known: ServerState | None, state: ServerState | None) -> ServerState:
    """Rank 0's new server state on every rank, on the group's device.

    Args:
        group: the processes.
        known: the state that every rank already holds; adapters that the new state took over from it, as the same
            objects, are not sent again. None at the start of a run.
        state: the new state on rank 0, ignored elsewhere.
    """
    if group.world_size == 1:
        assert state is not None
        return state.to(group.device)
    group.note_part("sending the new state")
    before = {} if known is None else known.adapters()
    plan = None
    mine: Mapping[str, AdapterState] = {}
    if group.rank == 0:
        assert state is not None
        mine = state.adapters()
        sent = {name: before.get(name) is not entry for name, entry in mine.items()}
        versions = state.client_versions
        is_known = known is not None and versions is known.client_versions
        plan = (state.round_index, None if is_known else dict(versions), state.best, state.simulated_s, sent)
    round_index, versions, best, simulated_s, sent = group.broadcast_object(plan)
    entries = {
        name: broadcast_adapter(group, mine.get(name)) if is_new else before[name]
        for name, is_new in sent.items()
    }
    if versions is None:
        assert known is not None
        versions = known.client_versions
    bare = ServerState(
        round_index, AdapterState({}), client_versions=versions, best=best, simulated_s=simulated_s
    )
    return bare.with_adapters(entries)


def share_modules(group: Group, part: AdapterState, modules: Sequence[str]) -> AdapterState:
    """An adapter of which each rank holds some modules, whole and on the group's device on every rank.

    Args:
        group: the processes.
        part: the modules that this rank worked out, none included.
        modules: the order of all modules; those that no rank holds are left out.
    """
    group.note_part("sharing the aggregated modules")
    by_rank: list[dict[str, FactorsShape]] = group.gather_objects(_shapes(part))
    owner = {module: rank for rank, shapes in enumerate(by_rank) for module in shapes}
    return AdapterState(
        {
            module: _broadcast_factors(
                group,
                by_rank[owner[module]][module],
                part[module] if owner[module] == group.rank else None,
                owner[module],
            )
            for module in modules
            if module in owner
        }
    )
