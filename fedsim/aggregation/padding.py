"""Zero-padding to a bank of the largest rank, for clients of different LoRA ranks.

Factors of other ranks have other scalings. The bank keeps one, s; on the way in B is multiplied by s_k / s, as
`fedsim.lora.truncate` divides it on the way out, so that a rank row adds the same product `scaling * B[:, j] A[j]` on
both sides. Another (alpha, r) for the same A and the same product thus changes nothing.

Shapes: K clients in the cohort; A (r, i) and B (o, r) of one module, r = LoRA rank, R = rank of the bank, i / o = in /
out features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.errors import AggregationError
from fedsim.lora.factors import LoraFactors


def padded_sums(
    cohort: Sequence[LoraFactors], weights: Sequence[float], bank: LoraFactors
) -> tuple[Tensor, Tensor]:
    """Weighted sums of zero-padded factors, in the order given.

        A = sum_k p_k pad(A_k),    B = sum_k p_k (s_k / s) pad(B_k)

    Args:
        cohort: K factors of any ranks up to R.
        weights: K weights.
        bank: of rank R and scaling s; its values are not read.

    Returns:
        A (R, i) and B (o, R) in float64.

    Raises:
        AggregationError: there are no clients, or a rank exceeds R.
    """
    if not cohort or len(cohort) != len(weights):
        raise AggregationError(f"need one weight for each client, got {len(weights)} for {len(cohort)}")
    largest = max(factors.rank for factors in cohort)
    if largest > bank.rank:
        raise AggregationError(
            f"a client's LoRA rank must be at most {bank.rank}, the largest of any resource tier, got {largest}"
        )
    down = torch.zeros_like(bank.A, dtype=torch.float64)
    up = torch.zeros_like(bank.B, dtype=torch.float64)
    for factors, weight in zip(cohort, weights, strict=True):
        down[: factors.rank].add_(factors.A, alpha=weight)
        up[:, : factors.rank].add_(factors.B, alpha=weight * (factors.scaling / bank.scaling))
    return down, up


def padded_mean(cohort: Sequence[LoraFactors], weights: Sequence[float], bank: LoraFactors) -> LoraFactors:
    """`padded_sums` as the next bank: rank, scaling and dtype of the one before."""
    down, up = padded_sums(cohort, weights, bank)
    return LoraFactors(down.to(bank.A.dtype), up.to(bank.B.dtype), bank.scaling)
