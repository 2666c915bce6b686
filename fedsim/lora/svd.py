"""Singular value decomposition of a weighted sum of products, without the dense sum where that is cheaper.

Shapes: o / i = out / in features, n / m = the smaller / larger of them, R = total rank, q = components asked for.
Everything is float64: more accurate than the published dense decomposition in float32, and still faster.

Four routes lead to the same q components; `choose_route` takes the cheapest:

    qr      QR of both stacks, then the decomposition of the (R, R) core
    stacks  leading invariant subspace of the core's Gram matrix (R, R), refined on W itself
    dense   one matrix product over the stacks, leading subspace of W W^T (n, n), refined on W itself
    full    one matrix product over the stacks, then a dense decomposition

A Gram matrix squares the singular values, which costs digits of all but the largest. Its subspace is therefore only a
start: power steps and a Rayleigh-Ritz step on W follow (`refine`), their error is estimated, and where that is
not small enough the route is left for `qr` or `full`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedsim.errors import AdapterError
from fedsim.lora.factors import LoraFactors
from fedsim.lora.stacks import WeightedSum, balanced, stack_size
from fedsim.lora.subspace import gram, leading_eigenvectors, refine, spectral_norm

Route = Literal["qr", "stacks", "dense", "full"]

_EPS = torch.finfo(torch.float64).eps
_HELD_VALUES = 2**22 - 1
"""A dense sum of at most so many values (32 MiB) is held; of a larger one no more than a panel at a time is formed."""


@dataclass(frozen=True, slots=True)
class Svd:
    """The leading part of the singular value decomposition of an (o, i) matrix W.

    Signs are fixed: of each row of Vh the first of the largest entries is positive, where entries within 1e-6 of the
    largest count as equal. So they do not depend on the LAPACK build.

    Attributes:
        U: (o, q) float64, orthonormal columns; a column is 0 where its singular value is.
        S: (q,) float64, largest first; exactly 0 beyond the numerical rank of W.
        Vh: (q, i) float64, orthonormal rows; a row is 0 where its singular value is.
        energy: ||W||_F^2 of all of W, what was cut off included.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float


def product_svd(up: Tensor, down: Tensor, rank: int | None = None, route: Route | None = None) -> Svd:
    """Leading singular triplets of up @ down; see `sum_svd`.

    Args:
        up: (o, R).
        down: (R, i).
        rank: as in `sum_svd`.
        route: as in `sum_svd`.

    Raises:
        AdapterError: the shapes do not fit, or a value is not finite.
    """
    return sum_svd(WeightedSum((LoraFactors(down, up, 1.0),), (1.0,)), rank, route)


def sum_svd(total: WeightedSum, rank: int | None = None, route: Route | None = None) -> Svd:
    """Leading singular triplets of W = sum_k w_k scaling_k B_k A_k: FlexLoRA's server step (arXiv 2402.11505).

    Memory beyond the cohort's factors: the float64 stack, (o + i) R, and some (R, R) on the routes `qr` and `stacks`;
    on `dense`, for a large W, the (n, n) Gram matrix and panels: less than two float64 (o, i), and never all of the
    stack in float64.

    Args:
        total: W as its terms.
        rank: components wanted; None for all min(R, o, i). Never more than these are returned.
        route: None for the cheapest one.

    Returns:
        q = min(rank, R, o, i) components.

    Raises:
        AdapterError: a value is not finite.
    """
    whole = min(total.total_rank, *total.shape)
    count = whole if rank is None else min(rank, whole)
    route = route or choose_route(*total.shape, total.total_rank, count)
    if route in ("qr", "stacks"):
        up, down = total.stack()
        size = stack_size(up, down)
        _check_finite(size, total)
        by_factors = _by_qr if route == "qr" else _by_stacks
        svd = by_factors(*balanced(up, down), count, size) if size > 0 else _nothing(total)
    else:
        size = total.size()
        _check_finite(size, total)
        svd = (_by_dense if route == "dense" else _by_full)(total, count, size)
    return _tidy(svd, count, _floor(size))


