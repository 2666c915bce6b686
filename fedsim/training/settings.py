"""How a client trains, as plain values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """Optimizer of a local run; see `training.optimizer` in the configuration for each value."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0


@dataclass(frozen=True, slots=True)
class LocalSettings:
    """Everything about a local run but its data; see `training` in the configuration.

    Attributes:
        batch_size: examples of a forward pass.
        accumulation: forward passes of an optimizer step.
        max_grad_norm: norm to which a client's whole gradient is clipped, or None.
        optimizer: fresh in each local run.
        schedule: of the learning rate within a local run.
        warmup_steps: optimizer steps from 0 to the peak learning rate.
        lora_dropout: on the adapters' inputs.
        base_dropout: whether the base trains with its own dropout.
        seed: the run's seed.
        proximal_mu: FedProx's pull of the trained values towards the client's start: mu / 2 * ||x - start||^2 is added
            to the loss (arXiv 1812.06127, equation 2), with x all values of A and B; 0 for none.
    """

    batch_size: int
    accumulation: int
    max_grad_norm: float | None
    optimizer: OptimizerSettings
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    lora_dropout: float
    base_dropout: bool
    seed: int
    proximal_mu: float = 0.0


def make_optimizer(parameters: Sequence[Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """A fresh optimizer over `parameters` without any state."""
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def lr_factor(step: int, num_steps: int, schedule: str, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of the peak, as in Hugging Face's schedules.

    Warm-up rises from 0 at step 0; linear and cosine reach 0 at `num_steps`, one step after the last.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def learning_rate(settings: LocalSettings, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of a local run of `num_steps` steps."""
    return settings.optimizer.lr * lr_factor(step, num_steps, settings.schedule, settings.warmup_steps)


def at_round(settings: LocalSettings, phases: Sequence[tuple[int, float]], round_index: int) -> LocalSettings:
    """The settings of a round.

    Args:
        settings: of the run; themselves where no phase has begun.
        phases: first round and factor on the peak learning rate, ascending; the last one that has begun counts alone.
        round_index: from 0.
    """
    begun = [scale for first, scale in phases if first <= round_index]
    if not begun:
        return settings
    return replace(settings, optimizer=replace(settings.optimizer, lr=settings.optimizer.lr * begun[-1]))
