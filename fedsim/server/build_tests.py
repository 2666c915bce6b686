"""From a configuration to the tests of a run: losses, answers, validation, and when to stop by them."""

import logging

import numpy as np
from numpy.typing import NDArray

from fedsim.config.schema import Config
from fedsim.data.build import FederatedData
from fedsim.errors import ConfigError
from fedsim.evaluation.clients import ClientTest, CommonTest, NoTest, OwnSplitTest
from fedsim.evaluation.generation import (
    AnswerTest,
    GeneratedAnswers,
    Questions,
    TeacherForcedGuesses,
    check_room,
    questions_of,
)
from fedsim.evaluation.held_out import ExampleAnswers, ExampleLosses, ExampleTest
from fedsim.evaluation.losses import LossEvaluator
from fedsim.evaluation.scorers import Scorer
from fedsim.models.adapted import AdaptedModel
from fedsim.models.architecture import max_positions_of
from fedsim.models.base import BaseModel
from fedsim.models.generate import GreedyGenerator, stop_tokens
from fedsim.models.stacked import StackedModel
from fedsim.seeding import numpy_generator
from fedsim.server.answers import AnswerEvaluation
from fedsim.server.early_stopping import StoppingRule
from fedsim.server.validation import Validation

logger = logging.getLogger(__name__)


def build_tests(config: Config, scorer: Scorer, data: FederatedData) -> tuple[LossEvaluator, ClientTest]:
    """The global test and the clients' tests, both measured by `scorer`."""
    examples = sample_examples(
        len(data.test), config.evaluation.max_test_examples, config.run.seed, "max_test_examples"
    )
    return _evaluator(config, scorer, data, examples), _client_test(config, scorer, data)


def build_answers(
    config: Config, model: AdaptedModel | StackedModel, base: BaseModel, data: FederatedData
) -> AnswerEvaluation | None:
    """The test of the global model's answers; None without one."""
    answers = config.evaluation.answers
    if answers.metric == "off":
        return None
    store = data.test
    examples = sample_examples(len(store), answers.max_examples, config.run.seed, "max_answer_examples")
    questions = questions_of(store, examples)
    assert store.answers is not None, "questions_of refuses plain text"
    test = _answer_test(config, model, base, questions)
    tasks = [store.answers.task(example) or "" for example in examples.tolist()]
    categories = [store.answers.category(example) for example in examples.tolist()]
    known = [category for category in categories if category is not None]
    evaluation = AnswerEvaluation(
        test, tasks, known if len(known) == len(categories) else (), _suffix(config)
    )
    left_out = evaluation.left_out()
    if left_out is not None:
        logger.info("evaluation.answers: %s", left_out)
    return evaluation


def build_validation(
    config: Config, scorer: Scorer, model: AdaptedModel | StackedModel, base: BaseModel, data: FederatedData
) -> Validation | None:
    """The test before a round on its clients' own examples, by which early stopping decides; None without one.

    Raises:
        ConfigError: no client keeps an example for it.
    """
    metric = config.early_stopping.metric
    if not metric.startswith("validation"):
        return None
    partition, budget = data.partition, config.evaluation.batch_tokens
    # what the corpus means for this, else what client_test_fraction has set aside
    held = partition.test_indices if partition.eval_indices is None else partition.eval_indices
    own = partition.test if partition.eval_indices is None else partition.evaluation
    if held.size == 0:
        raise ConfigError(
            f"early_stopping.metric must be off or of the test set where no client keeps an example for its own "
            f"evaluation, got '{metric}'; raise data.client_test_fraction, or give clients more examples"
        )

    def examples_of(client_id: int) -> NDArray[np.int64]:
        return _some_of_client(config, own(client_id), client_id)

    if metric == "validation_loss":
        return Validation(
            "loss",
            examples_of,
            partition.sizes,
            lambda examples: ExampleLosses(scorer, data.train, examples, budget),
        )

    def prepare(examples: NDArray[np.int64]) -> ExampleTest:
        test = _answer_test(config, model, base, questions_of(data.train, examples))
        return ExampleAnswers(test, len(examples))

    if config.evaluation.answers.metric == "generated":
        assert data.train.answers is not None, "the configuration is checked before"
        longest = int(data.train.answers.answer_start[held].max())
        check_room(longest, config.evaluation.answers.max_new_tokens, max_positions_of(model.model.config))
    return Validation(f"rougeL{_suffix(config)}", examples_of, partition.sizes, prepare)


