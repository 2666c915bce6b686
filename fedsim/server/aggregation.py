"""The aggregation of a round on all processes: gather, `Strategy.aggregate`, share."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from fedsim.aggregation.strategy import Aggregated, FactorStream, Strategy
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
        sharded: module i is aggregated on rank i mod world size; else all on rank 0.
    """

    device: torch.device
    sharded: bool = False

    def aggregate(
        self,
        group: Group,
        strategy: Strategy,
        state: ServerState,
        reports: Sequence[ClientReport],
        updates: Sequence[ClientUpdate],
    ) -> tuple[Aggregated, float]:
        """The next state on every rank, on the group's device, and the seconds spent on gathering.

        Equal bits for any number of processes, sharded or not.

        Args:
            group: the processes.
            strategy: the federated method.
            state: before the round, the same on every rank.
            reports: of the whole cohort, in client_id order.
            updates: of this rank's clients.

        Raises:
            PeerError: the updates cannot be combined.
        """
        if not reports and not strategy.traits.takes_empty_cohorts:
            return Aggregated(replace(state, round_index=state.round_index + 1)), 0.0
        modules = list(state.adapter)
        stream = _TimedStream(gather_stacks(group, updates, modules, strategy.sends(state)))
        what = f"aggregation, round {state.round_index}"
        mine = set(modules[group.rank :: group.world_size] if self.sharded else modules)

        def work(whole: FactorStream) -> Aggregated:
            own = ((module, self._put(cohort)) for module, cohort in whole if module in mine)
            return strategy.aggregate(state.to(self.device), reports, own)

        takes_part = self.sharded or group.rank == 0
        result = consume_stream(group, what, stream, work if takes_part else None)
        share = _share_parts if self.sharded else _send_from_root
        return share(group, state, result, modules), stream.seconds

    def _put(self, cohort: Sequence[LoraFactors]) -> tuple[LoraFactors, ...]:
        return tuple(factors.map(lambda factor: factor.to(self.device)) for factors in cohort)


def _send_from_root(
    group: Group,
    state: ServerState,
    result: Aggregated | None,
    modules: Sequence[str],  # noqa: ARG001
) -> Aggregated:
    next_state = broadcast_state(group, state, None if result is None else result.state)
    figures = None if result is None else (result.by_module, result.spectra)
    by_module, spectra = group.broadcast_object(figures)
    return Aggregated(next_state, by_module, spectra)


def _share_parts(
    group: Group, state: ServerState, result: Aggregated | None, modules: Sequence[str]
) -> Aggregated:
    """Put together what each rank worked out for its own modules."""
    assert result is not None
    mine = set(modules[group.rank :: group.world_size])
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
