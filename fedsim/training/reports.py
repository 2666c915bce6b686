"""What trainers say about a finished local run."""

import math
from collections.abc import Sequence

import torch

from fedsim.errors import TrainingError
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import ClientPlan
from fedsim.lora.updates import ClientReport
from fedsim.training.packs import ClientJob
from fedsim.training.settings import learning_rate

REMEDY = "lower training.optimizer.lr or set training.max_grad_norm"


def client_report(
    job: ClientJob,
    plan: ClientPlan,
    adapter: AdapterState,
    step_losses: Sequence[float],
    trained_tokens: int,
    pack: int,
    process_rank: int,
    seconds: float,
) -> ClientReport:
    """The report of a client that followed `plan` and ended at `adapter`; see `ClientReport` for the rest."""
    num_steps = len(step_losses)
    return ClientReport(
        client_id=job.client_id,
        num_examples=len(job.examples),
        num_tokens=job.num_tokens,
        lora_rank=max(factors.rank for factors in adapter.values()),
        steps=num_steps,
        train_loss_first=step_losses[0],
        train_loss_last=step_losses[-1],
        train_loss_mean=math.fsum(step_losses) / num_steps,
        trained_tokens=trained_tokens,
        trained_parameters=num_trained_parameters(plan),
        lr_sum=math.fsum(learning_rate(job.settings, step, num_steps) for step in range(num_steps)),
        uplink_bytes=adapter.num_bytes,
        downlink_bytes=plan.received_bytes,
        pack=pack,
        process_rank=process_rank,
        seconds=seconds,
    )


def num_trained_parameters(plan: ClientPlan) -> int:
    """Values that a client trains: all of the factors in `plan.trains`, or the true ones of their masks."""
    if plan.mask is None:
        return sum(getattr(factors, side).numel() for factors in plan.start.values() for side in plan.trains)
    counts = [
        getattr(factors, side).count_nonzero()
        for factors in plan.mask.values()
        for side in sorted(plan.trains)
    ]
    return int(torch.stack(counts).sum())


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