def build_stopping_rule(config: Config) -> StoppingRule | None:
    """When the run stops before its last round; None for never."""
    chosen = config.early_stopping
    if chosen.metric == "off":
        return None
    where, _, what = chosen.metric.partition("_")
    return StoppingRule(
        figure=f"{where}/loss" if what == "loss" else f"{where}/rougeL{_suffix(config)}",
        larger_is_better=what != "loss",
        before_training=where == "validation",
        patience=chosen.patience,
        min_delta=chosen.min_delta,
        from_round=chosen.from_round,
    )


def sample_examples(num_examples: int, limit: int | None, seed: int, purpose: str) -> NDArray[np.int64]:
    """Indices of all examples, or of `limit` of them drawn from the stream (seed, purpose), ascending."""
    if limit is None or limit >= num_examples:
        return np.arange(num_examples, dtype=np.int64)
    drawn = numpy_generator(seed, purpose).choice(num_examples, size=limit, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


def _evaluator(
    config: Config, scorer: Scorer, data: FederatedData, examples: NDArray[np.int64]
) -> LossEvaluator:
    return LossEvaluator(
        scorer,
        data.test,
        data.test_classes,
        data.partition.num_classes,
        examples,
        config.evaluation.batch_tokens,
    )


def _client_test(config: Config, scorer: Scorer, data: FederatedData) -> ClientTest:
    evaluation = config.evaluation
    limit = evaluation.max_client_test_examples
    if evaluation.client_test == "off":
        return NoTest()
    if evaluation.client_test == "common":
        examples = sample_examples(len(data.test), limit, config.run.seed, "max_client_test_examples")
        return CommonTest(_evaluator(config, scorer, data, examples))

    def own_split(client_id: int) -> LossEvaluator | None:
        own = data.partition.test(client_id) if client_id >= 0 else np.empty(0, dtype=np.int64)
        if len(own) == 0:
            return None
        return LossEvaluator(
            scorer,
            data.train,
            data.train_classes,
            data.partition.num_classes,
            _some_of_client(config, own, client_id),
            evaluation.batch_tokens,
        )

    return OwnSplitTest(own_split)


def _some_of_client(config: Config, own: NDArray[np.int64], client_id: int) -> NDArray[np.int64]:
    """At most `evaluation.max_client_test_examples` of a client's own examples."""
    limit, seed = config.evaluation.max_client_test_examples, config.run.seed
    return own[sample_examples(len(own), limit, seed, f"max_client_test_examples/{client_id}")]


def _answer_test(
    config: Config, model: AdaptedModel | StackedModel, base: BaseModel, questions: Questions
) -> AnswerTest:
    answers, budget = config.evaluation.answers, config.evaluation.batch_tokens
    generator = GreedyGenerator(model, base.pad_id, stop_tokens(base.model, base.tokenizer))
    if answers.metric == "generated":
        limit = max_positions_of(model.model.config)
        return GeneratedAnswers(generator, base.tokenizer, questions, answers.max_new_tokens, budget, limit)
    published = answers.metric == "teacher_forced_published"
    return TeacherForcedGuesses(generator, base.tokenizer, questions, budget, published)


def _suffix(config: Config) -> str:
    """What is put behind the names of figures of answers."""
    return "" if config.evaluation.answers.metric == "generated" else "_tf"
