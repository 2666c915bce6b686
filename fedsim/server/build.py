"""From a configuration to the objects of a run."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.aggregation.build import build_strategy
from fedsim.comm.group import Group
from fedsim.config.schema import CohortConfig, Config, TrainingConfig
from fedsim.data.build import FederatedData
from fedsim.errors import ConfigError
from fedsim.evaluation.clients import ClientTest, CommonTest, NoTest, OwnSplitTest
from fedsim.evaluation.losses import LossEvaluator
from fedsim.evaluation.scorers import Scorer
from fedsim.lora.factors import AdapterState
from fedsim.lora.initial import initial_adapter
from fedsim.models.base import BaseModel
from fedsim.seeding import numpy_generator
from fedsim.server.cohort import CohortPolicy, LocalBudget
from fedsim.server.engine import build_engine
from fedsim.server.round import Run
from fedsim.training.settings import LocalSettings, OptimizerSettings


def build_run(config: Config, group: Group, base: BaseModel, data: FederatedData) -> Run:
    """Put the pieces together; checks what only the pieces together can tell.

    Args:
        config: the configuration.
        group: the processes.
        base: the base model on this process's device; its target modules are replaced in place.
        data: examples and partition.

    Raises:
        ConfigError: the configuration does not fit the data or the model.
    """
    strategy = build_strategy(config.strategy.name, config.aggregation.client_weights)
    if not strategy.has_global_model and config.evaluation.client_test == "off":
        raise ConfigError(
            "evaluation.client_test must be common or own_split with strategy.name="
            f"{strategy.name}, which has no global model to test, got 'off'"
        )
    trainer, scorer = build_engine(config, group, base, data.train)
    return Run(
        group=group,
        data=data,
        strategy=strategy,
        trainer=trainer,
        global_test=_evaluator(
            config,
            scorer,
            data,
            sample_examples(
                len(data.test), config.evaluation.max_test_examples, config.run.seed, "max_test_examples"
            ),
        ),
        client_test=_client_test(config, scorer, data),
        cohort=build_cohort_policy(config.cohort, data.partition.num_clients),
        budget=_local_budget(config.training),
        local=_local_settings(config),
        num_packs=config.training.pack.num_packs,
        rounds=config.run.rounds,
        evaluate_every=config.evaluation.every_rounds,
        seed=config.run.seed,
    )


def build_initial_adapter(
    config: Config, targets: dict[str, tuple[int, int]], dtype: torch.dtype = torch.float32
) -> AdapterState:
    """The adapter of round 0 for the configured LoRA, on the CPU.

    Args:
        config: the configuration.
        targets: dotted module path -> (in, out features).
        dtype: of the factors.
    """
    return initial_adapter(
        targets,
        config.lora.rank,
        config.lora.lora_alpha,
        config.lora.use_rslora,
        config.run.seed,
        dtype,
    )


def build_cohort_policy(config: CohortConfig, num_clients: int) -> CohortPolicy:
    """How cohorts are chosen among `num_clients`; a fraction is rounded down, to one client at least."""
    if config.client_ids is not None:
        return CohortPolicy(num_clients, len(config.client_ids), config.client_ids)
    if config.fraction is not None:
        # the epsilon keeps 0.3 of 10 clients at 3, not 2
        return CohortPolicy(num_clients, max(1, math.floor(config.fraction * num_clients + 1e-9)))
    assert config.size is not None
    return CohortPolicy(num_clients, config.size)


def sample_examples(num_examples: int, limit: int | None, seed: int, purpose: str) -> NDArray[np.int64]:
    """Indices of all examples, or of `limit` of them drawn from the stream (seed, purpose), ascending."""
    if limit is None or limit >= num_examples:
        return np.arange(num_examples, dtype=np.int64)
    drawn = numpy_generator(seed, purpose).choice(num_examples, size=limit, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


def _local_budget(config: TrainingConfig) -> LocalBudget:
    return LocalBudget(
        config.local_epochs, config.local_steps, config.batch_size * config.gradient_accumulation_steps
    )


def _local_settings(config: Config) -> LocalSettings:
    training = config.training
    return LocalSettings(
        batch_size=training.batch_size,
        accumulation=training.gradient_accumulation_steps,
        max_grad_norm=training.max_grad_norm,
        optimizer=OptimizerSettings(**training.optimizer.model_dump()),
        schedule=training.schedule.name,
        warmup_steps=training.schedule.warmup_steps,
        lora_dropout=config.lora.dropout,
        base_dropout=config.model.dropout == "as_config",
        seed=config.run.seed,
    )


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
        chosen = sample_examples(len(own), limit, config.run.seed, f"max_client_test_examples/{client_id}")
        return LossEvaluator(
            scorer,
            data.train,
            data.train_classes,
            data.partition.num_classes,
            own[chosen],
            evaluation.batch_tokens,
        )

    return OwnSplitTest(own_split)
