"""Test losses as sums over fixed batches.

Shapes: C = number of length classes, b = examples of a batch, L = their padded length.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data.batches import length_batches
from fedsim.data.tokens import TokenStore
from fedsim.errors import DataError
from fedsim.evaluation.scorers import Scorer
from fedsim.lora.factors import AdapterState


@dataclass(frozen=True, slots=True)
class LossSums:
    """Loss sums of some test examples by length class.

    Attributes:
        loss: (C,) float64, sum of the cross-entropy of label tokens, in nats.
        tokens: (C,) int64, number of label tokens.
    """

    loss: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Loss in nats per label token; each label token counts the same."""
        return float(self.loss.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp(mean), infinite where that overflows."""
        return math.exp(self.mean) if self.mean < 709 else math.inf

    def class_means(self) -> list[float | None]:
        """Loss of each length class in nats per label token; None for a class without test examples."""
        return [
            float(loss / tokens) if tokens else None
            for loss, tokens in zip(self.loss, self.tokens, strict=True)
        ]


def merge(parts: Sequence[LossSums]) -> LossSums:
    """Sum of the parts, added in the order given.

    Raises:
        DataError: there is no part.
    """
    if not parts:
        raise DataError("a test set must hold at least one example, got none")
    loss = np.zeros_like(parts[0].loss)
    tokens = np.zeros_like(parts[0].tokens)
    for part in parts:
        loss += part.loss
        tokens += part.tokens
    return LossSums(loss, tokens)


class LossEvaluator:
    """Measures adapters on one set of test examples, batch by batch.

    The batches are fixed by the examples and the token budget, so any share of them can be measured anywhere.

    Args:
        scorer: measures single examples.
        store: test examples.
        classes: length class of each example of the store.
        num_classes: C.
        examples: indices of the examples to use.
        batch_tokens: most tokens of a batch, padding included.
    """

    def __init__(
        self,
        scorer: Scorer,
        store: TokenStore,
        classes: NDArray[np.int64],
        num_classes: int,
        examples: NDArray[np.int64],
        batch_tokens: int,
    ) -> None:
        self.scorer = scorer
        self.store = store
        self.classes = classes
        self.num_classes = num_classes
        positions = length_batches(store.num_tokens[examples], batch_tokens)
        self.batches = [examples[chosen] for chosen in positions]

    def measure(self, adapter: AdapterState, chosen: Sequence[int] | None = None) -> dict[int, LossSums]:
        """Loss sums of the batches `chosen` (all by default), by batch index."""
        self.scorer.use(adapter)
        wanted = range(len(self.batches)) if chosen is None else chosen
        return {index: self._measure_batch(self.batches[index]) for index in wanted}

    def loss(self, adapter: AdapterState) -> float:
        """Loss over all batches in nats per label token."""
        return merge_batches(self.measure(adapter)).mean

    def _measure_batch(self, examples: NDArray[np.int64]) -> LossSums:
        losses = self.scorer.example_losses(self.store, examples)
        classes = self.classes[examples]
        tokens = self.store.num_label_tokens[examples]
        return LossSums(
            np.bincount(classes, weights=losses, minlength=self.num_classes).astype(np.float64),
            np.bincount(classes, weights=tokens, minlength=self.num_classes).astype(np.int64),
        )


def merge_batches(parts: Mapping[int, LossSums]) -> LossSums:
    """Sum of batch results in batch order, so that it does not depend on who measured which."""
    return merge([parts[index] for index in sorted(parts)])
