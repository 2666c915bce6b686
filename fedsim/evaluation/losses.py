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
        """See `perplexity`."""
        return perplexity(self.mean)

    def class_means(self) -> list[float | None]:
        """Loss of each length class in nats per label token; None for a class without test examples."""
        return [
            float(loss / tokens) if tokens else None
            for loss, tokens in zip(self.loss, self.tokens, strict=True)
        ]


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token, infinite where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf


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
        self.batch_tokens = batch_tokens
        positions = length_batches(store.num_tokens[examples], batch_tokens)
        self.batches = [examples[chosen] for chosen in positions]

    def measure(self, adapter: AdapterState, chosen: Sequence[int] | None = None) -> dict[int, LossSums]:
        """Loss sums of the batches `chosen` (all by default), by batch index."""
        wanted = range(len(self.batches)) if chosen is None else chosen
        return {
            index: self.sums(
                self.batches[index], self.scorer.losses([adapter], self.store, [self.batches[index]])[0]
            )
            for index in wanted
        }

    def sums(self, examples: NDArray[np.int64], losses: NDArray[np.float64]) -> LossSums:
        """The sums by length class of examples whose losses are known."""
        classes = self.classes[examples]
        tokens = self.store.num_label_tokens[examples]
        return LossSums(
            np.bincount(classes, weights=losses, minlength=self.num_classes).astype(np.float64),
            np.bincount(classes, weights=tokens, minlength=self.num_classes).astype(np.int64),
        )


def measure_together(adapters: Sequence[AdapterState], tests: Sequence[LossEvaluator]) -> list[LossSums]:
    """Loss sums of several adapters, each on its own test set, as many at once as a batch's token budget holds.

    Args:
        adapters: to measure, at least one.
        tests: the test set of each; all on one scorer, store and budget.
    """
    scorer, store = tests[0].scorer, tests[0].store
    work = [
        (owner, index)
        for index in range(max(len(test.batches) for test in tests))
        for owner, test in enumerate(tests)
        if index < len(test.batches)
    ]
    measured: list[dict[int, LossSums]] = [{} for _ in tests]
    for group in _within_budget(work, tests):
        parts = [tests[owner].batches[index] for owner, index in group]
        losses = scorer.losses([adapters[owner] for owner, _ in group], store, parts)
        for (owner, index), part, part_losses in zip(group, parts, losses, strict=True):
            measured[owner][index] = tests[owner].sums(part, part_losses)
    return [merge_batches(batches) for batches in measured]


def _within_budget(
    work: Sequence[tuple[int, int]], tests: Sequence[LossEvaluator]
) -> list[list[tuple[int, int]]]:
    """Cut (test, batch) pairs into groups of at most `batch_tokens` tokens, each test at most once in a group."""
    groups: list[list[tuple[int, int]]] = []
    tokens = 0
    for owner, index in work:
        test = tests[owner]
        num_tokens = int(test.store.num_tokens[test.batches[index]].sum())
        taken = bool(groups) and any(other == owner for other, _ in groups[-1])
        if not groups or taken or tokens + num_tokens > test.batch_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append((owner, index))
        tokens += num_tokens
    return groups


def merge_batches(parts: Mapping[int, LossSums]) -> LossSums:
    """Sum of batch results in batch order, so that it does not depend on who measured which."""
    return merge([parts[index] for index in sorted(parts)])
