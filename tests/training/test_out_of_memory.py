"""Rows, packs and test batches that do not fit the memory are cut, and nothing but rounding changes."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.errors import ModelError
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import ClientPlan
from fedsim.models.adapted import AdaptedModel
from fedsim.models.generate import GreedyGenerator
from fedsim.models.out_of_memory import is_out_of_memory
from fedsim.models.rows import MAX_ROW_VALUES, RankRows
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import Pack
from fedsim.training.row_optimizers import RowOptimizer
from fedsim.training.sequential import SequentialTrainer
from tests.helpers import VOCABULARY, make_store, random_texts, tiny_opt
from tests.training.test_packed import (
    ADAMW,
    CPU,
    DIFFERENT,
    PAD,
    TWO,
    assert_same,
    clients,
    random_adapter,
    starts_for,
    train_packed,
    worst_difference,
)

CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
)


@pytest.fixture(scope="module")
def store() -> Any:
    return make_store(random_texts(40, seed=1))


def refuse(tokens: int, most: int, kind: str) -> None:
    if tokens > most:
        if kind == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        raise RuntimeError(CPU_TEXT + "allocate 68719476736 bytes.")


@contextmanager
def small_memory(
    model: Any, most: int, kind: str = "cuda", in_backward: bool = True, failed: list[int] | None = None
) -> Iterator[None]:
    """No more than `most` tokens go through the first layer, or back through it once later layers have been there."""

    def check(size: int) -> None:
        if size > most and failed is not None:
            failed.append(size)
        refuse(size, most, kind)

    def hook(module: Any, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        size = states.shape[0] * states.shape[1]
        if in_backward and states.requires_grad:
            states.register_hook(lambda gradient: check(size))
        elif not in_backward:
            check(size)

    handle = model.model.decoder.layers[0].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def jobs_with_dropout(store: Any) -> Any:
    return clients(store, tuple(replace(settings, lora_dropout=0.3) for settings in DIFFERENT))


def trainer_for(model: torch.nn.Module, store: Any, max_slots: int = 3) -> tuple[StackedModel, PackedTrainer]:
    stacked = StackedModel(model, find_targets(model, TWO), CPU)
    return stacked, PackedTrainer(stacked, store, max_slots, 10_000, False, process_rank=0)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_row_that_does_not_fit_is_cut(kind, in_backward, store, caplog):
    """The step begins anew, with the same dropout masks; later rows are small from the start."""
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = jobs_with_dropout(store)
    enough = train_packed(tiny_opt(torch.float64), TWO, jobs, starts, store)
    stacked, trainer = trainer_for(tiny_opt(torch.float64), store)
    most, failed = 70, []
    with small_memory(stacked.model, most, kind, in_backward, failed), caplog.at_level(logging.WARNING):
        cut = trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)
    assert_same(cut, enough, 1e-9)
    assert len(failed) in (1, 2)
    assert len(caplog.messages) == len(failed)
    assert trainer.max_tokens <= failed[-1] // 2
    assert f"training.pack.max_tokens={trainer.max_tokens}" in caplog.messages[-1]
    assert "from here on depends on this machine's memory" in caplog.messages[0]
    with small_memory(stacked.model, most, kind, in_backward):
        again = trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)
    assert len(caplog.messages) == len(failed)
    assert_same(again, enough, 1e-9)


def test_gradients_of_the_failed_pass_would_be_seen(store, monkeypatch):
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = clients(store)
    enough = train_packed(tiny_opt(torch.float64), TWO, jobs, starts, store)
    stacked, trainer = trainer_for(tiny_opt(torch.float64), store)
    left: list[tuple[torch.Tensor, torch.Tensor]] = []
    clean = trainer._pass_by_pass
    smaller = trainer._take_smaller_rows

    def leave_some(rows: RankRows, *arguments: Any) -> Any:
        try:
            return clean(rows, *arguments)
        except torch.OutOfMemoryError:
            left.append((rows.gradients, rows.gradients.clone()))
            raise

    def put_back(problem: str) -> None:
        gradients, before = left[-1]
        gradients.copy_(before)
        smaller(problem)

    monkeypatch.setattr(trainer, "_pass_by_pass", leave_some)
    monkeypatch.setattr(trainer, "_take_smaller_rows", put_back)
    with small_memory(stacked.model, 70):
        dirty = trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)
    assert float(left[0][1].abs().max()) > 1e-3
    pairs = zip(dirty, enough, strict=True)
    assert max(worst_difference(mine.adapter, theirs.adapter) for mine, theirs in pairs) > 1e-3


def test_fewer_clients_at_once_where_one_row_is_not_the_problem(store, caplog, monkeypatch):
    """Out of memory amid the optimizer's arithmetic: the pack begins anew."""
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = jobs_with_dropout(store)
    enough = train_packed(tiny_opt(torch.float64), TWO, jobs, starts, store, max_slots=6)
    whole = RowOptimizer._adamw
    calls = []

    def adamw(self: RowOptimizer, steps: Any) -> None:
        calls.append(len(self.rows.row_ranges))
        if len(calls) > 1:
            self.rows.values.mul_(0.5)
            refuse(len(self.rows.row_ranges), 2, "cuda")
            self.rows.values.mul_(2.0)
        whole(self, steps)

    monkeypatch.setattr(RowOptimizer, "_adamw", adamw)
    _, trainer = trainer_for(tiny_opt(torch.float64), store, max_slots=6)
    with caplog.at_level(logging.WARNING):
        fewer = trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)
    assert_same(fewer, enough, 1e-9)
    assert trainer.max_slots <= 2
    assert "training.pack.max_slots=" in caplog.messages[-1]


