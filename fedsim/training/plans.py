"""What a client's plan adds to a step of the reference trainer, and whether a plan makes sense.

Shapes: r = LoRA rank, i / o = in / out features of a module; A (r, i), B (o, r).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import ClientPlan
from fedsim.models.targets import check_same_modules


def check_plan(plan: ClientPlan, targets: Mapping[str, tuple[int, int]]) -> None:
    """Check that a plan can be followed.

    Args:
        plan: of a client.
        targets: dotted module path -> (i, o) of the base.

    Raises:
        AdapterError: its modules are not the base's, it trains nothing, or its parts do not fit its start.
    """
    check_same_modules(plan.start, targets)
    if not plan.trains:
        raise AdapterError("a client's plan must train A, B or both, got neither")
    for name, part in (("mask", plan.mask), ("correction", plan.correction)):
        if part is not None and _shapes(part) != _shapes(plan.start):
            raise AdapterError(f"the {name} of a client's plan must have the modules and shapes of its start")
    if plan.mask is not None and any(
        factor.dtype != torch.bool for factors in plan.mask.values() for factor in (factors.A, factors.B)
    ):
        raise AdapterError("the mask of a client's plan must be of bool values")
    if plan.tail_penalty is not None and set(plan.tail_penalty.first_rows) != set(plan.start):
        raise AdapterError(
            "the tail penalty of a client's plan must name a first row for each module of its start"
        )


def _shapes(adapter: AdapterState) -> dict[str, tuple[torch.Size, torch.Size]]:
    return {module: (factors.A.shape, factors.B.shape) for module, factors in adapter.items()}


def add_plan_gradients(live: Mapping[str, LoraFactors], plan: ClientPlan, proximal_mu: float) -> None:
    """Add the gradients of all that is not the data loss, then set to 0 what does not train.

    The proximal term mu / 2 * ||x - start||^2 has the gradient mu * (x - start); see `tail_gradient` for the penalty.

    Args:
        live: the factors in training; those in `plan.trains` hold the gradient of the data loss, which is written to.
        plan: of the client.
        proximal_mu: mu.
    """
    nothing = plan.tail_penalty is None and plan.correction is None and plan.mask is None
    if nothing and proximal_mu == 0:
        return
    with torch.no_grad():
        for module, factors in live.items():
            for side in sorted(plan.trains):
                value: Tensor = getattr(factors, side)
                if value.grad is None:  # a layer that the base left out of this step
                    value.grad = torch.zeros_like(value)
                if proximal_mu != 0:
                    value.grad += proximal_mu * (value - getattr(plan.start[module], side).to(value))
                if plan.tail_penalty is not None:
                    first_row = plan.tail_penalty.first_rows[module]
                    value.grad += plan.tail_penalty.weight * getattr(tail_gradient(factors, first_row), side)
                if plan.correction is not None:
                    value.grad += getattr(plan.correction[module], side).to(value)
                if plan.mask is not None:
                    value.grad.masked_fill_(~getattr(plan.mask[module], side).to(value.device), 0)


def tail_gradient(factors: LoraFactors, first_row: int) -> LoraFactors:
    """Gradient of ||B[:, t:]||_F * ||A[t:]||_F, the penalty of HetLoRA (Cho et al. 2024), t = `first_row`.

        d/dA[t:] = ||B[:, t:]||_F * A[t:] / ||A[t:]||_F,    d/dB[:, t:] = ||A[t:]||_F * B[:, t:] / ||B[:, t:]||_F

    A norm has no gradient at 0, where its smallest subgradient, 0, is taken: of a tail with B = 0, such as that of a
    fresh adapter, the penalty neither moves A nor keeps B from growing.

    Returns:
        Of the shapes of `factors`, 0 before row t; the scaling has no meaning.
    """
    gradient = LoraFactors(torch.zeros_like(factors.A), torch.zeros_like(factors.B), 1.0)
    down, up = factors.A[first_row:], factors.B[:, first_row:]
    down_norm, up_norm = torch.linalg.vector_norm(down), torch.linalg.vector_norm(up)
    if down_norm > 0:
        gradient.A[first_row:] = up_norm * down / down_norm
    if up_norm > 0:
        gradient.B[:, first_row:] = down_norm * up / up_norm
    return gradient


def put_back(live: Mapping[str, LoraFactors], plan: ClientPlan) -> None:
    """Undo what the optimizer's weight decay did to values that do not train."""
    if plan.mask is None:
        return
    with torch.no_grad():
        for module, factors in live.items():
            for side in sorted(plan.trains):
                value: Tensor = getattr(factors, side)
                mask, start = getattr(plan.mask[module], side), getattr(plan.start[module], side)
                value.copy_(torch.where(mask.to(value.device), value, start.to(value)))
