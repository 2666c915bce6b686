"""Loss sums of single examples under an adapter: with padded batches, or with packed rows."""

from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.batches import IGNORED, collate
from fedsim.data.tokens import TokenStore
from fedsim.lora.factors import AdapterState
from fedsim.models.adapted import AdaptedModel
from fedsim.models.losses import label_losses
from fedsim.models.packing import pack_tokens
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_tiles

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Scorer(Protocol):
    """Measures examples of a store under an adapter."""

    def use(self, adapter: AdapterState) -> None:
        """Measure under `adapter` from now on."""
        ...

    def example_losses(self, store: TokenStore, examples: Ints) -> Floats:
        """(number of examples,) float64: sum of the cross-entropy over each one's label tokens, in nats."""
        ...


@final
class PaddedScorer:
    """Padded batches through the base with one adapter.

    Args:
        model: the base with one adapter slot.
        pad_id: token id that fills a batch up.
    """

    def __init__(self, model: AdaptedModel, pad_id: int) -> None:
        self._model = model
        self._pad_id = pad_id

    def use(self, adapter: AdapterState) -> None:
        """See `Scorer`."""
        self._model.load(adapter)

    def example_losses(self, store: TokenStore, examples: Ints) -> Floats:
        """See `Scorer`."""
        batch = collate(store, examples, self._pad_id)
        device = self._model.device
        with torch.inference_mode():
            logits = self._model.logits(batch.input_ids.to(device), batch.attention_mask.to(device))
            losses = label_losses(logits, batch.targets.to(device)).double().cpu().numpy()
        owner = (batch.targets != IGNORED).nonzero()[:, 0].numpy()
        return np.bincount(owner, weights=losses, minlength=len(examples)).astype(np.float64)


@final
class PackedScorer:
    """Packed rows through the engine that trains; logits exist only where there is a label.

    Args:
        model: the base with slots for several adapters, of which one is used.
    """

    def __init__(self, model: StackedModel) -> None:
        self._model = model
        self._rows: RankRows | None = None

    def use(self, adapter: AdapterState) -> None:
        """See `Scorer`."""
        rank = max(factors.rank for factors in adapter.values())
        dtype = next(iter(adapter.values())).A.dtype
        self._rows = RankRows(self._model.targets, [rank], dtype, self._model.device)
        self._rows.load(0, adapter)

    def example_losses(self, store: TokenStore, examples: Ints) -> Floats:
        """See `Scorer`."""
        assert self._rows is not None, "an adapter is set before examples are measured"
        packed = pack_tokens(store, [examples], self._model.device)
        self._model.attach(self._rows)
        with (
            torch.no_grad(),
            self._model.planned(StepPlan(plan_tiles(self._rows, packed, [0], self._model.dtype))),
        ):
            losses = self._model.label_losses(packed).double().cpu().numpy()
        self._model.attach(None)
        owner = packed.sequence_of_label.cpu().numpy()
        return np.bincount(owner, weights=losses, minlength=len(examples)).astype(np.float64)
