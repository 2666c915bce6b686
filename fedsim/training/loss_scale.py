"""Loss scaling for a base in float16, whose gradients would be lost below 6e-8 and rounded coarsely below 6e-5.

A client's loss is the mean over n label tokens, so each token's gradient is 1/n of its own size. Before the backward
pass it is multiplied by a power of two that brings a token's weight to 16, or less where that overflows, and the
adapter's gradient, in float32, is divided by it afterwards: both exact. The power depends on the client's own step
alone, so that a client of a pack is scaled as it would be alone. bfloat16 has float32's range and needs none of this.
"""

import torch

TOKEN_WEIGHTS = (2.0**4, 2.0**-2, 2.0**-8)
"""Weights of a label token to be tried in turn until the gradient is finite."""


def loss_scales(dtype: torch.dtype, num_targets: int) -> tuple[float, ...]:
    """Powers of two by which to multiply a mean loss, in the order in which they are tried.

    Args:
        dtype: of the base.
        num_targets: label tokens of the step, n.
    """
    if dtype != torch.float16:
        return (1.0,)
    return tuple(weight * 2.0 ** (num_targets.bit_length() - 1) for weight in TOKEN_WEIGHTS)
