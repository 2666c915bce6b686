"""Adapters of several clients in one buffer of rank rows.

A rank row holds, for every adapted module, one row of A and one column of B. A client of LoRA rank r is r rows that lie
together; parameters, gradients and optimizer state are buffers of one shape, so the optimizer's arithmetic runs on all
clients at once.

Letters: R = rank rows of all slots, W = width of a row = sum over modules of (in + out), i / o = in / out features.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.lora.factors import AdapterState, LoraFactors

MAX_ROW_VALUES = {"cuda": 2**29, "cpu": 2**27}
"""Most values in the rank rows of all slots. In training there are four buffers of them, or up to seven with what plans
add; under test one. So adapters of high rank have fewer slots: at full rank, a client of OPT-125M with six modules has
127 million values. In float32 a buffer of this size takes 2 GiB on a GPU, where slots pay most, and 0.5 GiB a process
on a CPU."""


class RankRows:
    """Parameters and gradients of a number of slots, each holding one client's adapter at a time.

    Args:
        targets: dotted module path -> (i, o), in model order.
        capacities: rank rows of each slot: the largest LoRA rank it will ever hold. A client of lower rank leaves the
            rest at 0, where they stay: rows of A and columns of B that are 0 have no gradient.
        dtype: of all buffers.
        device: of all buffers.
        trains: whether there are gradients.

    Attributes:
        values: (R, W).
        gradients: (R, W), or (0, W) if nothing trains.
        slot_of_row: (R,) int64.
        row_ranges: first row and end of each slot.
        widths: columns of A and B of each module in turn.
    """

    def __init__(
        self,
        targets: Mapping[str, tuple[int, int]],
        capacities: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        trains: bool = True,
    ) -> None:
        self.targets = dict(targets)
        self._trains = trains
        ends = torch.tensor(capacities).cumsum(0).tolist()
        self.row_ranges = tuple((end - capacity, end) for end, capacity in zip(ends, capacities, strict=True))
        self.slot_of_row = torch.repeat_interleave(
            torch.arange(len(capacities)), torch.tensor(capacities)
        ).to(device)
        self.widths = [width for shape in targets.values() for width in shape]
        self._columns: dict[str, tuple[slice, slice]] = {}
        width = 0
        for module, (in_features, out_features) in targets.items():
            middle, end = width + in_features, width + in_features + out_features
            self._columns[module] = (slice(width, middle), slice(middle, end))
            width = end
        self.values = torch.zeros(ends[-1], width, dtype=dtype, device=device)
        self.gradients = torch.zeros(ends[-1] if trains else 0, width, dtype=dtype, device=device)
        self._scalings: list[dict[str, float]] = [{} for _ in capacities]
        self._ranks: list[dict[str, int]] = [{} for _ in capacities]

    def parameters(self, module: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A (R, i) and B transposed (R, o) of all slots: leaves that share `values`, and collect into `gradients`."""
        leaves = []
        for columns in self._columns[module]:
            leaf = nn.Parameter(self.values[:, columns], requires_grad=self._trains)
            if self._trains:
                leaf.grad = self.gradients[:, columns]
            leaves.append(leaf)
        return leaves[0], leaves[1]

    def load(self, slot: int, adapter: AdapterState) -> None:
        """Put a client's adapter into a slot; its gradient becomes 0."""
        self.clear(slot)
        first, _ = self.row_ranges[slot]
        laid_out = self.laid_out(adapter)
        with torch.no_grad():
            self.values[first : first + len(laid_out)] = laid_out  # one copy for all modules
        self._scalings[slot] = {module: adapter[module].scaling for module in self.targets}
        self._ranks[slot] = {module: adapter[module].rank for module in self.targets}

    def laid_out(self, adapter: AdapterState) -> Tensor:
        """(r, W) factors as rank rows, in their own dtype and on their own device, with r the largest LoRA rank.

        Where ranks differ between modules, rows of 0 (False for masks) fill up.
        """
        ranks = [adapter[module].rank for module in self.targets]
        most = max(ranks)
        parts: list[Tensor] = []
        for module, rank in zip(self.targets, ranks, strict=True):
            pair = (adapter[module].A, adapter[module].B.T)
            parts += pair if rank == most else [F.pad(part, (0, 0, 0, most - rank)) for part in pair]
        return torch.cat(parts, dim=1)

    def clear(self, slot: int) -> None:
        """Empty a slot: its rows become 0."""
        rows = slice(*self.row_ranges[slot])
        self.values[rows] = 0
        if self._trains:
            self.gradients[rows] = 0
        self._scalings[slot] = {}
        self._ranks[slot] = {}

    def read(self, slot: int) -> AdapterState:
        """A copy of the adapter in a slot."""
        first, _ = self.row_ranges[slot]
        most = max(self._ranks[slot].values())
        parts = iter(self.values[first : first + most].split_with_sizes(self.widths, dim=1))
        modules = {}
        for module, rank in self._ranks[slot].items():
            down, up = next(parts), next(parts)
            if rank < most:
                down, up = down[:rank], up[:rank]
            modules[module] = LoraFactors(
                down.clone(memory_format=torch.contiguous_format),
                up.T.clone(memory_format=torch.contiguous_format),
                self._scalings[slot][module],
            )
        return AdapterState(modules)

    def rank(self, slot: int, module: str) -> int:
        """LoRA rank of a module in a slot; 0 in an empty slot."""
        return self._ranks[slot].get(module, 0)

    def scaling(self, slot: int, module: str) -> float:
        """Scaling of a module in a slot; 0 in an empty slot."""
        return self._scalings[slot].get(module, 0.0)
