"""A base in half precision under adapters in float32."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.lora.plan import ClientPlan
from fedsim.lora.updates import ClientUpdate
from fedsim.models.adapted import AdaptedModel
from fedsim.models.generate import GreedyGenerator
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.training import loss_scale, packed, sequential
from fedsim.training.loss_scale import loss_scales
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import Pack
from fedsim.training.row_optimizers import RowOptimizer
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import OptimizerSettings
from tests.helpers import make_store, random_texts, tiny_opt
from tests.training.test_packed import (
    ADAMW,
    CPU,
    DIFFERENT,
    FAMILIES,
    PAD,
    TWO,
    clients,
    starts_for,
    train_packed,
    train_sequential,
    worst_difference,
)

HALVES = [torch.bfloat16, torch.float16]
PLAIN_SGD = replace(
    ADAMW, optimizer=OptimizerSettings("sgd", lr=1.0), schedule="constant", max_grad_norm=None
)
TRAINERS = {"packed": train_packed, "sequential": train_sequential}


@pytest.fixture(scope="module")
def store() -> Any:
    return make_store(random_texts(40, seed=1))


@pytest.mark.parametrize("dtype", HALVES)
def test_adapters_gradients_and_optimizers_are_float32(dtype, store, monkeypatch):
    seen: dict[str, set[torch.dtype]] = {"rows": set(), "leaves": set(), "losses": set()}
    step = RowOptimizer.step
    backward = SequentialTrainer._backward
    label_losses = StackedModel.label_losses

    def watched_step(self: RowOptimizer, steps: Any) -> None:
        seen["rows"] |= {t.dtype for t in (self.rows.values, self.rows.gradients, self.first, self.second)}
        step(self, steps)

    def watched_backward(self: SequentialTrainer, *arguments: Any) -> Any:
        loss = backward(self, *arguments)
        for linear in self.model._linears.values():
            for leaf in (linear.factors.A, linear.factors.B):
                seen["leaves"] |= {leaf.dtype, leaf.grad.dtype}
        seen["losses"].add(loss.dtype)
        return loss

    def watched_losses(self: StackedModel, *arguments: Any) -> Any:
        losses = label_losses(self, *arguments)
        seen["losses"].add(losses.dtype)
        return losses

    monkeypatch.setattr(RowOptimizer, "step", watched_step)
    monkeypatch.setattr(SequentialTrainer, "_backward", watched_backward)
    monkeypatch.setattr(StackedModel, "label_losses", watched_losses)
    starts = starts_for(tiny_opt(), TWO, torch.float32)
    for train in TRAINERS.values():
        model = tiny_opt(dtype)
        for update in train(model, TWO, clients(store), starts, store):
            assert {factor.dtype for f in update.adapter.values() for factor in (f.A, f.B)} == {torch.float32}
        assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {dtype}
    assert seen == {
        "rows": {torch.float32},
        "leaves": {torch.float32},
        "losses": {torch.float32, torch.float64},
    }


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["opt-all", "llama"])
def test_losses_and_adapters_are_near_those_of_a_float32_base(family, dtype, trainer, store):
    build, target_modules = FAMILIES[family]
    starts = starts_for(build(torch.float32), target_modules, torch.float32)
    jobs = clients(store, tuple(replace(settings, lora_dropout=0.2) for settings in DIFFERENT))
    full = train_packed(build(torch.float32), target_modules, jobs, starts, store)
    half = TRAINERS[trainer](build(dtype), target_modules, jobs, starts, store)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for mine, theirs in zip(half, full, strict=True):
        assert mine.report.train_loss_mean == pytest.approx(theirs.report.train_loss_mean, rel=tolerance)
        assert mine.report.train_loss_mean != theirs.report.train_loss_mean


def moves(updates: list[ClientUpdate], starts: list[Any]) -> torch.Tensor:
    """What the clients learned, in one vector."""
    return torch.cat(
        [
            (getattr(update.adapter[m], side) - getattr(start[m], side)).flatten()
            for update, start in zip(updates, starts, strict=True)
            for m in start
            for side in "AB"
        ]
    ).double()


def tiny_gradients(dtype: torch.dtype) -> torch.nn.Module:
    """An OPT whose gradients die away towards the first layer: a small weight in its head's way."""
    model = tiny_opt(dtype)
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight.mul_(1e-4)
    return model


