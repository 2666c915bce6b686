"""What the plans of several clients add to a step, on rank rows: `fedsim.training.plans` for all of them at once.

Letters: R = rank rows of all slots, W = width of a row, M = modules.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.lora.plan import BOTH, ClientPlan
from fedsim.models.rows import RankRows


class RowTerms:
    """Gradients beside that of the data loss, and values that do not train. A buffer exists only if a plan needs it.

    Args:
        rows: values and gradients.
        plans: of all clients that will hold a slot.
        proximal: whether any of them has a proximal term.

    Attributes:
        start: (R, W) the values each client began with, for the proximal term and for what does not train; or None.
        frozen: (R, W) bool, true where a value does not train; or None.
        correction: (R, W), added to each gradient; or None.
        tails: (R, 2 M) 1 for a row of A or B in its client's tail, else 0; or None.
    """

    def __init__(self, rows: RankRows, plans: Sequence[ClientPlan], proximal: bool) -> None:
        values = rows.values
        freezes = any(plan.trains != BOTH or plan.mask is not None for plan in plans)
        corrects = any(plan.correction is not None for plan in plans)
        penalises = any(plan.tail_penalty is not None for plan in plans)
        self.rows = rows
        self.start = torch.zeros_like(values) if freezes or proximal else None
        self.frozen = torch.zeros_like(values, dtype=torch.bool) if freezes else None
        self.correction = torch.zeros_like(values) if corrects else None
        self.tails = values.new_zeros(len(values), len(rows.widths)) if penalises else None
        self._proximal_mu = values.new_zeros(len(values), 1) if proximal else None
        self._penalty_weights: dict[int, float] = {}
        # which factor a column belongs to: A of the first module, B of the first module, A of the second, ...
        widths = torch.tensor(rows.widths)
        self._factor_of_column = torch.repeat_interleave(torch.arange(len(widths)), widths).to(values.device)

    def load(self, slot: int, plan: ClientPlan, proximal_mu: float) -> None:
        """Follow a plan in a slot from now on, whose start `rows` has just loaded there."""
        self.clear(slot)
        span = slice(*self.rows.row_ranges[slot])
        if self.start is not None:
            self.start[span] = self.rows.values[span]
        if self._proximal_mu is not None:
            self._proximal_mu[span] = proximal_mu
        if self.frozen is not None:
            if plan.mask is not None:
                trains = self.rows.laid_out(plan.mask)
                self.frozen[span.start : span.start + len(trains)] = ~trains
            for side in BOTH - plan.trains:
                self.frozen[span] |= self._factor_of_column % 2 == (0 if side == "A" else 1)
        if self.correction is not None and plan.correction is not None:
            correction = self.rows.laid_out(plan.correction)
            self.correction[span.start : span.start + len(correction)] = correction
        if self.tails is not None and plan.tail_penalty is not None:
            self._penalty_weights[slot] = plan.tail_penalty.weight
            first_rows = [plan.tail_penalty.first_rows[module] for module in self.rows.targets]
            row = torch.arange(span.stop - span.start)[:, None]
            tails = row >= torch.tensor(first_rows).repeat_interleave(2)
            self.tails[span] = tails.to(self.tails)

    def clear(self, slot: int) -> None:
        """Forget the plan of a slot."""
        span = slice(*self.rows.row_ranges[slot])
        for buffer in (self.start, self.frozen, self.correction, self.tails, self._proximal_mu):
            if buffer is not None:
                buffer[span] = 0
        self._penalty_weights.pop(slot, None)

    def add_gradients(self) -> None:
        """Add all terms to the gradients, then set those of frozen values to 0."""
        gradients, values = self.rows.gradients, self.rows.values
        if self.start is not None and self._proximal_mu is not None:
            gradients.addcmul_(values - self.start, self._proximal_mu)
        if self._penalty_weights:
            gradients.addcmul_(values, self._tail_factors()[:, self._factor_of_column])
        if self.correction is not None:
            gradients.add_(self.correction)
        if self.frozen is not None:
            gradients.masked_fill_(self.frozen, 0)

    def put_back(self) -> None:
        """Give frozen values, which weight decay has changed, their bits back."""
        if self.frozen is not None and self.start is not None:
            torch.where(self.frozen, self.start, self.rows.values, out=self.rows.values)

    def _tail_factors(self) -> Tensor:
        """(R, 2 M): the penalty's gradient in a row of a factor is this number times the row; see `tail_gradient`."""
        assert self.tails is not None
        parts = self.rows.values.split_with_sizes(self.rows.widths, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in parts], dim=1)
        factors = torch.zeros_like(norms)
        for slot, weight in self._penalty_weights.items():
            span = slice(*self.rows.row_ranges[slot])
            own = torch.linalg.vector_norm(norms[span] * self.tails[span], dim=0)
            other = own.view(-1, 2).flip(1).flatten()
            factors[span] = self.tails[span] * torch.where(own > 0, weight * other / own, 0)
        return factors


def make_row_terms(
    rows: RankRows, plans: Sequence[ClientPlan], proximal_mus: Sequence[float]
) -> RowTerms | None:
    """What some plans add to the steps of their clients; None if that is nothing.

    Args:
        rows: of the clients' slots.
        plans: of all clients.
        proximal_mus: of each of them.
    """
    proximal = any(mu != 0 for mu in proximal_mus)
    plain = all(
        plan.trains == BOTH and plan.mask is None and plan.tail_penalty is None and plan.correction is None
        for plan in plans
    )
    return None if plain and not proximal else RowTerms(rows, plans, proximal)
