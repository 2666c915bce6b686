"""Sections `evaluation` and `early_stopping`: what is measured, and when that ends a run."""

from typing import Literal

from pydantic import Field

from fedsim.config.node import Node, key


class AnswersConfig(Node):
    """Scores of the global model's answers on the global test set; for instruction data."""

    metric: Literal["off", "generated", "teacher_forced", "teacher_forced_published"] = key(
        "off",
        "generated: Rouge-L and exact match of greedy answers; teacher_forced: Rouge-L of next-token guesses over the "
        "whole text, which is no measure of answers; ..._published: the same without the shift by one token, as in the "
        "code of arXiv 2402.11505",
    )
    max_new_tokens: int = key(128, "most tokens of a generated answer", "tokens", gt=0)
    max_examples: int | None = key(
        None, "use at most this many test examples, drawn with run.seed; null: all", "examples", gt=0
    )


class EvaluationConfig(Node):
    """What is measured, and how often."""

    every_rounds: int = key(
        1, "evaluate after every so many rounds, and always after the last", "rounds", gt=0
    )
    client_test: Literal["common", "own_split", "off"] = key(
        "common",
        "test set of a client's adapter before and after local training: the global test set (as Plato does, "
        "which arXiv 2502.18910 most likely used), the client's own held-out examples, or none",
    )
    max_test_examples: int | None = key(
        None, "use at most this many test examples, drawn with run.seed; null: all", "examples", gt=0
    )
    max_client_test_examples: int | None = key(
        100, "as above, for the test of one client; null: all", "examples", gt=0
    )
    batch_tokens: int = key(4096, "most tokens of an evaluation batch, padding included", "tokens", gt=0)
    answers: AnswersConfig = Field(default_factory=AnswersConfig)


class EarlyStoppingConfig(Node):
    """Whether to stop before the last round, and which state to export."""

    metric: Literal["off", "test_loss", "validation_loss", "test_rouge_l", "validation_rouge_l"] = key(
        "off",
        "what must go on improving, in the rounds of evaluation.every_rounds; test: the global model after the round, "
        "on the global test set; validation: the global model before the round, on what its clients keep for their own "
        "evaluation, weighted by their training examples (code of arXiv 2402.11505); rouge_l: as in evaluation.answers",
    )
    patience: int = key(
        3,
        "evaluations in a row without improvement that are put up with; one more stops the run (arXiv 2402.11505: 3, "
        "so it stops at the fourth)",
        "evaluations",
        ge=0,
    )
    min_delta: float = key(0.0, "an improvement must be larger than this", ge=0)
    from_round: int = key(
        0, "evaluations in rounds before this one, counted from 0, do not count", "rounds", ge=0
    )
    export: Literal["best", "last"] = key(
        "best",
        "the state that becomes adapter/: that of the best evaluation, whose checkpoint is kept, or the last one",
    )