@pytest.mark.parametrize("trainer", TRAINERS)
def test_gradients_do_not_underflow_in_float16(trainer, store, monkeypatch):
    """Without scaling, what the float16 base learns is far from what a float64 base learns; with it, near."""
    starts = starts_for(tiny_opt(), TWO, torch.float32)
    doubles = starts_for(tiny_opt(), TWO, torch.float64)
    jobs = clients(store, (replace(PLAIN_SGD, batch_size=11),))
    train = TRAINERS[trainer]
    exact = moves(train(tiny_gradients(torch.float64), TWO, jobs, doubles, store), doubles)

    def error() -> float:
        half = moves(train(tiny_gradients(torch.float16), TWO, jobs, starts, store), starts)
        return float((half - exact).norm() / exact.norm())

    assert error() < 0.05
    for module in (packed, sequential):
        monkeypatch.setattr(module, "loss_scales", lambda dtype, num_targets: (1.0,))
    assert error() > 0.2


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_scale_that_overflows_is_lowered(trainer, store, monkeypatch):
    starts = starts_for(tiny_opt(), TWO, torch.float32)
    jobs = clients(store, (PLAIN_SGD,))
    usual = TRAINERS[trainer](tiny_opt(torch.float16), TWO, jobs, starts, store)
    monkeypatch.setattr(loss_scale, "TOKEN_WEIGHTS", (2.0**17, 2.0**-2))
    lowered = TRAINERS[trainer](tiny_opt(torch.float16), TWO, jobs, starts, store)
    assert len(usual) == len(lowered) == len(jobs)
    for mine, theirs in zip(lowered, usual, strict=True):
        assert worst_difference(mine.adapter, theirs.adapter) < 5e-2 * worst_difference(
            theirs.adapter, starts[theirs.report.client_id]
        )


def test_scales_are_powers_of_two_of_ones_own_step():
    assert loss_scales(torch.bfloat16, 100) == (1.0,)
    assert loss_scales(torch.float32, 100) == (1.0,)
    for count in (1, 7, 64, 1000):
        scales = loss_scales(torch.float16, count)
        assert all(np.log2(scale) % 1 == 0 for scale in scales)
        assert 8 < scales[0] / count <= 16
        assert list(scales) == sorted(scales, reverse=True)


def test_scaling_is_exact(store, monkeypatch):
    """In float64, where nothing overflows or is lost, a scale changes no bit."""
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = clients(store)
    for train in TRAINERS.values():
        plain = train(tiny_opt(torch.float64), TWO, jobs, starts, store)
        with monkeypatch.context() as patch:
            for module in (packed, sequential):
                patch.setattr(module, "loss_scales", lambda dtype, num_targets: (2.0**7,))
            scaled = train(tiny_opt(torch.float64), TWO, jobs, starts, store)
        for mine, theirs in zip(scaled, plain, strict=True):
            assert worst_difference(mine.adapter, theirs.adapter) == 0
            assert mine.report.train_loss_mean == theirs.report.train_loss_mean


@pytest.mark.parametrize("dtype", HALVES)
def test_tests_and_answers(dtype, store):
    targets = find_targets(tiny_opt(), TWO)
    [adapter] = starts_for(tiny_opt(), TWO, torch.float32)[:1]
    parts = [np.arange(8, dtype=np.int64)]
    exact = PaddedScorer(AdaptedModel(tiny_opt(), targets, CPU), PAD).losses([adapter], store, parts)[0]
    stacked = StackedModel(tiny_opt(dtype), targets, CPU)
    for scorer in (PackedScorer(stacked), PaddedScorer(AdaptedModel(tiny_opt(dtype), targets, CPU), PAD)):
        [losses] = scorer.losses([adapter], store, parts)
        assert losses.dtype == np.float64
        np.testing.assert_allclose(losses, exact, rtol=2e-2)
    prompts = [store.sequence(example).astype(np.int64) for example in range(4)]
    [answers] = GreedyGenerator(stacked, PAD, ()).answers(adapter, [prompts], 5)
    assert [len(answer) for answer in answers] == [5] * 4


def peak_allocated(work: Any) -> int:
    """Most bytes that torch has allocated on the CPU during `work`, beyond those before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_saves_memory_and_changes_no_bit(dtype, store):
    sizes = {"num_hidden_layers": 6, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 128}
    starts = starts_for(tiny_opt(**sizes), TWO, torch.float32)
    jobs = clients(store, (replace(ADAMW, lora_dropout=0.3, batch_size=6),))
    peaks, results = [], []
    for checkpoint in (False, True):
        model = tiny_opt(dtype, dropout=0.5, **sizes)  # the base's own dropout stays off
        stacked = StackedModel(model, find_targets(model, TWO), CPU, checkpoint_gradients=checkpoint)
        trainer = PackedTrainer(stacked, store, 6, 10_000, False, process_rank=0)
        plans = [ClientPlan(start) for start in starts]
        results.append(trainer.train(Pack(0, jobs), plans, round_index=1))
        peaks.append(peak_allocated(lambda t=trainer, p=plans: t.train(Pack(0, jobs), p, round_index=1)))
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert worst_difference(mine.adapter, theirs.adapter) == 0
    assert peaks[1] < 0.6 * peaks[0]