def choose_route(out_features: int, in_features: int, total_rank: int, count: int) -> Route:
    """The route with the least estimated seconds."""
    cost = route_seconds(out_features, in_features, total_rank, count)
    return min(cost, key=lambda route: cost[route])


def route_seconds(out_features: int, in_features: int, total_rank: int, count: int) -> dict[Route, float]:
    """Estimated seconds of each route that is open.

    Operations over rates, in float64 on one core (EPYC, Zen 5; torch 2.13 with MKL, scipy 1.17 with OpenBLAS): products
    47 GFLOP/s, Gram products 90, triangular factors 20, orthonormal ones 15, dense decompositions 2 n^2 m at 3 to 4,
    leading eigenvectors n^3 at 10. Only their proportions matter, and these are much alike on other machines.
    """
    n, m = sorted((out_features, in_features))
    both, wanted = n + m, _with_reserve(count)
    finish = 4 * wanted**2 * both / 15 + 2 * wanted**3 / 3
    product = 2 * n * m * total_rank / 47
    core = min(total_rank, n)
    cost: dict[Route, float] = {
        "qr": 2 * total_rank * core * both / 20 + 2 * core**3 / 3 + 4 * core * both * count / 47,
        "full": product + 2 * n * n * m / 4,
    }
    if wanted < total_rank <= n:
        products = (
            2 * total_rank**2 * both / 90 + 4 * total_rank**3 / 47 + 4 * both * total_rank * wanted / 47
        )
        cost["stacks"] = products + total_rank**3 * (1 / 51 + 1 / 10) + finish
    if wanted < n:
        terms = total_rank * both if n * m > _HELD_VALUES else n * m
        cost["dense"] = product + 2 * n * n * m / 60 + n**3 / 12 + 2 * terms * wanted / 47 + finish
    return {route: operations / 1e9 for route, operations in cost.items()}


def _by_qr(up: Tensor, down: Tensor, count: int, size: float) -> Svd:  # noqa: ARG001
    left, left_scales = torch.geqrf(up)
    right, right_scales = torch.geqrf(down.mT)
    U, S, Vh = torch.linalg.svd(_upper(left) @ _upper(right).mT, full_matrices=False)
    return Svd(
        _rotated(left, left_scales, U[:, :count]),
        S[:count],
        _rotated(right, right_scales, Vh[:count].mT).mT,
        float(S.square().sum()),
    )


def _upper(reflectors: Tensor) -> Tensor:
    """The triangular factor among the results of `torch.geqrf`."""
    return reflectors[: min(reflectors.shape)].triu()


def _rotated(reflectors: Tensor, scales: Tensor, vectors: Tensor) -> Tensor:
    """Q @ vectors, without Q."""
    padded = vectors.new_zeros(reflectors.shape[0], vectors.shape[1])
    padded[: vectors.shape[0]] = vectors
    return torch.ormqr(reflectors[:, : min(reflectors.shape)], scales, padded)


def _by_stacks(up: Tensor, down: Tensor, count: int, size: float) -> Svd:
    """With up^T up = L L^T, the right singular vectors of W are down^T L Y for eigenvectors Y of L^T down down^T L."""
    wanted = _with_reserve(count)
    if wanted >= up.shape[1]:
        return _by_qr(up, down, count, size)
    left, right = gram(up.mT), gram(down)
    energy = float((left * right).sum())
    left_norm, right_norm = spectral_norm(left), spectral_norm(right)
    half, shift = _cholesky(left, left_norm)
    noise = (4 * _EPS * left_norm + shift) * right_norm
    del left
    vectors = leading_eigenvectors(half.mT @ right @ half, wanted)
    start = torch.linalg.qr(down.mT @ (half @ vectors)).Q
    found = refine(
        lambda x: up @ (down @ x), lambda x: down.mT @ (up.mT @ x), start, count, noise, _floor(size)
    )
    if found is None:
        return _by_qr(up, down, count, size)
    return Svd(found[0], found[1], found[2].mT, energy)


