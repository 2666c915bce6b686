"""The aggregation of a round on all processes: gather, `Strategy.aggregate`, share."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fedsim.aggregation.pack_sums import mean_stream, pack_sum, virtual_report
from fedsim.aggregation.strategy import Aggregated, ClientWeights, FactorStream, Strategy
from fedsim.comm.agree import consume_stream
from fedsim.comm.exchange import broadcast_state, gather_stacks, share_modules
from fedsim.comm.group import Group
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport, ClientUpdate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Aggregator:
    """Where the server's mathematics runs.

    Attributes:
        device: of the tensors that strategies get.
        sharded: the modules are shared out over all ranks; else all are aggregated on rank 0.
        weighting: as in `aggregation.client_weights`.
    """

    device: torch.device
    sharded: bool = False
    weighting: ClientWeights = "examples"

    def contribution(
        self, strategy: Strategy, state: ServerState, pack: int, updates: Sequence[ClientUpdate]
    ) -> dict[int, AdapterState]:
        """What a pack's clients send, by number: their adapters, or one sum of them where the mean is enough.

        Args:
            strategy: the federated method.
            state: before the round.
            pack: index of the pack.
            updates: of its clients, in the pack's order.

        Raises:
            AggregationError: a sum is needed, and the updates cannot be added up.
        """
        if not strategy.traits.takes_mean:
            return {update.report.client_id: update.adapter for update in updates}
        if not updates:
            return {}
        return {pack: pack_sum(updates, state.adapter, self.weighting, strategy.sends(state))}

    def aggregate(
        self,
        group: Group,
        strategy: Strategy,
        state: ServerState,
        reports: Sequence[ClientReport],
        sent: Mapping[int, AdapterState],
    ) -> tuple[Aggregated, float]:
        """The next state on every rank, on the group's device, and the seconds spent on gathering.

        Equal bits for any number of processes, sharded or not.

        Args:
            group: the processes.
            strategy: the federated method.
            state: before the round, the same on every rank.
            reports: of the whole cohort, in client_id order.
            sent: the contributions of this rank's packs together.

        Raises:
            PeerError: the updates cannot be combined.
        """
        if not reports and not strategy.traits.takes_empty_cohorts:
            return Aggregated(replace(state, round_index=state.round_index + 1)), 0.0
        sides = strategy.sends(state)
        owners = share_out(state.adapter, group.world_size if self.sharded else 1)
        stream = _TimedStream(gather_stacks(group, sent, owners, sides, self.device))
        what = f"aggregation, round {state.round_index}"

        def work(arriving: FactorStream) -> Aggregated:
            here = state.to(self.device)
            if not strategy.traits.takes_mean:
                return strategy.aggregate(here, reports, arriving)
            means = mean_stream(arriving, reports, here.adapter, self.weighting, sides)
            return strategy.aggregate(here, [virtual_report(here.adapter)], means)

        takes_part = self.sharded or group.rank == 0
        result = consume_stream(group, what, stream, work if takes_part else None)
        if self.sharded:
            return _share_parts(group, state, result, owners), stream.seconds
        return _send_from_root(group, state, result, list(state.adapter)), stream.seconds


def share_out(adapter: AdapterState, num_owners: int) -> dict[str, int]:
    """Module -> rank that aggregates it, in the order in which the modules travel.

    Modules of about equal size travel together, one to each rank, so that the ranks are busy for about as long.

    Args:
        adapter: whose factors' sizes stand for the work.
        num_owners: ranks from 0 that take part.
    """
    if num_owners == 1:
        return dict.fromkeys(adapter, 0)
    by_size = sorted(adapter, key=lambda module: -adapter[module].A.numel() - adapter[module].B.numel())
    forth_and_back = [*range(num_owners), *reversed(range(num_owners))]
    return {module: forth_and_back[place % (2 * num_owners)] for place, module in enumerate(by_size)}


def _send_from_root(
    group: Group, state: ServerState, result: Aggregated | None, modules: Sequence[str]
) -> Aggregated:
    next_state = broadcast_state(group, state, None if result is None else result.state)
    figures = None if result is None else (result.by_module, result.spectra)
    by_module, spectra = group.broadcast_object(figures)
    return Aggregated(next_state, _in_order(modules, [by_module]), _in_order(modules, [spectra]))


def _share_parts(
    group: Group, state: ServerState, result: Aggregated | None, owners: Mapping[str, int]
) -> Aggregated:
    """Put together what each rank worked out for its own modules."""
    assert result is not None
    modules = list(state.adapter)
    mine = {module for module, owner in owners.items() if owner == group.rank}
    before, after = state.adapters(), result.state.adapters()
    unchanged = {name for name, adapter in after.items() if before.get(name) is adapter}
    everywhere = group.gather_objects((list(after), unchanged, result.by_module, result.spectra))
    names = dict.fromkeys(name for present, *_ in everywhere for name in present)
    entries: dict[str, AdapterState] = {}
    for name in names:
        if all(name in same or name not in present for present, same, *_ in everywhere):
            entries[name] = before[name]
        else:
            own = {m: factors for m, factors in after.get(name, {}).items() if m in mine}
            entries[name] = share_modules(group, AdapterState(own), modules)
    return Aggregated(
        result.state.with_adapters(entries).to(group.device),
        _in_order(modules, [by_module for *_, by_module, _ in everywhere]),
        _in_order(modules, [spectra for *_, spectra in everywhere]),
    )


def _in_order(modules: Sequence[str], parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    found = {module: value for part in parts for module, value in part.items()}
    return {module: found[module] for module in modules if module in found}


class _TimedStream(Iterator[tuple[str, tuple[LoraFactors, ...]]]):
    """A factor stream that adds up the time spent waiting for its items."""

    def __init__(self, stream: FactorStream) -> None:
        self._stream = stream
        self.seconds = 0.0

    def __next__(self) -> tuple[str, tuple[LoraFactors, ...]]:
        began = time.perf_counter()
        try:
            return next(self._stream)
        finally:
            self.seconds += time.perf_counter() - began
