"""Tests in which the model answers and its texts are scored.

n = number of examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from fedsim.data.batches import length_batches
from fedsim.data.tokens import TokenStore
from fedsim.errors import ConfigError
from fedsim.evaluation.rouge import AnswerScorer, AnswerScores
from fedsim.lora.factors import AdapterState
from fedsim.models.generate import GreedyGenerator

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Questions:
    """What a model is asked, and what it should say.

    Attributes:
        prompts: n arrays of token ids, as the model is given them; none empty.
        targets: n arrays of token ids, the answer as it would be trained on; read for teacher forcing only.
        references: for each the texts that are right, at least one.
    """

    prompts: tuple[Ints, ...]
    targets: tuple[Ints, ...]
    references: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.prompts)


def questions_of(store: TokenStore, examples: Ints) -> Questions:
    """The prompts, answers and references of examples of an instruction corpus, as cut for training.

    Raises:
        ConfigError: the corpus is plain text.
    """
    answers = store.answers
    if answers is None:
        raise ConfigError(
            "evaluation.answers needs instruction data, whose examples have prompts and answers, got plain text; set "
            "data.instruction.format or evaluation.answers.metric=off"
        )
    cut = [
        np.split(store.sequence(example).astype(np.int64), [answers.answer_start[example]])
        for example in examples.tolist()
    ]
    return Questions(
        prompts=tuple(prompt for prompt, _ in cut),
        targets=tuple(target for _, target in cut),
        references=tuple(answers.references(example) for example in examples.tolist()),
    )


def check_room(longest_prompt: int, max_new_tokens: int, max_positions: int | None) -> None:
    """Check that a model has the positions for the longest prompt and its answer.

    Raises:
        ConfigError: it does not.
    """
    needed = longest_prompt + max_new_tokens
    if max_positions is not None and needed > max_positions:
        raise ConfigError(
            f"evaluation.answers.max_new_tokens and the longest prompt ({longest_prompt} tokens) must be at most "
            f"{max_positions} together, the positions of the model, got {needed}; lower it or data.max_tokens"
        )


class AnswerTest(Protocol):
    """Measures adapters on texts of the model, batch by batch.

    The batches are fixed by the examples and the token budget, so any share of them can be measured anywhere;
    `merge_scores` joins the shares.

    Attributes:
        batches: indices of the examples of each batch.
    """

    batches: list[Ints]

    def measure(self, adapter: AdapterState, chosen: Sequence[int] | None = None) -> dict[int, AnswerScores]:
        """Scores of the batches `chosen` (all by default), by batch index."""
        ...


@final
class GeneratedAnswers:
    """Greedy answers to the prompts, against all references.

    Args:
        generator: lets the model speak.
        tokenizer: of the model.
        questions: the test set.
        max_new_tokens: most tokens of an answer.
        batch_tokens: most tokens of a batch with its answers, padding included: what the key-value cache holds.
        max_positions: of the model; None where it has no limit.

    Raises:
        ConfigError: a prompt and its answer may need more positions than the model has.
    """

    def __init__(
        self,
        generator: GreedyGenerator,
        tokenizer: Any,
        questions: Questions,
        max_new_tokens: int,
        batch_tokens: int,
        max_positions: int | None,
    ) -> None:
        lengths = np.array([len(prompt) for prompt in questions.prompts], dtype=np.int64)
        check_room(int(lengths.max(initial=0)), max_new_tokens, max_positions)
        self._generator = generator
        self._tokenizer = tokenizer
        self._questions = questions
        self._max_new_tokens = max_new_tokens
        self._scorer = AnswerScorer()
        self.batches = length_batches(lengths + max_new_tokens, batch_tokens)

    def measure(self, adapter: AdapterState, chosen: Sequence[int] | None = None) -> dict[int, AnswerScores]:
        """See `AnswerTest`."""
        wanted = range(len(self.batches)) if chosen is None else chosen
        asked = self._questions
        prompts = [[asked.prompts[example] for example in self.batches[index]] for index in wanted]
        answers = self._generator.answers(adapter, prompts, self._max_new_tokens)
        measured = {}
        for index, tokens in zip(wanted, answers, strict=True):
            examples = self.batches[index]
            measured[index] = self._scorer.scores(
                examples,
                _texts(self._tokenizer, tokens),
                [asked.references[example] for example in examples],
            )
        return measured


@final
class TeacherForcedGuesses:
    """Rouge-L of next-token guesses made with the true text in view; no generation, and no measure of answers.

    The code of arXiv 2402.11505 reports this as its Rouge-L. For a text of tokens x_0 ... x_L (prompt and answer) and
    g_t = argmax p(. | x_0 ... x_t) it compares, as `published=True` does,

        decode(g_0 ... g_L)      with      decode(x_0 ... x_L),

    without the shift by one between a guess and the token it is for: x_0, which nothing predicts, is in the text, and
    g_L, which is for no token, among the guesses. `published=False` compares g_0 ... g_{L-1} with x_1 ... x_L. Rouge-L
    aligns the texts itself, so the two differ by the words at the ends alone. Either counts the prompt like the answer.

    Departs from the published code: padding is left out, where that code turns each padded label into token 1829 and
    scores the guesses there with the rest.

    Args:
        generator: runs the model.
        tokenizer: of the model.
        questions: the test set.
        batch_tokens: most tokens of a batch, padding included.
        published: without the shift.
    """

    def __init__(
        self,
        generator: GreedyGenerator,
        tokenizer: Any,
        questions: Questions,
        batch_tokens: int,
        published: bool = False,
    ) -> None:
        pairs = zip(questions.prompts, questions.targets, strict=True)
        self._sequences = [np.concatenate(pair) for pair in pairs]
        self._generator = generator
        self._tokenizer = tokenizer
        self._published = published
        self._scorer = AnswerScorer()
        self.batches = length_batches([len(sequence) for sequence in self._sequences], batch_tokens)

    def measure(self, adapter: AdapterState, chosen: Sequence[int] | None = None) -> dict[int, AnswerScores]:
        """See `AnswerTest`."""
        wanted = range(len(self.batches)) if chosen is None else chosen
        batches = [[self._sequences[example] for example in self.batches[index]] for index in wanted]
        guesses = self._generator.teacher_forced(adapter, batches)
        measured = {}
        for index, sequences, guessed in zip(wanted, batches, guesses, strict=True):
            last, first = (None, 0) if self._published else (-1, 1)
            measured[index] = self._compared(
                self.batches[index],
                [guess[:last] for guess in guessed],
                [sequence[first:] for sequence in sequences],
            )
        return measured

    def _compared(self, examples: Ints, guessed: Sequence[Ints], true: Sequence[Ints]) -> AnswerScores:
        truth = [(text,) for text in _texts(self._tokenizer, true)]
        return self._scorer.scores(examples, _texts(self._tokenizer, guessed), truth)


def _texts(tokenizer: Any, sequences: Sequence[Ints]) -> list[str]:
    """Texts without special tokens and without white space around them."""
    return [tokenizer.decode(sequence.tolist(), skip_special_tokens=True).strip() for sequence in sequences]
