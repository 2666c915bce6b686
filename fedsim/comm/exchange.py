"""Adapters and updates between processes, streamed module by module.

Shapes: K clients in the cohort; of module m, client k has A (r_km, i_m) and B (o_m, r_km).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.comm.group import Group
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
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

    @property
    def num_parameters(self) -> int:
        """Values in A and B."""
        return self.lora_rank * (self.in_features + self.out_features)

    def unflatten(self, flat: Tensor) -> LoraFactors:
        """Factors whose A and B are views of `flat`, (num_parameters,)."""
        middle = self.lora_rank * self.in_features
        down, up = flat[:middle], flat[middle:]
        return LoraFactors(
            down.view(self.lora_rank, self.in_features),
            up.view(self.out_features, self.lora_rank),
            self.scaling,
        )


def flatten(factors: LoraFactors) -> Tensor:
    """(num_parameters,): A and then B, row by row."""
    return torch.cat([factors.A.reshape(-1), factors.B.reshape(-1)])


def gather_reports(group: Group, updates: Sequence[ClientUpdate]) -> tuple[ClientReport, ...]:
    """The reports of the whole cohort, in client_id order, on every rank.

    Raises:
        AggregationError: a client was trained twice.
    """
    everywhere = group.gather_objects([update.report for update in updates])
    reports = sorted((report for part in everywhere for report in part), key=lambda report: report.client_id)
    ids = [report.client_id for report in reports]
    if len(set(ids)) < len(ids):
        raise AggregationError(f"a client must be trained once a round, got client_id {ids}")
    return tuple(reports)


def gather_stacks(
    group: Group, updates: Sequence[ClientUpdate]
) -> Iterator[tuple[str, tuple[LoraFactors, ...]]]:
    """All-gather the cohort's factors, one module at a time: a rank never holds more than one module's stack.

    Each item is one collective, so every rank must consume the whole stream.

    Args:
        group: the processes.
        updates: this rank's clients, any number, none included.

    Yields:
        (module, factors of all K clients in client_id order), on the group's device, modules in the adapter's order.

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
    shapes = {client: shape for part in by_rank for client, shape in part.items()}
    if not shapes:
        return
    modules = list(next(iter(shapes.values())))
    if any(list(shape) != modules for shape in shapes.values()):
        raise AggregationError("all clients of a round must train the same modules in the same order")
    if len({shape.dtype for client in shapes.values() for shape in client.values()}) > 1:
        raise AggregationError("all clients of a round must hold factors of one dtype")
    adapters = {update.report.client_id: update.adapter for update in updates}
    for module in modules:
        yield module, _gather_module(group, module, adapters, by_rank)


def _gather_module(
    group: Group,
    module: str,
    adapters: Mapping[int, AdapterState],
    by_rank: Sequence[Mapping[int, Mapping[str, FactorsShape]]],
) -> tuple[LoraFactors, ...]:
    """One module's factors of all clients, in client_id order. Each rank sends one buffer, padded to the longest."""
    lengths = [sum(shapes[module].num_parameters for shapes in part.values()) for part in by_rank]
    dtype = next(shapes[module].dtype for part in by_rank for shapes in part.values())
    buffer = torch.zeros(max(lengths), dtype=dtype, device=group.device)
    position = 0
    for client in by_rank[group.rank]:
        flat = flatten(adapters[client][module])
        buffer[position : position + flat.numel()] = flat
        position += flat.numel()
    received: dict[int, LoraFactors] = {}
    for part, data in zip(by_rank, group.all_gather(buffer), strict=True):
        position = 0
        for client, shapes in part.items():
            shape = shapes[module]
            received[client] = shape.unflatten(data[position : position + shape.num_parameters])
            position += shape.num_parameters
    return tuple(received[client] for client in sorted(received))


def broadcast_adapter(group: Group, adapter: AdapterState | None) -> AdapterState:
    """Rank 0's adapter on every rank, on the group's device, one message a module; other ranks pass None."""
    if group.world_size == 1:
        assert adapter is not None
        return adapter
    mine = (
        None if adapter is None else {module: FactorsShape.of(factors) for module, factors in adapter.items()}
    )
    shapes: dict[str, FactorsShape] = group.broadcast_object(mine)
    modules = {}
    for module, shape in shapes.items():
        if group.rank == 0:
            assert adapter is not None
            flat = flatten(adapter[module]).to(group.device)
        else:
            flat = torch.empty(shape.num_parameters, dtype=shape.dtype, device=group.device)
        modules[module] = shape.unflatten(group.broadcast(flat))
    return AdapterState(modules)


def broadcast_state(group: Group, known: ServerState | None, state: ServerState | None) -> ServerState:
    """Rank 0's new server state on every rank.

    Args:
        group: the processes.
        known: the state that every rank already holds; entries of `strategy_state` that the new state took over
            from it, as the same object, are not sent again. None at the start of a run.
        state: the new state on rank 0, ignored elsewhere.
    """
    if group.world_size == 1:
        assert state is not None
        return state
    before = {} if known is None else known.strategy_state
    plan = None
    if group.rank == 0:
        assert state is not None
        sent = {name: before.get(name) is not entry for name, entry in state.strategy_state.items()}
        plan = (state.round_index, sent)
    round_index, sent = group.broadcast_object(plan)
    adapter = broadcast_adapter(group, state.adapter if group.rank == 0 and state is not None else None)
    entries = {}
    for name, is_new in sent.items():
        mine = state.strategy_state[name] if group.rank == 0 and state is not None else None
        entries[name] = broadcast_adapter(group, mine) if is_new else before[name]
    return ServerState(round_index, adapter, entries)
