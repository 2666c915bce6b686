"""Adapters and updates between processes, streamed module by module.

Shapes: K clients in the cohort; of module m, client k has A (r_km, i_m) and B (o_m, r_km).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.comm.group import Group
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, Side, Sides, absent
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport, ClientUpdate


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


def gather_reports(group: Group, updates: Sequence[ClientUpdate]) -> tuple[ClientReport, ...]:
    """The reports of the whole cohort, in client_id order, on every rank.

    Raises:
        AggregationError: a client was trained twice.
    """
    group.note_part("gathering the reports")
    everywhere = group.gather_objects([update.report for update in updates])
    reports = sorted((report for part in everywhere for report in part), key=lambda report: report.client_id)
    ids = [report.client_id for report in reports]
    if len(set(ids)) < len(ids):
        raise AggregationError(f"a client must be trained once a round, got client_id {ids}")
    return tuple(reports)


def gather_stacks(
    group: Group, updates: Sequence[ClientUpdate], modules: Sequence[str], sides: Sides = BOTH
) -> Iterator[tuple[str, tuple[LoraFactors, ...]]]:
    """All-gather the cohort's factors, one module at a time: a rank never holds more than one module's stack.

    Each item is one collective, so every rank must consume the whole stream.

    Args:
        group: the processes.
        updates: this rank's clients, any number, none included.
        modules: of every client's adapter, in order; they are in the stream even if there is no client.
        sides: factors that travel; the others are `absent` in the stream.

    Yields:
        (module, factors of all K clients in client_id order), on the group's device.

    Raises:
        AggregationError: clients disagree about the modules or dtypes.
    """
    mine = {
        update.report.client_id: {
            module: FactorsShape.of(factors) for module, factors in update.adapter.items()
        }
        for update in updates
    }
    by_rank: list[dict[int, dict[str, FactorsShape]]] = group.gather_objects(mine)
    shapes = [shape for part in by_rank for shape in part.values()]
    if any(list(shape) != list(modules) for shape in shapes):
        raise AggregationError("all clients of a round must train the same modules in the same order")
    if len({shape.dtype for client in shapes for shape in client.values()}) > 1:
        raise AggregationError("all clients of a round must hold factors of one dtype")
    adapters = {update.report.client_id: update.adapter for update in updates}
    for module in modules:
        yield module, _gather_module(group, module, adapters, by_rank, sides) if shapes else ()


def _gather_module(
    group: Group,
    module: str,
    adapters: Mapping[int, AdapterState],
    by_rank: Sequence[Mapping[int, Mapping[str, FactorsShape]]],
    sides: Sides,
) -> tuple[LoraFactors, ...]:
    """One module's factors of all clients, in client_id order. Each rank sends one buffer, padded to the longest."""
    lengths = [sum(shapes[module].num_values(sides) for shapes in part.values()) for part in by_rank]
    dtype = next(shapes[module].dtype for part in by_rank for shapes in part.values())
    buffer = torch.zeros(max(lengths), dtype=dtype, device=group.device)
    position = 0
    for client in by_rank[group.rank]:
        flat = flatten(adapters[client][module], sides)
        buffer[position : position + flat.numel()] = flat
        position += flat.numel()
    group.note_part(f"gathering the factors of {module}")
    # nothing travels: an empty buffer is not worth a collective, and every rank knows
    everywhere = group.all_gather(buffer) if max(lengths) else [buffer] * group.world_size
    received: dict[int, LoraFactors] = {}
    for part, data in zip(by_rank, everywhere, strict=True):
        position = 0
        for client, shapes in part.items():
            shape = shapes[module]
            end = position + shape.num_values(sides)
            received[client] = shape.unflatten(data[position:end], sides)
            position = end
    return tuple(received[client] for client in sorted(received))


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
