"""How a packed row of tokens is multiplied with the rank rows of the clients in it.

Letters: T = tokens, R = rank rows of all slots, r = LoRA rank, K = clients in the row, i / o = in / out features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_MAJORS = (9, 10)
"""Compute capabilities whose GPUs have a kernel for grouped products, in bfloat16 only."""

ALIGNMENT_BYTES = 16
"""Grouped products take matrices whose rows begin at multiples of this."""


class RowProduct(Protocol):
    """The product y + s_k (x A_k^T) B_k of each token with the adapter of its client k, and its gradients."""

    def multiply(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The product, and what `gradients` needs besides its arguments.

        Args:
            x: (T, i), in the dtype of `a`.
            y: (T, o).
            a: (R, i).
            b: (R, o), B transposed.
        """
        ...

    def gradients(
        self,
        outer: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        a: Tensor,
        b: Tensor,
        into_a: Tensor | None,
        into_b: Tensor | None,
        wants_input: bool,
    ) -> Tensor | None:
        """Add the gradients of a and b into their buffers; that of x is returned if it is wanted.

        Args:
            outer: (T, o), gradient of the product.
            x: as in `multiply`.
            kept: what `multiply` returned.
            a: as in `multiply`.
            b: as in `multiply`.
            into_a: (R, i), may be of a wider dtype; None to leave it out.
            into_b: (R, o); None to leave it out.
            wants_input: whether x needs a gradient.
        """
        ...


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens and rank rows of neighbouring slots, multiplied in one dense product.

    Attributes:
        tokens: their tokens.
        rows: their rank rows.
        gate: (tokens, rows) scaling where token and row belong to one client, else 0; a number for a single client.
    """

    tokens: slice
    rows: slice
    gate: Tensor | float


@dataclass(frozen=True, slots=True)
class TiledProduct:
    """Dense products, one for each tile. Any ranks, any dtype."""

    tiles: tuple[Tile, ...]

    def multiply(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `RowProduct`."""
        hidden = [(x[tile.tokens] @ a[tile.rows].T).mul_(tile.gate) for tile in self.tiles]
        outputs = [
            torch.addmm(y[tile.tokens], part, b[tile.rows])
            for tile, part in zip(self.tiles, hidden, strict=True)
        ]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0], hidden

    def gradients(
        self,
        outer: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        a: Tensor,
        b: Tensor,
        into_a: Tensor | None,
        into_b: Tensor | None,
        wants_input: bool,
    ) -> Tensor | None:
        """See `RowProduct`."""
        inputs = []
        for tile, hidden in zip(self.tiles, kept, strict=True):
            part = outer[tile.tokens]
            inner = (part @ b[tile.rows].T).mul_(tile.gate)
            if into_a is not None:
                _add_product(into_a[tile.rows], inner.T, x[tile.tokens])
            if into_b is not None:
                _add_product(into_b[tile.rows], hidden.T, part)
            if wants_input:
                inputs.append(inner @ a[tile.rows])
        if not wants_input:
            return None
        return torch.cat(inputs) if len(inputs) > 1 else inputs[0]


@dataclass(frozen=True, slots=True)
class GroupedProduct:
    """Grouped products: one operation for all clients, without work between clients. Slots of one capacity only.

    Attributes:
        rows: rank rows of the clients, which lie together.
        capacity: rank rows of each client.
        ends: (K,) int32, end of each client's tokens.
        scaling: (T, 1), of each token's client.
    """

    rows: slice
    capacity: int
    ends: Tensor
    scaling: Tensor

    def multiply(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `RowProduct`."""
        hidden = F.grouped_mm(x, self._by_client(a).transpose(1, 2), offs=self.ends).mul_(self.scaling)
        return F.grouped_mm(hidden, self._by_client(b), offs=self.ends).add_(y), [hidden]

    def gradients(
        self,
        outer: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        a: Tensor,
        b: Tensor,
        into_a: Tensor | None,
        into_b: Tensor | None,
        wants_input: bool,
    ) -> Tensor | None:
        """See `RowProduct`."""
        (hidden,) = kept
        outer = outer.contiguous()  # an expanded gradient has strides that grouped products refuse
        inner = F.grouped_mm(outer, self._by_client(b).transpose(1, 2), offs=self.ends).mul_(self.scaling)
        if into_a is not None:
            self._by_client(into_a).add_(F.grouped_mm(inner.T, x, offs=self.ends))
        if into_b is not None:
            self._by_client(into_b).add_(F.grouped_mm(hidden.T, outer, offs=self.ends))
        return F.grouped_mm(inner, self._by_client(a), offs=self.ends) if wants_input else None

    def _by_client(self, rows: Tensor) -> Tensor:
        """(K, capacity, width), a view of (R, width)."""
        return rows[self.rows].view(len(self.ends), self.capacity, rows.shape[1])


def may_be_grouped(
    capacities: Sequence[int], widths: Sequence[int], row_width: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether `GroupedProduct` can be used.

    Args:
        capacities: rank rows of the clients in the packed row.
        widths: in and out features of all adapted modules.
        row_width: values of a rank row.
        dtype: of the product.
        device: of the product.
    """
    if not hasattr(F, "grouped_mm") or dtype not in (torch.float32, torch.bfloat16):
        return False
    if device.type == "cuda" and not _has_grouped_kernel(dtype, device):
        return False
    unit = ALIGNMENT_BYTES // dtype.itemsize
    return len(set(capacities)) == 1 and all(size % unit == 0 for size in (capacities[0], row_width, *widths))


def _has_grouped_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU multiplies all groups at once; elsewhere torch waits for the GPU and does one after another."""
    major, _ = torch.cuda.get_device_capability(device)
    return dtype == torch.bfloat16 and major in GROUPED_MAJORS


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left @ right, in the dtype of `into`."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into.add_(left @ right)
