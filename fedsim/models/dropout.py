"""Dropout whose masks are a function of what they are for.

The mask of one value depends on (seed, key of the micro-batch, place of its token in it, module, feature) alone: not on
padding, nor on who else is in the batch, nor on how often the forward pass is repeated. Each value is decided by the
product of a 32-bit key of its token and a 32-bit key of its feature, so a mask costs a fixed number of elementwise
operations, however many clients share the batch, and is the same on every device.

Letters: T = tokens, i = features of a module's input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.seeding import derive_seed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def token_keys(seed: int, purpose: str, key: tuple[int, ...], num_tokens: int) -> NDArray[np.int32]:
    """(num_tokens,) keys of the tokens of one micro-batch, in their order without padding.

    Args:
        seed: the run's seed.
        purpose: which dropout it is.
        key: what names the micro-batch: round, client, step, micro-batch.
        num_tokens: real tokens of the micro-batch.
    """
    return _splitmix(derive_seed(seed, purpose, *key), num_tokens)


def feature_keys(module_index: int, num_features: int) -> Tensor:
    """(num_features,) int32 keys of a module's input features, on the CPU."""
    return torch.from_numpy(_splitmix(derive_seed(0, "dropout_features", module_index), num_features))


def keep_mask(tokens: Tensor, features: Tensor, probability: float, dtype: torch.dtype) -> Tensor:
    """(T, i): 0 with `probability`, else 1 / (1 - probability).

    Args:
        tokens: (T,) int32 from `token_keys`.
        features: (i,) int32 from `feature_keys`, on the same device.
        probability: of a value being dropped, in [0, 1).
        dtype: of the result.
    """
    # a product of odd random numbers modulo 2**32 is uniform in its upper bits; two integer operations a value
    bits = tokens[:, None] * features[None, :]
    threshold = round(probability * 2**32) - 2**31
    return (bits >= threshold).to(dtype).mul_(1.0 / (1.0 - probability))


@contextmanager
def keyed_base_dropout(tokens: Tensor) -> Iterator[None]:
    """Let the base's own dropout draw from the tokens' keys within the block.

    Hugging Face's models call `torch.nn.functional.dropout`, which takes no generator; it is replaced for the block.
    The n-th call of a forward pass stands for the n-th dropout of the architecture. Dropout inside attention kernels
    is not reached by this, and that of attention weights goes on to draw from torch's global generators.

    Args:
        tokens: (T,) int32 keys of all tokens of the batch, padding included, in the order of the hidden states.
    """
    calls = iter(range(10**9))
    original = torch.nn.functional.dropout

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        if not training or p == 0:
            return input
        if (
            input.numel() != tokens.numel() * input.shape[-1]
        ):  # of attention weights, which are no rows of tokens
            return original(input, p, training, inplace)
        features = _features_on(-1 - next(calls), input.shape[-1], input.device)
        return input * keep_mask(tokens, features, p, input.dtype).view(input.shape)

    with _replaced_dropout(dropout):
        yield


@lru_cache(maxsize=1024)  # one a call of the forward pass; made anew, each would wait for the GPU
def _features_on(module_index: int, num_features: int, device: torch.device) -> Tensor:
    return feature_keys(module_index, num_features).to(device)


@contextmanager
def no_base_dropout() -> Iterator[None]:
    """Let a base that is in training mode drop nothing within the block."""

    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002, ARG001
        return input

    with _replaced_dropout(dropout):
        yield


@contextmanager
def _replaced_dropout(dropout: Callable[..., Tensor]) -> Iterator[None]:
    original = torch.nn.functional.dropout
    torch.nn.functional.dropout = dropout
    try:
        yield
    finally:
        torch.nn.functional.dropout = original


@contextmanager
def seeded_global_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for the block, and put them back after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _splitmix(start: int, count: int) -> NDArray[np.int32]:
    """The upper halves of `count` values of the splitmix64 sequence from `start`, made odd."""
    with np.errstate(over="ignore"):
        state = np.uint64(start) + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(32)).astype(np.uint32).view(np.int32) | np.int32(1)
