"""What trainers report of a local run, from its steps' losses and its settings."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.lora.plan import ClientPlan
from fedsim.lora.updates import ClientReport
from fedsim.training.packs import ClientJob
from fedsim.training.reports import client_report
from fedsim.training.settings import LocalSettings, OptimizerSettings
from tests.cohorts import random_adapter

SETTINGS = LocalSettings(4, 1, None, OptimizerSettings(lr=0.3), "linear", 0, 0.0, False, 0)


def report_of(step_losses: list[float], settings: LocalSettings = SETTINGS) -> ClientReport:
    adapter = random_adapter(0)
    job = ClientJob(3, np.arange(9), 80, None, len(step_losses), 90, settings)
    return client_report(job, ClientPlan(adapter), adapter, step_losses, 240, 0, 0, 1.5)


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_sum_of_learning_rates_is_hugging_faces(schedule, warmup_steps):
    """Of the rates with which the seven steps are made, from the first one on."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup_steps, 7)
    rates = []
    for _ in range(7):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    settings = replace(SETTINGS, schedule=schedule, warmup_steps=warmup_steps)
    assert report_of([2.0] * 7, settings).lr_sum == pytest.approx(sum(rates), rel=1e-12)


def test_the_training_loss_is_the_mean_over_steps():
    report = report_of([4.0, 1.0, 1.0, 2.0])
    assert report.steps == 4
    assert (report.train_loss_first, report.train_loss_mean, report.train_loss_last) == (4.0, 2.0, 2.0)
    assert report_of([4.0, 1.0, 1.0]).train_loss_mean == 2.0, "not of the first and the last"
