"""Algebra on products `scaling * B A` that are kept as factors.

Shapes: r = LoRA rank, i = in features, o = out features, R = total rank of a stack. Arithmetic is float64.
"""

import math

import torch
from torch import Tensor

from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.stacks import WeightedSum, weighted_stack
from fedsim.lora.svd import Svd, product_svd

__all__ = ["Svd", "accumulate", "combine", "frobenius_norm", "product_svd", "weighted_stack"]


def accumulate(base: LoraFactors | None, update: LoraFactors) -> LoraFactors:
    """The sum of two products as one pair of factors.

    Ranks are concatenated as long as their sum is below min(o, i). From there on the sum is kept in full-rank form: the
    dense (o, i) sum as the factor on the larger side, and the identity as the other one, so that it grows no further.

    Args:
        base: what there is so far; None for nothing.
        update: what is added.

    Returns:
        Factors with scaling 1.0, in the dtype and on the device of `update`, newly allocated.
    """
    if base is None:
        return LoraFactors(update.A.clone(), (update.B.double() * update.scaling).to(update.B), 1.0)
    dtype, device = update.A.dtype, update.A.device
    base = base.map(lambda factor: factor.to(device))
    if base.rank + update.rank < min(update.B.shape[0], update.A.shape[1]):
        up, down = weighted_stack((base, update), (1.0, 1.0))
        return LoraFactors(down.to(dtype), up.to(dtype), 1.0)
    return full_rank(WeightedSum((base, update), (1.0, 1.0)).dense().to(dtype))


def full_rank(dense: Tensor) -> LoraFactors:
    """An (o, i) matrix as factors with scaling 1.0: the matrix itself, and the identity on the smaller side."""
    out_features, in_features = dense.shape
    identity = torch.eye(min(dense.shape), dtype=dense.dtype, device=dense.device)
    if out_features <= in_features:
        return LoraFactors(dense, identity, 1.0)
    return LoraFactors(identity, dense, 1.0)


def combine(adapter: AdapterState, base_update: AdapterState | None) -> AdapterState:
    """One adapter with the products of both, for export: adapter on the loaded base instead of the updated one.

    Ranks add up; where they exceed min(o, i) of the module, the exact singular value decomposition of the sum brings
    them down to it, with A = V^T, B = U S and scaling 1.0.

    Args:
        adapter: on top of the updated base.
        base_update: what the base has gained; None for nothing. Modules of one may be missing in the other.

    Returns:
        An adapter of the dtype of `adapter`; the same object where there is no `base_update`.
    """
    if base_update is None:
        return adapter
    modules = dict(adapter)
    for module, update in base_update.items():
        modules[module] = _compressed_sum(modules[module], update) if module in modules else update
    return AdapterState(modules)


def frobenius_norm(factors: LoraFactors) -> float:
    """||scaling B A||_F from the factors, as sqrt(tr((B^T B) (A A^T))), or from the product where that is smaller.

    The first form sees nothing below 1e-8 of the factors' size; such a norm of an almost cancelling product is noise.
    """
    down, up = factors.A.double(), factors.B.double()
    if factors.rank < min(up.shape[0], down.shape[1]):
        square = float(((up.mT @ up) * (down @ down.mT)).sum())
        return abs(factors.scaling) * math.sqrt(max(square, 0.0))
    return abs(factors.scaling) * float(torch.linalg.matrix_norm(up @ down))


def _compressed_sum(first: LoraFactors, second: LoraFactors) -> LoraFactors:
    dtype = first.A.dtype
    second = second.map(lambda factor: factor.to(first.A.device))
    up, down = weighted_stack((first, second), (1.0, 1.0))
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        svd = product_svd(up, down)
        up, down = svd.U * svd.S, svd.Vh
    return LoraFactors(down.to(dtype), up.to(dtype), 1.0)