def test_a_micro_batch_that_does_not_fit_names_what_to_change(store):
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = clients(store, (ADAMW,))
    stacked, trainer = trainer_for(tiny_opt(torch.float64), store)
    keys = ("training.batch_size", "data.max_tokens", "training.gradient_checkpointing", "model.dtype")
    with small_memory(stacked.model, 8), pytest.raises(ModelError) as raised:
        trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)
    assert all(key in str(raised.value) for key in keys)
    assert "\n" not in str(raised.value)
    adapted = AdaptedModel(model := tiny_opt(torch.float64), find_targets(model, TWO), CPU)
    sequential = SequentialTrainer(adapted, store, PAD, drop_not_finite=True, process_rank=0)
    with small_memory(model, 8, in_backward=False), pytest.raises(ModelError) as raised:
        sequential.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)
    assert all(key in str(raised.value) for key in keys)


def test_other_errors_are_not_taken_for_it(store, monkeypatch):
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError(CPU_TEXT))
    assert is_out_of_memory(MemoryError())
    for text in (
        "CUDA error: out of memory",
        "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(text)), text
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    stacked, trainer = trainer_for(tiny_opt(torch.float64), store)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(stacked, "label_losses", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.train(Pack(0, clients(store)), [ClientPlan(start) for start in starts], round_index=1)


def adapters_for(model: torch.nn.Module, count: int = 3) -> list[AdapterState]:
    return [random_adapter(find_targets(model, TWO), 2, torch.float64, seed) for seed in range(count)]


def test_what_failed_is_let_go_before_the_halves_are_tried(store, monkeypatch):
    """The adapters of a test row that does not fit would otherwise lie in the way of its halves."""
    model = tiny_opt(torch.float64)
    adapters = adapters_for(model)
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(self: RankRows, *arguments: Any, **keywords: Any) -> None:
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(self))
        init(self, *arguments, **keywords)
        assert self.gradients.numel() == 0

    init = RankRows.__init__
    monkeypatch.setattr(RankRows, "__init__", watched)
    scorer = PackedScorer(StackedModel(model, find_targets(model, TWO), CPU))
    parts = [np.arange(9, dtype=np.int64), np.arange(9, 14, dtype=np.int64), np.array([20], dtype=np.int64)]
    with small_memory(model, 45, in_backward=False):
        scorer.losses(adapters, store, parts)
    assert len(alive) > 2
    assert set(alive) == {0}


def test_adapters_under_test_are_no_more_than_the_slots_may_hold(store, monkeypatch):
    model = tiny_opt(torch.float64)
    targets = find_targets(model, TWO)
    adapters, parts = adapters_for(model, 5), [np.array([index]) for index in range(5)]
    scorer = PackedScorer(StackedModel(model, targets, CPU))
    together = scorer.losses(adapters, store, parts)
    rows: list[int] = []
    measure = scorer._losses
    monkeypatch.setattr(
        scorer, "_losses", lambda some, *rest: rows.append(2 * len(some)) or measure(some, *rest)
    )
    monkeypatch.setitem(MAX_ROW_VALUES, "cpu", 5 * sum(i + o for i, o in targets.values()))
    apart = scorer.losses(adapters, store, parts)
    assert rows == [4, 4, 2]
    for mine, theirs in zip(apart, together, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
def test_test_batches_are_cut(packed, store, caplog):
    model = tiny_opt(torch.float64)
    adapters = adapters_for(model)
    parts = [np.arange(9, dtype=np.int64), np.arange(9, 14, dtype=np.int64), np.array([20], dtype=np.int64)]
    engine: Any = (StackedModel if packed else AdaptedModel)(model, find_targets(model, TWO), CPU)

    def scorer() -> Any:
        return PackedScorer(engine) if packed else PaddedScorer(engine, PAD)

    whole = scorer().losses(adapters, store, parts)
    small = scorer()
    with small_memory(model, 45, in_backward=False), caplog.at_level(logging.WARNING):
        cut = small.losses(adapters, store, parts)
        num_warnings = len(caplog.messages)
        again = small.losses(adapters, store, parts)
    assert num_warnings >= 1
    assert len(caplog.messages) == num_warnings
    for mine, same, theirs in zip(cut, again, whole, strict=True):
        assert mine.shape == theirs.shape
        np.testing.assert_allclose(mine, theirs, rtol=1e-10)
        np.testing.assert_allclose(same, theirs, rtol=1e-10)
    with (
        small_memory(model, 1, in_backward=False),
        pytest.raises(ModelError, match=r"evaluation\.batch_tokens"),
    ):
        scorer().losses(adapters, store, parts)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_of_answers_are_cut(packed, caplog):
    model = tiny_opt(torch.float64)
    [adapter] = adapters_for(model, 1)
    generator = np.random.default_rng(3)
    prompts = [generator.integers(3, VOCABULARY, length) for length in (5, 9, 2, 7)]
    engine: Any = (StackedModel if packed else AdaptedModel)(model, find_targets(model, TWO), CPU)

    def speaker() -> GreedyGenerator:
        return GreedyGenerator(engine, PAD, (2,))

    whole, guesses = (
        speaker().answers(adapter, [prompts], 6),
        speaker().teacher_forced(adapter, [prompts]),
    )
    with small_memory(model, 20, in_backward=False), caplog.at_level(logging.WARNING):
        cut = speaker().answers(adapter, [prompts], 6)
        cut_guesses = speaker().teacher_forced(adapter, [prompts])
    assert len(caplog.messages) >= 2
    for mine, theirs in ((cut, whole), (cut_guesses, guesses)):
        for one, other in zip(mine[0], theirs[0], strict=True):
            np.testing.assert_array_equal(one, other)
