"""Leading invariant subspaces, for the singular value decomposition of large sums.

Shapes: o / i = rows / columns of W, k = vectors that are followed, q <= k = components asked for. All float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedsim.errors import AdapterError

_ACCURACY = 1e-13
"""Largest estimated error of the truncation, relative to its Frobenius norm."""
_MOST_HALF_STEPS = 9


def gram(matrix: Tensor) -> Tensor:
    """matrix @ matrix^T. On a CPU by numpy, which computes only half of it: twice the rate."""
    if matrix.device.type == "cpu":
        values = matrix.numpy()
        product: Tensor = torch.from_numpy(values @ values.T)
        return product
    return matrix @ matrix.mT


def spectral_norm(square: Tensor) -> float:
    """Largest eigenvalue of a positive semidefinite matrix by a few power steps: from below, within a factor of 2."""
    vector = square[:, square.diagonal().argmax()]
    norm = 0.0
    for _ in range(6):
        length = float(vector.norm())
        if length == 0.0:
            return 0.0
        vector = square @ (vector / length)
        norm = float(vector.norm())
    return norm


def leading_eigenvectors(square: Tensor, count: int) -> Tensor:
    """(n, count) eigenvectors of the largest eigenvalues, largest first, of a symmetric (n, n), which is overwritten.

    On a CPU by LAPACK's syevr, which computes only these vectors and works in place: a third of the time and a quarter
    of the memory of all of them.
    """
    size = square.shape[0]
    if square.device.type != "cpu":
        every: Tensor = torch.linalg.eigh(square).eigenvectors
        return every[:, size - count :].flip(1)
    import scipy.linalg

    # the transpose of a symmetric matrix in C order is the same matrix in the order that LAPACK wants
    _, vectors = scipy.linalg.eigh(
        square.numpy().T,
        driver="evr",
        subset_by_index=[size - count, size - 1],
        overwrite_a=True,
        check_finite=False,
    )
    leading: Tensor = torch.from_numpy(vectors).flip(1)
    return leading


def refine(
    times: Callable[[Tensor], Tensor],
    transpose_times: Callable[[Tensor], Tensor],
    start: Tensor,
    count: int,
    noise: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Leading singular triplets of W from an approximate right subspace, by Rayleigh-Ritz and power steps.

    The exact decomposition of W on the subspace. With singular values s_1 >= s_2 ... and a start from a Gram matrix
    with errors of size `noise`, the angle between component j and the subspace is about noise / (s_j^2 - s_k^2), and
    the truncation errs by s_j times it. Where that is not negligible, the subspace's image under W takes its place, and
    W^T that of W, in turns: each such half step multiplies the angle by s_k / s_j.

    Args:
        times: x (i, n) -> W x.
        transpose_times: x (o, n) -> W^T x.
        start: (i, k) orthonormal.
        count: q.
        noise: error of the Gram matrix that `start` came from, in units of s^2.
        floor: singular values up to here count as 0.

    Returns:
        U (o, q), S (q,), V (i, q); None where the error does not become small enough.

    Raises:
        AdapterError: a value is not finite.
    """
    basis = start
    for half_step in range(_MOST_HALF_STEPS):
        image, core = torch.linalg.qr(times(basis))
        U, S, Vh = torch.linalg.svd(core)
        if not bool(S.isfinite().all()):
            raise AdapterError("singular values are not finite")
        error = _truncation_error(S, count, noise, floor, half_step)
        if error <= _ACCURACY:
            left, right = image @ U[:, :count], basis @ Vh[:count].mT
            return (left, S[:count], right) if half_step % 2 == 0 else (right, S[:count], left)
        if error == float("inf"):
            return None
        basis, times, transpose_times = image, transpose_times, times
    return None


def _truncation_error(S: Tensor, count: int, noise: float, floor: float, half_steps: int) -> float:
    """Estimated relative error of the truncation to `count` components; infinite where nothing can be said."""
    values = S[:count][S[:count] > floor]
    if values.numel() == 0:
        return 0.0
    # of the components that count, the last one is the worst
    smallest, behind = float(values[-1]), float(S[-1])
    if behind <= floor:
        behind = 0.0
    gap = smallest**2 - behind**2
    angle = noise / gap if gap > 0 else float("inf")
    if angle > 0.1:
        return float("inf")
    return smallest * angle * (behind / smallest) ** half_steps / float(values.norm())
