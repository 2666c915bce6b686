"""Optimizers over rank rows: one elementwise update for all clients, each with its own settings.

Letters: R = rank rows of all slots, W = width of a row, S = slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.lora.plan import ClientPlan
from fedsim.models.rows import RankRows
from fedsim.models.transfer import to_device
from fedsim.training.row_terms import RowTerms
from fedsim.training.settings import OptimizerSettings


@dataclass(frozen=True, slots=True)
class SlotStep:
    """One client's optimizer step.

    Attributes:
        slot: where its adapter lies.
        settings: of its optimizer.
        lr: learning rate of this step, schedule included.
        step: from 0 in its local run.
        max_grad_norm: norm to which its whole gradient is clipped, or None.
    """

    slot: int
    settings: OptimizerSettings
    lr: float
    step: int
    max_grad_norm: float | None


class RowOptimizer:
    """AdamW and SGD as in `torch.optim`, on rank rows; rows without a step in a call do not move.

    Args:
        rows: values and gradients.
        terms: what plans add to the gradients; None where no plan adds anything.

    Attributes:
        first: (R, W) mean of gradients (AdamW) or momentum (SGD).
        second: (R, W) mean of squared gradients (AdamW).
    """

    def __init__(self, rows: RankRows, terms: RowTerms | None = None) -> None:
        self.rows = rows
        self.terms = terms
        self.first = torch.zeros_like(rows.values)
        self.second = torch.zeros_like(rows.values)
        self._num_slots = len(rows.row_ranges)

    def load(self, slot: int, plan: ClientPlan, proximal_mu: float) -> None:
        """Put the next client into a slot: its start, its plan's terms and a fresh state."""
        self.rows.load(slot, plan.start)
        if self.terms is not None:
            self.terms.load(slot, plan, proximal_mu)
        self.forget(slot)

    def clear(self, slot: int) -> None:
        """Empty a slot: nothing of its client is left but the optimizer's state, which no step uses."""
        self.rows.clear(slot)
        if self.terms is not None:
            self.terms.clear(slot)

    def forget(self, slot: int) -> None:
        """Drop the optimizer's state of a slot."""
        rows = slice(*self.rows.row_ranges[slot])
        self.first[rows] = 0
        self.second[rows] = 0

    def step(self, steps: Sequence[SlotStep]) -> None:
        """Complete, clip, use and clear the gradients of all slots named in `steps`; all of one kind of optimizer.

        Slots that are not named keep values and state, whatever their (finite) gradients are.
        """
        with torch.no_grad():
            if self.terms is not None:
                self.terms.add_gradients()
            self._clip(steps)
            if steps[0].settings.name == "sgd":
                self._sgd(steps)
            else:
                self._adamw(steps)
            if self.terms is not None:
                self.terms.put_back()
            self.rows.gradients.zero_()

    def _clip(self, steps: Sequence[SlotStep]) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, for each client by itself."""
        if all(step.max_grad_norm is None for step in steps):
            return
        limits = self._by_row(
            steps, [np.inf if s.max_grad_norm is None else s.max_grad_norm for s in steps], np.inf
        )
        gradients = self.rows.gradients
        squares = torch.linalg.vector_norm(gradients, dim=1).square_()
        totals = torch.zeros(self._num_slots, dtype=gradients.dtype, device=gradients.device)
        totals.index_add_(0, self.rows.slot_of_row, squares)
        norms = totals.sqrt_().add_(1e-6)[self.rows.slot_of_row]
        gradients.mul_((limits.squeeze(1) / norms).clamp_(max=1.0)[:, None])

    def _adamw(self, steps: Sequence[SlotStep]) -> None:
        beta1 = self._by_row(steps, [s.settings.beta1 for s in steps], 1.0)
        beta2 = self._by_row(steps, [s.settings.beta2 for s in steps], 1.0)
        decay = self._by_row(steps, [1.0 - s.lr * s.settings.weight_decay for s in steps], 1.0)
        step_size = self._by_row(steps, [s.lr / (1.0 - s.settings.beta1 ** (s.step + 1)) for s in steps], 0.0)
        root = self._by_row(steps, [(1.0 - s.settings.beta2 ** (s.step + 1)) ** 0.5 for s in steps], 1.0)
        eps = self._by_row(steps, [s.settings.eps for s in steps], 1.0)
        gradients = self.rows.gradients
        # a row without a step has beta 1, decay 1 and step size 0: nothing of it changes
        self.rows.values.mul_(decay)
        self.first.lerp_(gradients, 1.0 - beta1)
        self.second.mul_(beta2).addcmul_(gradients * (1.0 - beta2), gradients)
        denominator = self.second.sqrt().div_(root).add_(eps)
        self.rows.values.addcdiv_(self.first * step_size, denominator, value=-1.0)

    def _sgd(self, steps: Sequence[SlotStep]) -> None:
        lr = self._by_row(steps, [s.lr for s in steps], 0.0)
        decay = self._by_row(steps, [s.settings.weight_decay for s in steps], 0.0)
        # a row without a step keeps its momentum: it is multiplied by 1 and gains nothing
        momentum = self._by_row(steps, [s.settings.momentum for s in steps], 1.0)
        live = self._by_row(steps, [1.0] * len(steps), 0.0)
        change = torch.addcmul(self.rows.gradients, self.rows.values, decay).mul_(live)
        self.first.mul_(momentum).add_(change)
        self.rows.values.sub_(self.first * lr)

    def _by_row(self, steps: Sequence[SlotStep], values: Sequence[float], otherwise: float) -> Tensor:
        """(R, 1): each client's value on its rows, `otherwise` on the rows of slots without a step."""
        by_slot = np.full(self._num_slots, otherwise)
        by_slot[[step.slot for step in steps]] = values
        device, dtype = self.rows.values.device, self.rows.values.dtype
        return to_device(by_slot, device, torch.float64)[self.rows.slot_of_row].to(dtype)[:, None]
