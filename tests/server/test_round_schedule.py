"""The learning rate that changes at a round: what both trainers make of it, and what the record says."""

from dataclasses import replace

import pytest
import torch

from fedsim.comm.group import SoloGroup
from fedsim.config.loader import load_config
from fedsim.errors import ConfigError
from fedsim.lora.state import ServerState
from fedsim.server.metrics import round_metrics
from fedsim.server.round import run_round
from fedsim.server.run import Run
from fedsim.training.settings import OptimizerSettings, at_round
from tests.server.test_round import bits_of, make_run, start_state

LR = 1e-2
HALVED = ((1, 0.5),)


def with_lr(run: Run, lr: float) -> Run:
    return replace(run, local=replace(run.local, optimizer=replace(run.local.optimizer, lr=lr)))


def rounds(run: Run, count: int) -> tuple[ServerState, list[float]]:
    state, told = start_state(), []
    for _ in range(count):
        state, report = run_round(state, run)
        told.append(round_metrics(report, None)["train/lr"])
    return state, told


@pytest.mark.parametrize("packed", [True, False])
def test_from_its_round_on_clients_train_with_the_scaled_rate(packed):
    run = make_run(SoloGroup(), packed=packed)
    state, told = rounds(replace(run, lr_phases=HALVED), 2)
    plain, told_plain = rounds(run, 2)
    first, _ = rounds(run, 1)
    by_hand, _ = run_round(first, with_lr(run, LR / 2))

    assert told == [LR, LR / 2]
    assert told_plain == [LR, LR]
    assert bits_of(state) == bits_of(by_hand)
    assert bits_of(state) != bits_of(plain), "contrast: a schedule that reaches no trainer"
    assert bits_of(state) != bits_of(rounds(with_lr(run, LR / 2), 2)[0]), "contrast: scaled in all rounds"


@pytest.mark.parametrize("packed", [True, False])
def test_one_step_of_sgd_goes_half_as_far(packed):
    run = make_run(SoloGroup(), packed=packed, num_packs=1, size=1)
    optimizer = OptimizerSettings(name="sgd", lr=0.5)
    local = replace(run.local, optimizer=optimizer, schedule="constant", max_grad_norm=None, batch_size=10)
    run = replace(run, local=local, budget=replace(run.budget, examples_per_step=10))
    start = start_state()
    whole, _ = run_round(start, run)
    half, _ = run_round(start, replace(run, lr_phases=((0, 0.5),)))
    for module, factors in start.adapter.items():
        moved, moved_half = (state.adapter[module].B - factors.B for state in (whole, half))
        assert float(moved.abs().max()) > 1e-5, "it must have moved, or half of it means nothing"
        torch.testing.assert_close(moved_half, moved / 2, rtol=1e-4, atol=1e-8)


def test_the_last_phase_that_has_begun_counts_alone():
    local = make_run(SoloGroup()).local
    phases = ((2, 0.5), (4, 0.1))
    rates = [at_round(local, phases, t).optimizer.lr for t in range(6)]
    assert rates == pytest.approx([LR, LR, LR / 2, LR / 2, LR / 10, LR / 10])
    assert at_round(local, phases, 1) is local


def test_server_optimizers_keep_their_rate():
    from fedsim.aggregation.server_optimizers import ServerOptimizerSettings

    around = {"server_optimizer": ServerOptimizerSettings.published("fedadam")}
    run = make_run(SoloGroup(), **around)
    state, _ = rounds(replace(run, lr_phases=HALVED), 2)
    first, _ = rounds(run, 1)
    by_hand, _ = run_round(first, with_lr(run, LR / 2))
    assert bits_of(state) == bits_of(by_hand)


def test_phases_ascend():
    good = load_config(None, ["training.round_schedule=[{from_round: 15, lr_scale: 0.5}]"])
    assert [(phase.from_round, phase.lr_scale) for phase in good.training.round_schedule] == [(15, 0.5)]
    with pytest.raises(ConfigError, match=r"round_schedule must have ascending values of from_round, got \["):
        load_config(
            None, ["training.round_schedule=[{from_round: 3, lr_scale: 0.5}, {from_round: 3, lr_scale: 0.1}]"]
        )
    with pytest.raises(ConfigError, match="lr_scale must be"):
        load_config(None, ["training.round_schedule=[{from_round: 3, lr_scale: 0}]"])
