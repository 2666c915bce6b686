"""Sequences of several clients in one row of tokens, without padding.

Letters: S = sequences, T = their tokens together, n = label tokens, H = attention heads, D = width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.tokens import TokenStore
from fedsim.models.transfer import to_device

ATTENTION = "fedsim_packed"
"""Name under which `packed_attention` is registered with transformers."""

LAYOUT_ARGUMENT = "packed_layout"
"""Keyword under which the layout reaches `packed_attention` through a model's forward pass."""

BUCKET_STEP = 16
"""Sequences are padded, within attention only, to about the next multiple of this many tokens."""

HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None
"""Whether this torch has attention over sequences of different lengths; on GPUs only, in half precision."""

VARLEN_CAPABILITY = (8, 0)
"""GPUs before that, such as V100 and T4, have no kernel for it."""

VARLEN_WIDTH = 256
"""Widest head of its kernel."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, padded to one length inside attention.

    Attributes:
        start: first row of the bucket in the padded buffer.
        num_sequences: sequences in it.
        length: rows of each.
    """

    start: int
    num_sequences: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where each sequence of a packed row lies, for attention.

    Attributes:
        padded_rows: (T,) int64, row of each token in the padded buffer.
        num_padded_rows: rows of that buffer.
        buckets: which rows form one batch of equal length.
        boundaries: (S + 1,) int32, first token of each sequence and T.
        longest: tokens of the longest sequence.
    """

    padded_rows: Tensor
    num_padded_rows: int
    buckets: tuple[Bucket, ...]
    boundaries: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """A packed row and what it is to predict, on one device.

    Attributes:
        input_ids: (1, T) int64.
        position_ids: (1, T) int64, from 0 in each sequence.
        layout: for attention.
        owner_of_token: (T,) int64, which part of the input each token belongs to.
        token_ranges: first token and end of each part; its tokens lie together.
        label_rows: (n,) int64, tokens whose successor is a label token.
        label_targets: (n,) int64, these successors.
        owner_of_label: (n,) int64, as `owner_of_token`.
        sequence_of_label: (n,) int64, which sequence, in packed order.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    owner_of_token: Tensor
    token_ranges: tuple[tuple[int, int], ...]
    label_rows: Tensor
    label_targets: Tensor
    owner_of_label: Tensor
    sequence_of_label: Tensor


def pack_tokens(store: TokenStore, parts: Sequence[Ints], device: torch.device) -> PackedTokens:
    """Lay the examples of several parts (one a client) one after another.

    Args:
        store: the examples.
        parts: for each part, indices of its examples; none may be empty.
        device: of the result.
    """
    examples = np.concatenate(parts)
    lengths = store.num_tokens[examples]
    starts = np.cumsum(lengths) - lengths
    tokens = store.flat_tokens(examples)
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    sequence = np.repeat(np.arange(len(examples)), lengths)
    # token t predicts t + 1 if that is a label token of the same sequence
    follows = positions + 1
    is_label = (follows < lengths[sequence]) & (follows >= store.label_start[examples][sequence])
    label_rows = np.flatnonzero(is_label)
    tokens_of_part = np.add.reduceat(lengths, np.cumsum([0] + [len(part) for part in parts[:-1]]))
    ends = np.cumsum(tokens_of_part)
    owner = np.repeat(np.arange(len(parts)), tokens_of_part)

    def put(array: NDArray[Any]) -> Tensor:
        return to_device(array, device, torch.int64)

    return PackedTokens(
        input_ids=put(tokens)[None],
        position_ids=put(positions)[None],
        layout=layout_of(lengths, device),
        owner_of_token=put(owner),
        token_ranges=tuple(zip((ends - tokens_of_part).tolist(), ends.tolist(), strict=True)),
        label_rows=put(label_rows),
        label_targets=put(tokens[label_rows + 1]),
        owner_of_label=put(owner[label_rows]),
        sequence_of_label=put(sequence[label_rows]),
    )