def _cholesky(square: Tensor, norm: float) -> tuple[Tensor, float]:
    """L with L L^T = square + shift: 0 where there is one, else of the size of rounding errors (dependent columns)."""
    half, failed = torch.linalg.cholesky_ex(square)
    if not bool(failed):
        return half, 0.0
    shift = 4 * square.shape[0] * _EPS * norm
    square.diagonal().add_(shift)
    return torch.linalg.cholesky(square), shift


def _by_dense(total: WeightedSum, count: int, size: float) -> Svd:
    wanted = _with_reserve(count)
    if wanted >= min(total.shape):
        return _by_full(total, count, size)
    is_wide = total.shape[0] <= total.shape[1]
    times: Callable[[Tensor], Tensor] = total.times
    transpose_times: Callable[[Tensor], Tensor] = total.transpose_times
    if total.shape[0] * total.shape[1] <= _HELD_VALUES:
        held = total.dense()
        times, transpose_times = (lambda x: held @ x), (lambda x: held.mT @ x)
        square = gram(held if is_wide else held.mT)
    else:
        square = total.gram(of_rows=is_wide)
    energy, noise = float(square.trace()), 4 * _EPS * spectral_norm(square)
    start = torch.linalg.qr(leading_eigenvectors(square, wanted)).Q
    del square
    if is_wide:
        times, transpose_times = transpose_times, times
    found = refine(times, transpose_times, start, count, noise, _floor(size))
    if found is None:
        return _by_full(total, count, size)
    left, S, right = reversed(found) if is_wide else found
    return Svd(left, S, right.mT, energy)


def _by_full(total: WeightedSum, count: int, size: float) -> Svd:  # noqa: ARG001
    U, S, Vh = torch.linalg.svd(total.dense(), full_matrices=False)
    return Svd(U[:, :count], S[:count], Vh[:count], float(S.square().sum()))


def _nothing(total: WeightedSum) -> Svd:
    like = total.cohort[0].A.new_empty(0, dtype=torch.float64)
    return Svd(like.new_zeros(total.shape[0], 0), like, like.new_zeros(0, total.shape[1]), 0.0)


def _floor(size: float) -> float:
    """Singular values up to here are rounding errors of a sum of this `stack_size`."""
    return 16 * _EPS * size


def _check_finite(size: float, total: WeightedSum) -> None:
    if not size < float("inf"):
        raise AdapterError(
            f"singular values need finite factors, got a sum of size {size} of shape {total.shape}"
        )


def _with_reserve(count: int) -> int:
    """Components to follow for `count` good ones: those behind them take the errors of the cut."""
    return count + 16 + count // 16


def _tidy(svd: Svd, count: int, floor: float) -> Svd:
    """`count` components in contiguous tensors with fixed signs; those that are rounding errors are 0."""
    S = svd.S.new_zeros(count)
    S[: svd.S.shape[0]] = torch.where(floor < svd.S, svd.S, 0.0)
    U, Vh = S.new_zeros(svd.U.shape[0], count), S.new_zeros(count, svd.Vh.shape[1])
    kept = int((S > 0).sum())
    signs = _signs(svd.Vh[:kept])
    U[:, :kept] = svd.U[:, :kept] * signs
    Vh[:kept] = svd.Vh[:kept] * signs.unsqueeze(1)
    return replace(svd, U=U, S=S, Vh=Vh)


def _signs(Vh: Tensor) -> Tensor:
    """(q,) +-1 that make the first of each row's largest entries positive."""
    if Vh.numel() == 0:
        return Vh.new_ones(Vh.shape[0])
    size = Vh.abs()
    is_largest = size >= (1 - 1e-6) * size.amax(dim=1, keepdim=True)
    first = is_largest.to(torch.uint8).argmax(dim=1, keepdim=True)
    return torch.where(Vh.gather(1, first).squeeze(1) < 0, -1.0, 1.0).to(Vh)
