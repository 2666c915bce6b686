"""A weighted sum of products as one product of two stacks: FLoRA's stacking (arXiv 2409.05976).

    sum_k w_k scaling_k B_k A_k = [w_1 scaling_1 B_1, w_2 scaling_2 B_2, ...] @ [A_1; A_2; ...]

Shapes: K clients, i = in features, o = out features, R = sum of the clients' LoRA ranks. Arithmetic is float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import AdapterError
from fedsim.lora.factors import LoraFactors

_PANEL = 512
"""Rows or columns of W that stand in memory at a time where W does not."""
_BLOCK_RANKS = 128
"""Ranks, at least, that are converted to float64 at a time: about enough for the full rate of a matrix product."""


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """W = sum_k w_k scaling_k B_k A_k of one module, as its terms.

    Attributes:
        cohort: K factors, at least one, of one (o, i), dtype and device; LoRA ranks and scalings may differ.
        weights: K weights w_k.
    """

    cohort: Sequence[LoraFactors]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        if not self.cohort or len(self.cohort) != len(self.weights):
            raise AdapterError(
                f"need one weight for each of at least one client, got {len(self.weights)} for {len(self.cohort)}"
            )
        shapes = {(factors.B.shape[0], factors.A.shape[1]) for factors in self.cohort}
        if len(shapes) > 1:
            raise AdapterError(f"factors of one module must have one (out, in), got {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.cohort[0].B.shape[0], self.cohort[0].A.shape[1]

    @property
    def total_rank(self) -> int:
        """R."""
        return sum(factors.rank for factors in self.cohort)

    def stack(self) -> tuple[Tensor, Tensor]:
        """(o, R) and (R, i) float64; weights and scalings are in the first."""
        return _stack(self.cohort, self.weights)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The stack in pieces of some hundred ranks, so that it never stands in memory as a whole in float64."""
        begin, ranks = 0, 0
        for end, factors in enumerate(self.cohort, 1):
            ranks += factors.rank
            if ranks >= _BLOCK_RANKS or end == len(self.cohort):
                yield _stack(self.cohort[begin:end], self.weights[begin:end])
                begin, ranks = end, 0

    def dense(self) -> Tensor:
        """W, (o, i) float64."""
        like = self.cohort[0].A
        total = torch.zeros(self.shape, dtype=torch.float64, device=like.device)
        low: list[tuple[LoraFactors, float]] = []
        for factors, weight in zip(self.cohort, self.weights, strict=True):
            # the sum that a base has gained, or that a server keeps, needs no product
            if _is_identity(factors.B):
                total.add_(factors.A, alpha=weight * factors.scaling)
            elif _is_identity(factors.A):
                total.add_(factors.B, alpha=weight * factors.scaling)
            else:
                low.append((factors, weight))
        if low:
            for up, down in WeightedSum(*zip(*low, strict=True)).blocks():
                _add_product(total, up, down)
        return total

    def gram(self, of_rows: bool) -> Tensor:
        """W W^T (o, o) of the rows or W^T W (i, i) of the columns, float64, with panels of W instead of W."""
        out_features, in_features = self.shape
        size, length = (out_features, in_features) if of_rows else (in_features, out_features)
        like = self.cohort[0].A
        total = torch.zeros(size, size, dtype=torch.float64, device=like.device)
        for begin in range(0, length, _PANEL):
            panel = total.new_zeros(size, min(_PANEL, length - begin))
            here = slice(begin, begin + panel.shape[1])
            for up, down in self.blocks():
                if of_rows:
                    panel.addmm_(up, down[:, here])
                else:
                    panel.addmm_(down.mT, up[here].mT)
            total.addmm_(panel, panel.mT)
        return total

    def times(self, right: Tensor) -> Tensor:
        """W @ right, (o, n) for right (i, n) float64, without W."""
        total = right.new_zeros(self.shape[0], right.shape[1])
        for up, down in self.blocks():
            total.addmm_(up, down @ right)
        return total

    def transpose_times(self, left: Tensor) -> Tensor:
        """W^T @ left, (i, n) for left (o, n) float64, without W."""
        total = left.new_zeros(self.shape[1], left.shape[1])
        for up, down in self.blocks():
            total.addmm_(down.mT, up.mT @ left)
        return total

    def size(self) -> float:
        """At least the `stack_size` of the stack, and of its order."""
        norm = torch.linalg.vector_norm
        return sum(
            abs(weight * factors.scaling) * float(norm(factors.A)) * float(norm(factors.B))
            for factors, weight in zip(self.cohort, self.weights, strict=True)
        )


def weighted_stack(cohort: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weighted sum of a cohort's products as one product, exactly.

    Args:
        cohort: K factors of one module, at least one; LoRA ranks and scalings may differ.
        weights: K weights w_k.

    Returns:
        (o, R) and (R, i) float64, newly allocated. Scalings and weights are in the first.

    Raises:
        AdapterError: no factors, another number of weights, or more than one (o, i).
    """
    return WeightedSum(cohort, weights).stack()


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of `up` and rows of `down` of equal norms, without pairs whose product is 0.

    Where the scalings of a sum stand, and how (alpha, r) was chosen, then has no part in how it rounds.
    """
    left, right = up.mT.norm(dim=1), down.norm(dim=1)
    kept = (left > 0) & (right > 0)
    if not bool(kept.all()):
        up, down, left, right = up[:, kept], down[kept], left[kept], right[kept]
    ratio = (right / left).sqrt()
    return up * ratio, down / ratio.unsqueeze(1)


def stack_size(up: Tensor, down: Tensor) -> float:
    """Sum of the Frobenius norms of the R rank-one terms: what rounding errors in their sum are relative to."""
    return float((up.mT.norm(dim=1) * down.norm(dim=1)).sum())


def _stack(cohort: Sequence[LoraFactors], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    total_rank = sum(factors.rank for factors in cohort)
    out_features, in_features = cohort[0].B.shape[0], cohort[0].A.shape[1]
    # columns of the up stack lie together in memory, as LAPACK wants them
    ups = cohort[0].B.new_empty(total_rank, out_features, dtype=torch.float64)
    downs = cohort[0].A.new_empty(total_rank, in_features, dtype=torch.float64)
    torch.cat([factors.B.mT for factors in cohort], out=ups)
    torch.cat([factors.A for factors in cohort], out=downs)
    # in one go: with many clients of small ranks a call for each costs more than its arithmetic
    scales = [
        weight * factors.scaling
        for factors, weight in zip(cohort, weights, strict=True)
        for _ in range(factors.rank)
    ]
    ups.mul_(torch.tensor(scales, dtype=ups.dtype, device=ups.device).unsqueeze(1))
    return ups.mT, downs


def _add_product(total: Tensor, up: Tensor, down: Tensor) -> None:
    """total += up @ down, in place. On a CPU by scipy's BLAS: a tenth faster in float64 than torch's on AMD."""
    if total.device.type != "cpu":
        total.addmm_(up, down)
        return
    import scipy.linalg.blas

    # in C order a matrix is its transpose to BLAS: total^T += down^T up^T
    scipy.linalg.blas.dgemm(
        1.0, down.numpy().T, up.numpy(), 1.0, total.numpy().T, trans_b=True, overwrite_c=True
    )


def _is_identity(matrix: Tensor) -> bool:
    size = matrix.shape[0]
    # the first value rules out nearly all others at once
    if size == 0 or matrix.shape[1] != size or float(matrix[0, 0]) != 1.0:
        return False
    return torch.equal(matrix, torch.eye(size, dtype=matrix.dtype, device=matrix.device))