def layout_of(lengths: Ints, device: torch.device) -> PackedLayout:
    """The layout of a row of sequences.

    Args:
        lengths: (S,) tokens of each sequence, in the row's order.
        device: of the result.
    """
    classes = -(-lengths // BUCKET_STEP)
    order = np.argsort(classes, kind="stable")
    first_row = np.empty_like(lengths)
    buckets = []
    row = 0
    for members in np.split(order, np.flatnonzero(np.diff(classes[order])) + 1):
        length = int(lengths[members].max())
        first_row[members] = row + length * np.arange(len(members))
        buckets.append(Bucket(row, len(members), length))
        row += length * len(members)
    starts = np.cumsum(lengths) - lengths
    boundaries = np.concatenate((starts, [lengths.sum()]))
    padded_rows = np.repeat(first_row - starts, lengths) + np.arange(lengths.sum())
    return PackedLayout(
        padded_rows=to_device(padded_rows, device, torch.int64),
        num_padded_rows=row,
        buckets=tuple(buckets),
        boundaries=to_device(boundaries, device, torch.int32),
        longest=int(lengths.max()),
    )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row; an attention function of transformers.

    Args:
        module: the attention module; `num_key_value_groups` query heads share a key head.
        query: (1, H, T, D).
        key: (1, H / groups, T, D), as `value`.
        value: see `key`.
        attention_mask: not used; the layout says who sees whom.
        scaling: of the scores; None for 1 / sqrt(D).
        dropout: not used: masks inside attention could not be keyed by client, so such bases are not packed with it.
        packed_layout: of the row.
        kwargs: what else the model passes on.

    Returns:
        ((1, T, H, D), None).
    """
    assert packed_layout is not None, "a model that is set up for packed rows was called without a layout"
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if _has_flash_attention(query):
        return _flash_attention(query, key, value, scaling, packed_layout), None
    return _bucketed_attention(query, key, value, scaling, packed_layout), None


def _has_flash_attention(query: Tensor) -> bool:
    return (
        query.is_cuda
        and HAS_VARLEN
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= VARLEN_WIDTH
        and torch.cuda.get_device_capability(query.device) >= VARLEN_CAPABILITY
    )


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # the kernel compares the window with a tuple; (-1, 0) is causal
    out = varlen_attn(
        q,
        k,
        v,
        layout.boundaries,
        layout.boundaries,
        layout.longest,
        layout.longest,
        window_size=(-1, 0),
        scale=scaling,
    )
    assert isinstance(out, Tensor)  # without auxiliary outputs it is not a tuple
    return out[None]


def _bucketed_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: PackedLayout
) -> Tensor:
    """Rows are copied into one padded buffer, bucket by bucket; right padding and causality need no mask."""
    _, heads, num_tokens, width = query.shape
    rows = [tensor.transpose(1, 2).reshape(num_tokens, heads * width) for tensor in (query, key, value)]
    padded: Tensor = _Pad.apply(layout, *rows)  # type: ignore[no-untyped-call]
    # split and unbind, not slices: the gradient of each slice would fill a whole padded buffer
    sizes = [bucket.num_sequences * bucket.length for bucket in layout.buckets]
    outputs = []
    for bucket, part in zip(layout.buckets, padded.split_with_sizes(sizes), strict=True):
        by_head = part.view(bucket.num_sequences, bucket.length, 3, heads, width)
        q, k, v = (tensor.transpose(1, 2) for tensor in by_head.unbind(2))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        outputs.append(attended.transpose(1, 2).reshape(-1, heads * width))
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    unpadded: Tensor = _Unpad.apply(joined, layout)  # type: ignore[no-untyped-call]
    return unpadded.view(1, num_tokens, heads, width)


class _Pad(torch.autograd.Function):
    """Several (T, d) -> (padded rows, several, d); rows that no token claims are 0."""

    @staticmethod
    def forward(ctx: Any, layout: PackedLayout, *tensors: Tensor) -> Tensor:
        ctx.layout = layout
        padded = tensors[0].new_zeros(layout.num_padded_rows, len(tensors), tensors[0].shape[1])
        for index, tensor in enumerate(tensors):
            padded[:, index].index_copy_(0, layout.padded_rows, tensor)
        return padded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradients[0].index_select(0, ctx.layout.padded_rows).unbind(1))


class _Unpad(torch.autograd.Function):
    """(padded rows, d) -> (T, d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.padded_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        gradient = gradients[0].new_zeros(layout.num_padded_rows, gradients[0].shape[1])
        return gradient.index_copy_(0, layout.padded_rows, gradients[0]), None


def register_packed_attention() -> None:
    """Make `packed_attention` known to transformers; may be called again."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, packed_attention)
