"""Scores of answers against reference texts: Rouge-L and exact match.

Rouge-L is the F-measure of google's `rouge-score`, whose tokens are runs of a-z and 0-9 in the lower-cased text. All
scores are in [0, 1]; Natural Instructions prints them times 100. A mean here is a plain sum over a count: the
aggregator of `rouge-score`, which the code of arXiv 2402.11505 uses, draws bootstrap samples from a global generator
and gives another figure each time.

n = number of answers.
"""

import math
import string
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import DataError

Floats = NDArray[np.float64]
Group = TypeVar("Group", bound=Hashable)


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Scores of single answers.

    Kept by answer and not as sums, so that any grouping can be taken of them, and so that those of several processes
    join exactly.

    Attributes:
        examples: (n,) int64, which example each answer belongs to.
        rouge_l: (n,) Rouge-L without stemmer, as in the code of arXiv 2402.11505; best of the references.
        rouge_l_stemmed: (n,) the same with Porter's stemmer: the Rouge-L of Natural Instructions.
        exact_match: (n,) 1 where the answer equals a reference after `normalized`.
        without_tokens: (n,) bool, no reference has a token for Rouge-L (other scripts than Latin, bare punctuation),
            so that the score is 0 whatever the answer.
        predictions: n texts; none after `without_predictions`.
    """

    examples: NDArray[np.int64]
    rouge_l: Floats
    rouge_l_stemmed: Floats
    exact_match: Floats
    without_tokens: NDArray[np.bool_]
    predictions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def columns(self) -> dict[str, Floats]:
        """Name in the figures -> score of each answer."""
        return {
            "rougeL": self.rouge_l,
            "rougeL_stem": self.rouge_l_stemmed,
            "exact_match": self.exact_match,
        }

    def without_predictions(self) -> "AnswerScores":
        """The scores alone, to be sent to other processes."""
        return replace(self, predictions=())


@final
class AnswerScorer:
    """Scores texts. Holds no state but tokenizers."""

    def __init__(self) -> None:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        self._tokenizer: Any = DefaultTokenizer(use_stemmer=False)
        self._plain: Any = RougeScorer(["rougeL"], tokenizer=self._tokenizer)
        self._stemmed: Any = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))

    def scores(
        self, examples: NDArray[np.int64], predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> AnswerScores:
        """Scores of answers.

        Args:
            examples: (n,) which example each answer belongs to.
            predictions: n texts.
            references: for each, the texts that would be right; the best one counts.

        Raises:
            DataError: an answer has no reference.
        """
        pairs = list(zip(predictions, references, strict=True))
        for example, texts in zip(examples.tolist(), references, strict=True):
            if not texts:
                raise DataError(
                    f"an example must have at least one reference text, example {example} has none"
                )
        return AnswerScores(
            examples=examples,
            rouge_l=_column(
                self._plain.score_multi(texts, answer)["rougeL"].fmeasure for answer, texts in pairs
            ),
            rouge_l_stemmed=_column(
                self._stemmed.score_multi(texts, answer)["rougeL"].fmeasure for answer, texts in pairs
            ),
            exact_match=_column(
                float(normalized(answer) in {normalized(text) for text in texts}) for answer, texts in pairs
            ),
            without_tokens=np.array(
                [not any(self._tokenizer.tokenize(text) for text in texts) for texts in references],
                dtype=bool,
            ),
            predictions=tuple(predictions),
        )


def _column(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, white space as single blanks: what Natural Instructions compares."""
    kept = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(kept.split())


def merge_scores(parts: Mapping[int, AnswerScores]) -> AnswerScores:
    """All answers of the batches, in the order of their examples, whoever measured which batch.

    Raises:
        DataError: there is no answer.
    """
    batches = [parts[index] for index in sorted(parts)]
    if not any(map(len, batches)):
        raise DataError("a test of answers must hold at least one example, got none")
    examples = np.concatenate([batch.examples for batch in batches])
    order = np.argsort(examples, kind="stable")
    predictions = [text for batch in batches for text in batch.predictions]
    has_texts = len(predictions) == len(examples)
    return AnswerScores(
        examples=examples[order],
        rouge_l=np.concatenate([batch.rouge_l for batch in batches])[order],
        rouge_l_stemmed=np.concatenate([batch.rouge_l_stemmed for batch in batches])[order],
        exact_match=np.concatenate([batch.exact_match for batch in batches])[order],
        without_tokens=np.concatenate([batch.without_tokens for batch in batches])[order],
        predictions=tuple(predictions[index] for index in order) if has_texts else (),
    )


def mean(values: Floats) -> float:
    """Sum over count of at least one value; the sum is exact, so the order is irrelevant."""
    return math.fsum(values) / len(values)


def group_means(values: Floats, groups: Sequence[Group]) -> dict[Group, float]:
    """Mean of each group that has a value, for example of each task or category.

    Args:
        values: (n,).
        groups: n, the group of each value.
    """
    members: dict[Group, list[float]] = {}
    for value, group in zip(values.tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    return {group: math.fsum(own) / len(own) for group, own in members.items()}


def weighted_mean(means: Mapping[Group, float], weights: Mapping[Group, float]) -> float:
    """sum_i n_i score_i / sum_i n_i over clients i: the round's score of arXiv 2402.11505.

    Args:
        means: score of each client.
        weights: at least these clients' weights, there the number of *training* examples; not all 0.

    Raises:
        DataError: no client has a positive weight.
    """
    total = math.fsum(weights[group] for group in means)
    if total <= 0:
        raise DataError(
            f"a weighted mean must have a client with a positive weight, got {len(means)} without"
        )
    return math.fsum(weights[group] * score for group, score in means.items()) / total


def answer_metrics(scores: AnswerScores, clients: Sequence[Group], suffix: str = "") -> dict[str, float]:
    """What a round reports of answers.

    `test/rougeL` counts each example the same, `..._by_client` each client (task). The means contain the zeros of
    answers that Rouge-L has no tokens for; over the others alone the mean is
    test/rougeL * n / (n - test/num_without_rouge_tokens).

    Args:
        scores: at least one.
        clients: n, the client (task) of each answer.
        suffix: appended to each key, `_tf` for teacher-forced guesses.
    """
    metrics = {}
    for name, values in scores.columns().items():
        by_client = group_means(values, clients)
        metrics[f"test/{name}{suffix}"] = mean(values)
        metrics[f"test/{name}{suffix}_by_client"] = math.fsum(by_client.values()) / len(by_client)
    metrics[f"test/num_without_rouge_tokens{suffix}"] = float(scores.without_tokens.sum())
    return metrics
