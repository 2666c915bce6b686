"""Batches of token sequences: for local training in a seeded order, and for evaluation by length.

Shapes: b = sequences of a batch, L = longest sequence of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedsim.data.tokens import TokenStore
from fedsim.seeding import numpy_generator

IGNORED = -100
"""Target of a position that is not to be predicted; the default `ignore_index` of PyTorch's cross entropy."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences and what they are to predict, on the CPU.

    Attributes:
        input_ids: (b, L) int64, padded on the right.
        attention_mask: (b, L) int64, 1 at a token and 0 at padding.
        targets: (b, L) int64, already shifted: `targets[:, t]` is the token at t + 1 where that is a label token,
            else -100. The last column is always -100.
        num_targets: targets that are not -100.
        num_tokens: tokens without padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    num_targets: int
    num_tokens: int


def collate(store: TokenStore, indices: Sequence[int] | Ints, pad_id: int) -> Batch:
    """The examples `indices` of a store as one batch, in that order, padded to the longest of them."""
    chosen = np.asarray(indices, dtype=np.int64)
    assert chosen.size > 0, "a batch holds at least one example"
    num_tokens = store.num_tokens[chosen]
    positions = np.arange(num_tokens.max())
    is_token = positions < num_tokens[:, None]

    input_ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    input_ids[is_token] = store.flat_tokens(chosen)
    is_label = is_token & (positions >= store.label_start[chosen][:, None])
    targets = np.full(is_token.shape, IGNORED, dtype=np.int64)
    targets[:, :-1] = np.where(is_label[:, 1:], input_ids[:, 1:], IGNORED)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(is_token.astype(np.int64)),
        torch.from_numpy(targets),
        num_targets=int(is_label[:, 1:].sum()),
        num_tokens=int(num_tokens.sum()),
    )


def local_batches(
    num_examples: int,
    *,
    batch_size: int,
    local_epochs: int | None,
    local_steps: int | None,
    accumulation: int,
    seed: int,
    round_index: int,
    client_id: int,
) -> list[list[Ints]]:
    """What a client trains on in one round, as positions 0 ... num_examples - 1 of its own examples.

    Each epoch is a fresh order, keyed by (seed, round, client, epoch) alone. It is cut into micro-batches of
    `batch_size`, the last one kept though smaller, and these into optimizer steps of up to `accumulation`
    micro-batches; neither reaches across an epoch's end. With `local_steps`, epochs follow one another until that
    many steps are full.

    Args:
        num_examples: training examples of the client, > 0.
        local_epochs: passes over the client's examples; None where `local_steps` is given.
        local_steps: optimizer steps; None where `local_epochs` is given.

    Returns:
        One list per optimizer step; it holds one array of positions per micro-batch.
    """
    assert num_examples > 0, "a client has at least one training example"
    assert (local_epochs is None) != (local_steps is None), "local_epochs or local_steps, not both"
    steps: list[list[Ints]] = []
    for epoch in count() if local_epochs is None else range(local_epochs):
        order = numpy_generator(seed, "data_order", round_index, client_id, epoch).permutation(num_examples)
        batches = [order[start : start + batch_size] for start in range(0, num_examples, batch_size)]
        steps += [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
        if local_steps is not None and len(steps) >= local_steps:
            return steps[:local_steps]
    return steps


def length_batches(num_tokens: ArrayLike, batch_tokens: int) -> list[Ints]:
    """Evaluation batches, longest sequences first, so that little is padding.

    They depend on the lengths and the budget alone, so processes can share them out and still sum the same terms.

    Args:
        num_tokens: (n,) sequence lengths.
        batch_tokens: most tokens of a batch, padding included. A sequence longer than this is a batch of its own.

    Returns:
        Arrays of positions in `num_tokens`; each position is in one of them. Equal lengths keep their order.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < order.size:
        longest = max(int(lengths[order[start]]), 1)
        stop = start + max(batch_tokens // longest, 1)
        batches.append(order[start:stop])
        start = stop
    return batches
