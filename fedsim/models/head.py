"""The frozen output head and its cross-entropy, without a [tokens, vocabulary] tensor.

Letters: n = label tokens, d = width of the hidden states, V = vocabulary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedsim.models.cpu_linear import FrozenCpuLinear

LOGITS_BUDGET_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Most bytes of logits that exist at once, by type of device. A CPU is fastest while they lie in its caches; a GPU
wants products of about a thousand tokens, which this is at a vocabulary of 128,000."""


class Head(Protocol):
    """A frozen linear output head."""

    @property
    def num_tokens(self) -> int:
        """V."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Around any use of the head, which may lie in parts on several processes."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(m, d) -> (m, V), newly allocated."""
        ...

    def backward(self, gradient: Tensor) -> Tensor:
        """(m, V) gradient of the logits -> (m, d) gradient of the hidden states."""
        ...


class LinearHead:
    """A head that is a plain linear module."""

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def num_tokens(self) -> int:
        """V."""
        return self._weight.shape[0]

    def whole(self) -> AbstractContextManager[None]:
        """It is here."""
        return nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Head`."""
        return torch.nn.functional.linear(hidden, self._weight, self._bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """See `Head`."""
        return gradient @ self._weight


class PrepackedHead:
    """A head whose weights are packed for oneDNN."""

    def __init__(self, linear: FrozenCpuLinear) -> None:
        self._matrix = linear.packed
        self._bias = linear.bias

    @property
    def num_tokens(self) -> int:
        """V."""
        return self._matrix.weight.shape[0]

    def whole(self) -> AbstractContextManager[None]:
        """It is here."""
        return nullcontext()

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Head`."""
        return self._matrix.times_weight_t(hidden, self._bias)

    def backward(self, gradient: Tensor) -> Tensor:
        """See `Head`."""
        return self._matrix.times_weight(gradient)


def make_head(linear: nn.Linear) -> Head:
    """The head that `linear` is."""
    return PrepackedHead(linear) if isinstance(linear, FrozenCpuLinear) else LinearHead(linear)


def frozen_cross_entropy(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Cross-entropy of label tokens through a frozen head, chunk by chunk.

    The gradient of the hidden states is made in the forward pass, so that no chunk's logits are kept.

    Args:
        hidden: (n, d) hidden states at the rows that predict a label token.
        head: frozen.
        targets: (n,) int64.
        weights: (n,) factor of each token in the sum that is differentiated, in the dtype of the losses; None if no
            gradient is wanted.

    Returns:
        (n,) losses times `weights`, or the plain losses without weights; float32, or float64 for float64 states.
    """
    if weights is None:
        return _losses(hidden, head, targets, None)[0]
    weighted: Tensor = _FrozenCrossEntropy.apply(hidden, head, targets, weights)  # type: ignore[no-untyped-call]
    return weighted


class _FrozenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor, weights: Tensor) -> Tensor:
        losses, gradient = _losses(hidden, head, targets, weights)
        ctx.save_for_backward(gradient)
        return losses * weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None


def _losses(
    hidden: Tensor, head: Head, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(n,) losses and, with weights, (n, d) the gradient of their weighted sum."""
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    losses = torch.empty(len(hidden), dtype=precise, device=hidden.device)
    gradient = None if weights is None else torch.empty_like(hidden)
    budget = LOGITS_BUDGET_BYTES["cuda" if hidden.is_cuda else "cpu"]
    chunk = max(1, budget // (head.num_tokens * losses.element_size()))
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        logits = head.logits(hidden[part]).to(precise)
        target = targets[part, None]
        # in place and with one exponential: the passes over (m, V) are what a head costs beside its products
        highest = logits.amax(dim=1, keepdim=True)
        at_target = logits.sub_(highest).gather(1, target)
        total = logits.exp_().sum(dim=1, keepdim=True)
        losses[part] = (total.log() - at_target).squeeze(1)
        if gradient is not None and weights is not None:
            # weight * (softmax - one-hot)
            weight = weights[part, None]
            logits.mul_(weight / total).scatter_add_(1, target, -weight)
            gradient[part] = head.backward(logits.to(hidden.dtype))
    return losses, gradient
