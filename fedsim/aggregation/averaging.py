"""Weighted means of factors.

Shapes: K clients in the cohort; A (r, i) and B (o, r) of one module, r = LoRA rank, i / o = in / out features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.aggregation.strategy import ClientWeights
from fedsim.errors import AggregationError
from fedsim.lora.factors import LoraFactors
from fedsim.lora.updates import ClientReport


def client_weights(reports: Sequence[ClientReport], kind: ClientWeights) -> tuple[float, ...]:
    """p_k = n_k / sum_j n_j (arXiv 2502.18910, Algorithm 1), with n_k examples, label tokens, or 1.

    Returns:
        K weights that sum to 1, in the order of `reports`.

    Raises:
        AggregationError: there is no report, or no weight is positive.
    """
    counts = client_counts(reports, kind)
    total = sum(counts)
    if total <= 0:
        raise AggregationError(f"client weights ({kind}) must have a positive sum, got {counts[:8]}")
    return tuple(count / total for count in counts)


def client_counts(reports: Sequence[ClientReport], kind: ClientWeights) -> list[int]:
    """n_k: examples, label tokens, or 1, in the order of `reports`."""
    return {
        "examples": [report.num_examples for report in reports],
        "tokens": [report.num_tokens for report in reports],
        "uniform": [1 for _ in reports],
    }[kind]


def average_factors(cohort: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """Weighted mean of each factor by itself: FedAvg on LoRA factors (arXiv 2502.18910, Algorithm 1; FedIT).

        A = sum_k p_k A_k,    B = sum_k p_k B_k

    The product of the means is not the mean of the products; FlexLoRA is about that difference. Sums run in float64 in
    the order given, so that the result depends neither on the dtype's rounding nor on how work was spread.

    Args:
        cohort: K factors of one LoRA rank and scaling, at least one.
        weights: K weights p_k, which sum to 1.

    Returns:
        Factors of the cohort's rank, scaling, dtype and device, newly allocated.

    Raises:
        AggregationError: lengths, ranks or scalings differ.
    """
    if not cohort or len(cohort) != len(weights):
        raise AggregationError(f"need one weight for each client, got {len(weights)} for {len(cohort)}")
    kinds = {(factors.A.shape, factors.B.shape, factors.scaling) for factors in cohort}
    if len(kinds) > 1:
        ranks = sorted({factors.rank for factors in cohort})
        raise AggregationError(
            f"averaging factors needs one LoRA rank and scaling in the cohort, got LoRA ranks {ranks}"
        )
    return LoraFactors(
        weighted_sum([factors.A for factors in cohort], weights),
        weighted_sum([factors.B for factors in cohort], weights),
        cohort[0].scaling,
    )


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k p_k x_k in float64, in the order given, rounded once to the dtype of the tensors, which share one shape."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)
