"""Loss sums of single examples under an adapter: with padded batches, or with packed rows."""

from collections.abc import Sequence
from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.batches import IGNORED, collate
from fedsim.data.tokens import TokenStore
from fedsim.lora.factors import AdapterState
from fedsim.models.adapted import AdaptedModel
from fedsim.models.losses import label_losses
from fedsim.models.out_of_memory import SmallerParts
from fedsim.models.packing import pack_tokens
from fedsim.models.rows import MAX_ROW_VALUES, RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_products
from fedsim.models.targets import check_same_modules

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Work = tuple[Sequence[AdapterState], Sequence[Ints]]
"""Adapters, and for each the indices of its examples."""

BUDGET_KEY = "evaluation.batch_tokens"


class Scorer(Protocol):
    """Measures examples of a store under adapters."""

    def losses(
        self, adapters: Sequence[AdapterState], store: TokenStore, parts: Sequence[Ints]
    ) -> list[Floats]:
        """For each adapter, (number of its examples,) float64: loss summed over each example's label tokens, in nats.

        Args:
            adapters: one for each part.
            store: the examples.
            parts: for each adapter, indices of its examples; none may be empty.
        """
        ...


def _halves(examples: Ints) -> tuple[Ints, Ints] | None:
    if len(examples) < 2:
        return None
    first, second = np.array_split(examples, 2)
    return first, second


def _half_the_work(work: Work) -> tuple[Work, Work] | None:
    adapters, parts = work
    if len(parts) > 1:
        middle = len(parts) // 2
        return (adapters[:middle], parts[:middle]), (adapters[middle:], parts[middle:])
    cut = _halves(parts[0])
    return None if cut is None else ((adapters, [cut[0]]), (adapters, [cut[1]]))


def _largest_rank(adapter: AdapterState) -> int:
    return max(factors.rank for factors in adapter.values())


@final
class PaddedScorer:
    """Padded batches through the base with one adapter after another.

    Args:
        model: the base with one adapter slot.
        pad_id: token id that fills a batch up.
    """

    def __init__(self, model: AdaptedModel, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id
        self._parts = SmallerParts("a test batch", model.device, BUDGET_KEY)

    def losses(
        self, adapters: Sequence[AdapterState], store: TokenStore, parts: Sequence[Ints]
    ) -> list[Floats]:
        """See `Scorer`."""
        return [
            np.concatenate(
                self._parts.run(
                    examples,
                    lambda some: len(some) * int(store.num_tokens[some].max()),
                    lambda some, adapter=adapter: [self._part_losses(adapter, store, some)],  # type: ignore[misc]
                    _halves,
                )
            )
            for adapter, examples in zip(adapters, parts, strict=True)
        ]

    def _part_losses(self, adapter: AdapterState, store: TokenStore, examples: Ints) -> Floats:
        self._model.load(adapter)
        batch = collate(store, examples, self._pad_id)
        device = self._model.device
        with torch.inference_mode():
            logits = self._model.logits(batch.input_ids.to(device), batch.attention_mask.to(device))
            losses = label_losses(logits, batch.targets.to(device)).double().cpu().numpy()
        owner = (batch.targets != IGNORED).nonzero()[:, 0].numpy()
        return np.bincount(owner, weights=losses, minlength=len(examples)).astype(np.float64)


@final
class PackedScorer:
    """Packed rows through the engine that trains: adapters together, logits only where there is a label.

    Args:
        model: the base with slots for several adapters.
    """

    def __init__(self, model: StackedModel) -> None:
        self._model = model
        self._loaded: tuple[AdapterState, RankRows] | None = None
        self._parts = SmallerParts("a test batch", model.device, BUDGET_KEY)

    def losses(
        self, adapters: Sequence[AdapterState], store: TokenStore, parts: Sequence[Ints]
    ) -> list[Floats]:
        """See `Scorer`."""
        losses = [
            measured
            for some in self._together(adapters)
            for measured in self._parts.run(
                (adapters[some], parts[some]),
                lambda work: int(store.num_tokens[np.concatenate(work[1])].sum()),
                lambda work: self._losses(work[0], store, work[1]),
                _half_the_work,
            )
        ]
        if len(losses) == len(parts):
            return losses
        # some adapter's examples were cut
        ends = np.cumsum([len(part) for part in parts])
        return np.split(np.concatenate(losses), ends[:-1])

    def _together(self, adapters: Sequence[AdapterState]) -> list[slice]:
        """Which adapters are in one row: neighbours, as many as `MAX_ROW_VALUES` allows."""
        most = MAX_ROW_VALUES[self._model.device.type] // sum(i + o for i, o in self._model.targets.values())
        starts, rank_rows = [0], 0
        for index, rank in enumerate(map(_largest_rank, adapters)):
            if index and rank_rows + rank > most:
                starts.append(index)
                rank_rows = 0
            rank_rows += rank
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(adapters)], strict=True)]

    def _losses(
        self, adapters: Sequence[AdapterState], store: TokenStore, parts: Sequence[Ints]
    ) -> list[Floats]:
        rows = self._load(tuple(adapters))
        packed = pack_tokens(store, parts, self._model.device)
        plan = StepPlan(plan_products(rows, packed, range(len(parts)), self._model.dtype))
        self._model.attach(rows)
        try:
            with torch.no_grad(), self._model.planned(plan):
                measured = self._model.passes.run("test", lambda: self._model.label_losses(packed))
                losses = measured.double().cpu().numpy()
        finally:
            self._model.attach(None)
        sizes = [len(part) for part in parts]
        by_example = np.bincount(packed.sequence_of_label.cpu().numpy(), weights=losses, minlength=sum(sizes))
        return np.split(by_example.astype(np.float64), np.cumsum(sizes)[:-1])

    def _load(self, adapters: tuple[AdapterState, ...]) -> RankRows:
        """Rank rows that hold the adapters; those of the last call if it had the same one.

        Those of several are not kept: they would lie in the way of the halves when memory does not suffice, and of the
        next round's training.
        """
        if self._loaded is not None and len(adapters) == 1 and self._loaded[0] is adapters[0]:
            return self._loaded[1]
        self._loaded = None
        for adapter in adapters:
            check_same_modules(adapter, self._model.targets)
        ranks = [_largest_rank(adapter) for adapter in adapters]
        dtype = next(iter(adapters[0].values())).A.dtype
        rows = RankRows(self._model.targets, ranks, dtype, self._model.device, trains=False)
        for slot, adapter in enumerate(adapters):
            rows.load(slot, adapter)
        if len(adapters) == 1:
            self._loaded = (adapters[0], rows)
        return rows
