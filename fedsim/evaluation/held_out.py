"""Scores of single examples that clients hold but do not train on.

n = number of examples, b = examples of a batch.
"""

from collections.abc import Sequence
from typing import Protocol, final

import numpy as np
from numpy.typing import NDArray

from fedsim.data.batches import length_batches
from fedsim.data.tokens import TokenStore
from fedsim.evaluation.generation import AnswerTest
from fedsim.evaluation.scorers import Scorer
from fedsim.lora.factors import AdapterState

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class ExampleTest(Protocol):
    """Measures an adapter on n examples, one by one.

    The batches are fixed by the examples and the token budget, so any share of them can be measured anywhere.

    Attributes:
        batches: positions of the examples of each batch, from 0 to n - 1.
        counts: (n,) how much each example counts in the score of its client.
    """

    batches: list[Ints]
    counts: Floats

    def measure(self, adapter: AdapterState, chosen: Sequence[int]) -> dict[int, Floats]:
        """(b,) scores of the batches `chosen`, by batch index."""
        ...


@final
class ExampleLosses:
    """Loss in nats per label token; an example counts by its label tokens.

    Args:
        scorer: measures single examples.
        store: that holds the examples.
        examples: (n,) indices in the store.
        batch_tokens: most tokens of a batch, padding included.
    """

    def __init__(self, scorer: Scorer, store: TokenStore, examples: Ints, batch_tokens: int) -> None:
        self._scorer = scorer
        self._store = store
        self._examples = examples
        self.counts = store.num_label_tokens[examples].astype(np.float64)
        self.batches = length_batches(store.num_tokens[examples], batch_tokens)

    def measure(self, adapter: AdapterState, chosen: Sequence[int]) -> dict[int, Floats]:
        """See `ExampleTest`."""
        measured = {}
        for index in chosen:
            batch = self.batches[index]
            [losses] = self._scorer.losses([adapter], self._store, [self._examples[batch]])
            measured[index] = losses / self.counts[batch]
        return measured


@final
class ExampleAnswers:
    """Rouge-L without stemmer of what the model says; each example counts the same.

    Args:
        test: of the n examples.
        num_examples: n.
    """

    def __init__(self, test: AnswerTest, num_examples: int) -> None:
        self._test = test
        self.counts = np.ones(num_examples)
        self.batches = test.batches

    def measure(self, adapter: AdapterState, chosen: Sequence[int]) -> dict[int, Floats]:
        """See `ExampleTest`."""
        return {index: scores.rouge_l for index, scores in self._test.measure(adapter, chosen).items()}
