"""What a process holds of its clients while a round goes on."""

import gc
import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedsim.comm.group import SoloGroup
from fedsim.evaluation.clients import NoTest
from fedsim.lora.factors import AdapterState
from fedsim.models.rows import RankRows
from fedsim.server.round import run_round
from fedsim.server.run import Run
from fedsim.server.waiting import AUTO_SHARE, most_waiting_bytes
from tests.server.test_round import bits_of, make_run, start_state

ONE_ADAPTER = 4 * 2 * 32 * 4
"""Bytes of rank 2 on four modules of 16 x 16 in float32."""


class Watched:
    """A trainer that notes what is still alive of earlier packs whenever a new one begins."""

    def __init__(self, run: Run) -> None:
        self.trainer = run.trainer
        self.trained: list[weakref.ref] = []
        self.alive: list[int] = []

    def train(self, *arguments: Any) -> Any:
        gc.collect()
        self.alive.append(sum(reference() is not None for reference in self.trained))
        updates = self.trainer.train(*arguments)
        for update in updates:
            self.trained += [weakref.ref(factors.A) for factors in update.adapter.values()]
        return updates


def watched_round(
    monkeypatch: pytest.MonkeyPatch, most: float, strategy: str = "flexlora"
) -> tuple[Any, Watched, list[Any]]:
    moved: list[Any] = []

    def to(self: AdapterState, device: Any, dtype: Any = None) -> AdapterState:
        if device == "cpu":
            moved.append(self.num_bytes)
            return self.map(torch.clone)  # as a copy to another memory would be
        return move(self, device, dtype)

    move = AdapterState.to
    run = replace(make_run(SoloGroup(), strategy), client_test=NoTest(), most_waiting_bytes=most)
    watched = Watched(run)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterState, "to", to)
        state, _ = run_round(start_state(), replace(run, trainer=watched))
    return state, watched, moved


def test_nothing_of_a_pack_stays_on_the_device(monkeypatch):
    """Four packs of one client; what waits has been copied off the device, and the originals are gone."""
    rows: list[weakref.ref] = []
    make = RankRows.__init__

    def noted(self: RankRows, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        rows.append(weakref.ref(self.values))

    monkeypatch.setattr(RankRows, "__init__", noted)
    state, watched, moved = watched_round(monkeypatch, 0.0)
    assert watched.alive == [0, 0, 0, 0]
    assert moved == [ONE_ADAPTER] * 4
    gc.collect()
    assert len(rows) >= 4
    assert sum(reference() is not None for reference in rows) <= 1  # the adapter of the last test
    held, others, none_moved = watched_round(monkeypatch, math.inf)
    assert others.alive == [0, 4, 8, 12]
    assert none_moved == []
    assert bits_of(state) == bits_of(held)


def test_where_the_mean_is_enough_no_adapter_waits(monkeypatch):
    """Only one sum a pack does, in float64."""
    held, watched, _ = watched_round(monkeypatch, math.inf, "fedavg")
    assert watched.alive == [0, 0, 0, 0]
    state, _, moved = watched_round(monkeypatch, 0.0, "fedavg")
    assert moved == [2 * ONE_ADAPTER] * 4
    assert bits_of(state) == bits_of(held)


def test_only_what_is_beyond_the_limit_moves(monkeypatch):
    state, watched, moved = watched_round(monkeypatch, 2.5 * ONE_ADAPTER)
    assert moved == [ONE_ADAPTER] * 2
    assert watched.alive == [0, 4, 8, 8]
    assert bits_of(state) == bits_of(watched_round(monkeypatch, math.inf)[0])


def test_limits():
    assert most_waiting_bytes("auto", None) == most_waiting_bytes("cpu", None) == math.inf
    assert most_waiting_bytes("device", 10) == math.inf
    assert most_waiting_bytes("cpu", 10) == 0
    assert most_waiting_bytes("auto", 1600) == 1600 * AUTO_SHARE == 100
