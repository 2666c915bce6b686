"""What trainers say about a finished local run."""

import math
from collections.abc import Sequence

import torch

from fedsim.errors import TrainingError
from fedsim.lora.factors import AdapterState
from fedsim.lora.updates import ClientReport
from fedsim.training.packs import ClientJob

REMEDY = "lower training.optimizer.lr or set training.max_grad_norm"


def client_report(
    job: ClientJob,
    start: AdapterState,
    adapter: AdapterState,
    step_losses: Sequence[float],
    trained_tokens: int,
    pack: int,
    process_rank: int,
    seconds: float,
) -> ClientReport:
    """The report of a client that went from `start` to `adapter`; see `ClientReport` for the rest."""
    return ClientReport(
        client_id=job.client_id,
        num_examples=len(job.examples),
        num_tokens=job.num_tokens,
        lora_rank=max(factors.rank for factors in adapter.values()),
        steps=len(step_losses),
        train_loss_first=step_losses[0],
        train_loss_last=step_losses[-1],
        train_loss_mean=math.fsum(step_losses) / len(step_losses),
        trained_tokens=trained_tokens,
        uplink_bytes=adapter.num_bytes,
        downlink_bytes=start.num_bytes,
        pack=pack,
        process_rank=process_rank,
        seconds=seconds,
    )


def check_finite(
    step_losses: Sequence[float], adapter: AdapterState | None, client_id: int, round_index: int
) -> None:
    """Check that the losses, and the adapter if one is given, are finite.

    Raises:
        TrainingError: a loss or a factor is not finite.
    """
    for step, value in enumerate(step_losses):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss of client {client_id} must stay finite, got {value} at local step {step} of round "
                f"{round_index}; {REMEDY}"
            )
    for module, factors in ({} if adapter is None else adapter).items():
        if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
            raise TrainingError(
                f"the adapter of client {client_id} must stay finite, got a value that is not in {module} after "
                f"round {round_index}; {REMEDY}"
            )
