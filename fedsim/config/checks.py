"""Rules that tie several keys together, checked before anything is loaded."""

from collections.abc import Iterator

from fedsim.config.checks_clients import check_clients, check_cohort, check_published_cohorts
from fedsim.config.checks_data import check_data, check_partition, needs_own_examples
from fedsim.config.checks_strategy import (
    check_aggregation,
    check_privacy,
    check_scaffold,
    check_slora,
    check_strategy,
)
from fedsim.config.checks_training import (
    check_checkpointing,
    check_lora,
    check_model,
    check_sharding,
    check_training,
)
from fedsim.config.data_section import DataConfig
from fedsim.config.evaluation_section import EvaluationConfig
from fedsim.config.keys import show
from fedsim.config.messages import refuse
from fedsim.config.rules import unused_keys
from fedsim.config.schema import Config
from fedsim.config.strategy_traits import check_traits


def cross_checks(config: Config) -> None:
    """Refuses values that do not go together, or that would silently do nothing.

    Raises:
        ConfigError: one line that names every problem.
    """
    refuse(
        [
            *check_cohort(config.cohort, config.data.partition.num_clients),
            *check_clients(config),
            *check_published_cohorts(config.cohort, config.run),
            *check_data(config.data),
            *check_partition(config.data),
            *check_model(config.model, config.run),
            *check_sharding(config),
            *check_lora(config.lora),
            *check_training(config.training),
            *check_checkpointing(config.training, config.model),
            *check_strategy(config.strategy),
            *check_slora(config),
            *check_scaffold(config),
            *check_aggregation(config.aggregation, config.run),
            *check_privacy(config),
            *check_traits(config),
            *_evaluation(config.evaluation, config.data),
            *_early_stopping(config),
            *_comm(config),
        ]
    )


def _evaluation(evaluation: EvaluationConfig, data: DataConfig) -> Iterator[str]:
    if evaluation.client_test == "own_split":
        yield from needs_own_examples(data, "when evaluation.client_test is own_split")
    answers = evaluation.answers
    if answers.metric == "off":
        because = "when evaluation.answers.metric is off"
        yield from unused_keys("evaluation.answers", answers, ("max_new_tokens", "max_examples"), because)
    elif data.instruction.format == "off":
        yield (
            "evaluation.answers.metric must be off for plain text, whose examples have no answers, got "
            f"{show(answers.metric)}; set data.instruction.format for instruction data"
        )
    if answers.metric.startswith("teacher_forced"):
        because = f"when evaluation.answers.metric is {answers.metric}"
        yield from unused_keys("evaluation.answers", answers, ("max_new_tokens",), because)
    if evaluation.batch_tokens < data.max_tokens:
        yield (
            f"evaluation.batch_tokens must be at least data.max_tokens={data.max_tokens}, got "
            f"{evaluation.batch_tokens}"
        )


def _early_stopping(config: Config) -> Iterator[str]:
    rule, strategy = config.early_stopping, config.strategy
    if rule.metric == "off":
        names = tuple(name for name in type(rule).model_fields if name != "metric")
        yield from unused_keys("early_stopping", rule, names, "when early_stopping.metric is off")
        return
    if rule.metric.startswith("validation"):
        yield from needs_own_examples(config.data, f"when early_stopping.metric is {rule.metric}")
        if config.aggregation.privacy.clip_norm is not None:
            yield (
                "early_stopping.metric must be off or of the test set with aggregation.privacy.clip_norm set, since "
                f"the privacy accountant does not count what validation tells about clients, got {show(rule.metric)}"
            )
    if rule.metric.endswith("rouge_l") and config.evaluation.answers.metric == "off":
        yield f"evaluation.answers.metric must not be off when early_stopping.metric is {rule.metric}, got 'off'"
    if rule.from_round >= config.run.rounds:
        yield (
            f"early_stopping.from_round must be below run.rounds={config.run.rounds}, got {rule.from_round}; set "
            "early_stopping.metric=off to run all rounds"
        )
    if strategy.name == "slora" and rule.from_round < strategy.slora.rounds:
        yield (
            f"early_stopping.from_round must be at least strategy.slora.rounds={strategy.slora.rounds} with "
            f"strategy.name=slora, whose first rounds train no adapter, got {rule.from_round}"
        )


def _comm(config: Config) -> Iterator[str]:
    if config.run.device == "cpu" and config.comm.backend == "nccl":
        yield "comm.backend must be auto or gloo when run.device is cpu, got 'nccl'"
