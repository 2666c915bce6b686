"""From a configuration to the objects of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.aggregation.build import build_strategy
from fedsim.aggregation.privacy import PrivacyAccountant
from fedsim.aggregation.private import PrivacySettings
from fedsim.aggregation.server_optimizers import ServerOptimizerSettings
from fedsim.aggregation.strategy import Federation, Strategy
from fedsim.comm.group import Group
from fedsim.config.clients_section import ClientsConfig, CohortConfig
from fedsim.config.paths import local_path
from fedsim.config.schema import Config
from fedsim.config.strategy_section import StrategyConfig
from fedsim.config.training_section import TrainingConfig
from fedsim.config.yaml_text import read_yaml
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
from fedsim.lora.factors import AdapterState
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.models.adapted import AdaptedModel
from fedsim.models.architecture import max_positions_of
from fedsim.models.base import BaseModel
from fedsim.models.base_update import UpdatableBase
from fedsim.models.generate import GreedyGenerator, stop_tokens
from fedsim.models.passes import FreePasses
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.seeding import numpy_generator
from fedsim.server.aggregation import Aggregator
from fedsim.server.answers import AnswerEvaluation
from fedsim.server.client_store import ClientStore
from fedsim.server.cohort import CohortPolicy, LocalBudget
from fedsim.server.early_stopping import StoppingRule
from fedsim.server.engine import build_engine
from fedsim.server.round import Run
from fedsim.server.screening import Corruption, Screening
from fedsim.server.tiers import (
    Tier,
    Tiers,
    check_ranks,
    distributed_types,
    draw_tiers,
    module_ranks,
    tiers_by_size,
    with_phases,
)
from fedsim.server.turnout import Device, Outage, Participation, Slowness
from fedsim.server.validation import Validation
from fedsim.server.waiting import most_waiting_bytes
from fedsim.training.settings import LocalSettings, OptimizerSettings

BYTES_PER_MBIT = 1e6 / 8

CLIENTS = "clients"
"""Folder of what belongs to single clients, in the run folder."""


def build_run(
    config: Config, group: Group, base: BaseModel, data: FederatedData, tiers: Tiers, strategy: Strategy
) -> Run:
    """Put the pieces together; checks what only the pieces together can tell.

    Args:
        config: the configuration.
        group: the processes.
        base: the base model on this process's device; its target modules are replaced in place.
        data: examples and partition.
        tiers: LoRA ranks of each client.
        strategy: the federated method.

    Raises:
        ConfigError: the configuration does not fit the data or the model.
    """
    targets = find_targets(base.model, config.lora.target_modules)
    changed = targets if strategy.traits.changes_base else {}
    updatable = UpdatableBase(base.model, changed)  # before the engine wraps its modules
    trainer, scorer, model = build_engine(config, group, base, data.train, strategy.traits.changes_base)
    cohort = build_cohort_policy(config.cohort, data.partition.num_clients)
    budget, local = build_local_training(config)
    global_test, client_test = build_tests(config, scorer, data)
    return Run(
        group=group,
        data=data,
        strategy=strategy,
        aggregator=Aggregator(
            group.device if config.aggregation.svd_device == "cuda" else torch.device("cpu"),
            config.aggregation.svd_placement == "sharded",
            config.aggregation.client_weights,
        ),
        tiers=tiers,
        store=ClientStore(local_path(config.run.output_dir) / config.run.name / CLIENTS),
        base=updatable,
        trainer=trainer,
        global_test=global_test,
        client_test=client_test,
        answers=_answers(config, model, base, data),
        stopping=build_stopping_rule(config),
        validation=_validation(config, scorer, model, base, data),
        cohort=cohort,
        budget=budget,
        local=local,
        num_packs=config.training.pack.num_packs,
        rounds=config.run.rounds,
        evaluate_every=config.evaluation.every_rounds,
        seed=config.run.seed,
        lr_phases=tuple((phase.from_round, phase.lr_scale) for phase in config.training.round_schedule),
        privacy=_accountant(config, cohort),
        participation=build_participation(config, tiers),
        screening=_screening(config),
        passes=model.passes if isinstance(model, StackedModel) else FreePasses(),
        corruption=_corruption(config),
        most_waiting_bytes=most_waiting_bytes(
            config.training.pack.keep_updates_on,
            torch.cuda.get_device_properties(group.device).total_memory
            if group.device.type == "cuda"
            else None,
        ),
    )


def build_local_training(config: Config) -> tuple[LocalBudget, LocalSettings]:
    """How much a client trains in a round, and how."""
    return _local_budget(config.training), _local_settings(config)


def build_tests(config: Config, scorer: Scorer, data: FederatedData) -> tuple[LossEvaluator, ClientTest]:
    """The global test and the clients' tests, both measured by `scorer`."""
    examples = sample_examples(
        len(data.test), config.evaluation.max_test_examples, config.run.seed, "max_test_examples"
    )
    return _evaluator(config, scorer, data, examples), _client_test(config, scorer, data)


def build_tiers(
    config: Config,
    targets: Mapping[str, tuple[int, int]],
    num_clients: int,
    sizes: NDArray[np.int64] | None = None,
) -> Tiers:
    """The LoRA ranks of each client.

    Args:
        config: the configuration.
        targets: dotted module path -> (in features, out features).
        num_clients: of the federation.
        sizes: (num_clients,) training examples of each client; used by lora.distribution=by_size only.

    Raises:
        ConfigError: a tier excepts a module that is not adapted, or the tiers do not fit the model.
    """
    tiers = _tiers_of_clients(config, targets, num_clients, sizes)
    return with_phases(tiers, [(phase.from_round, phase.scale) for phase in config.lora.rank_schedule])


def _tiers_of_clients(
    config: Config,
    targets: Mapping[str, tuple[int, int]],
    num_clients: int,
    sizes: NDArray[np.int64] | None,
) -> Tiers:
    lora = config.lora
    if lora.distribution == "by_size":
        assert sizes is not None, "lora.distribution=by_size needs the clients' sizes"
        return tiers_by_size(list(targets), sizes, lora.rank)
    if lora.distribution is not None:
        tiers = distributed_types(lora.distribution, targets, lora.rank_scale)
    elif lora.tiers:
        tiers = [
            Tier(
                f"lora.tiers[{index}]", module_ranks(list(targets), tier.rank, tier.module_ranks), tier.share
            )
            for index, tier in enumerate(lora.tiers)
        ]
        check_ranks(tiers, targets)
    else:
        ranks = dict.fromkeys(targets, lora.rank)
        return Tiers((ranks,), np.zeros(num_clients, dtype=np.int64))
    return draw_tiers(tiers, num_clients, config.run.seed)


def build_federated_strategy(
    config: Config, targets: Mapping[str, tuple[int, int]], tiers: Tiers, num_clients: int
) -> Strategy:
    """The strategy, with a server optimizer and differential privacy around it where they are asked for.

    Raises:
        ConfigError: the strategy does not exist, or does not go with the rest of the configuration.
    """
    chosen, aggregation = config.strategy, config.aggregation
    federation = Federation(
        num_clients=num_clients,
        cohort_size=config.cohort.clients_a_round(num_clients),
        weighting=aggregation.client_weights,
        scaling=ScalingRule(config.lora.lora_alpha, config.lora.use_rslora),
        targets=dict(targets),
        max_ranks=tiers.max_ranks,
        seed=config.run.seed,
    )
    arguments = {name: getattr(chosen, name).model_dump() for name in ("hetlora", "florist")}
    arguments["slora"] = _slora_arguments(chosen, tiers)
    optimizer = aggregation.server_optimizer
    strategy = build_strategy(
        chosen.name,
        federation,
        arguments.get(chosen.name, {}),
        options=_options(chosen.options),
        server_optimizer=None
        if optimizer.name == "none"
        else ServerOptimizerSettings.published(
            optimizer.name, optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.tau
        ),
        privacy=None
        if aggregation.privacy.clip_norm is None
        else PrivacySettings(aggregation.privacy.clip_norm, aggregation.privacy.noise_multiplier),
    )
    _check_traits(config, strategy, tiers)
    return strategy


def _slora_arguments(chosen: StrategyConfig, tiers: Tiers) -> dict[str, Any]:
    """Arguments of SLoRA: densities by client, and the arguments of its second stage."""
    slora = chosen.slora
    by_tier = slora.tier_densities
    if tiers.names and tiers.names[0].startswith("type "):  # types without a share have no tier
        by_tier = (
            tuple(by_tier[int(name.removeprefix("type ")) - 1] for name in tiers.names) if by_tier else ()
        )
    return {
        "rounds": slora.rounds,
        "density": slora.density,
        "client_densities": tuple(by_tier[tier] for tier in tiers.tier_of.tolist()) if by_tier else (),
        "then": slora.then,
        "then_arguments": chosen.hetlora.model_dump() if slora.then == "hetlora" else {},
    }


def _options(options: Sequence[str]) -> dict[str, Any]:
    pairs = (option.partition("=") for option in options)
    return {name: read_yaml(value, f"strategy.options: {name}") for name, _, value in pairs}


def _check_traits(config: Config, strategy: Strategy, tiers: Tiers) -> None:
    traits = strategy.traits
    if tiers.are_mixed and not traits.mixed_ranks:
        key = "lora.tiers" if config.lora.distribution is None else "lora.distribution"
        raise ConfigError(
            f"{key} must give all clients the same LoRA ranks with strategy.name={strategy.name}, got "
            f"{len(tiers.ranks)} tiers; use a strategy for mixed ranks, such as flexlora"
        )
    if tiers.phases and traits.keeps_client_state and not traits.has_global_model:
        raise ConfigError(
            f"lora.rank_schedule must be empty with strategy.name={strategy.name}, whose clients keep their adapters, "
            f"got {len(tiers.phases)} phases"
        )
    if not traits.has_global_model and config.evaluation.client_test == "off":
        raise ConfigError(
            "evaluation.client_test must be common or own_split with strategy.name="
            f"{strategy.name}, which has no global model to test, got 'off'"
        )
    if not traits.has_global_model and config.early_stopping.metric != "off":
        raise ConfigError(
            f"early_stopping.metric must be off with strategy.name={strategy.name}, which has no global model to "
            f"measure, got '{config.early_stopping.metric}'"
        )
    if not traits.uses_client_weights and config.aggregation.client_weights not in ("examples", "uniform"):
        raise ConfigError(
            f"aggregation.client_weights must be examples with strategy.name={strategy.name}, which has no use for it, "
            f"got '{config.aggregation.client_weights}'"
        )
    if traits.changes_base and config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization must be none with strategy.name={strategy.name}, which changes the weights of the "
            f"base, got '{config.model.quantization}'"
        )
    if traits.changes_base and config.model.sharding != "none":
        raise ConfigError(
            f"model.sharding must be none with strategy.name={strategy.name}, which changes the weights of the base, "
            f"got '{config.model.sharding}'"
        )
    if config.run.merged_model and not traits.has_global_model:
        raise ConfigError(
            f"run.merged_model must be false with strategy.name={strategy.name}, which has no global model, got true"
        )


def _accountant(config: Config, cohort: CohortPolicy) -> PrivacyAccountant | None:
    privacy = config.aggregation.privacy
    if privacy.clip_norm is None:
        return None
    assert cohort.probability is not None, "checked with the configuration"
    return PrivacyAccountant(cohort.probability, privacy.noise_multiplier, privacy.delta)


def build_initial_adapter(
    config: Config, targets: dict[str, tuple[int, int]], tiers: Tiers, dtype: torch.dtype = torch.float32
) -> AdapterState:
    """The adapter of round 0 for the configured LoRA, of the largest rank of any client, on the CPU.

    Args:
        config: the configuration.
        targets: dotted module path -> (in, out features).
        tiers: LoRA ranks of each client.
        dtype: of the factors.
    """
    scaling = ScalingRule(config.lora.lora_alpha, config.lora.use_rslora)
    return initial_adapter(targets, tiers.max_ranks, scaling, config.run.seed, dtype)


def build_participation(config: Config, tiers: Tiers) -> Participation | None:
    """How reliable clients are, and the simulated clock; None where all report back and there is no clock.

    Raises:
        ConfigError: there are neither one device nor as many as resource tiers.
    """
    clients = config.clients
    settings = clients.model_dump(exclude={"corruption"})
    if settings == ClientsConfig().model_dump(exclude={"corruption"}):
        return None
    if len(clients.devices) not in (0, 1, len(tiers.ranks)):
        raise ConfigError(
            f"clients.devices must hold one device for all clients, or one for each of {len(tiers.ranks)} resource "
            f"tiers, got {len(clients.devices)}"
        )
    return Participation(
        availability=clients.availability,
        outages=tuple(Outage(**outage.model_dump()) for outage in clients.outages),
        dropout=clients.dropout,
        over_selection=clients.over_selection,
        deadline_s=clients.deadline_s,
        devices=tuple(
            Device(
                device.tokens_per_s,
                device.uplink_mbps * BYTES_PER_MBIT,
                device.downlink_mbps * BYTES_PER_MBIT,
            )
            for device in clients.devices
        ),
        tier_of=tiers.tier_of,
        slowness=Slowness(**clients.slowness.model_dump()),
    )


def _screening(config: Config) -> Screening | None:
    training = config.training
    if training.max_update_norm is None and config.clients.corruption.probability == 0:
        return None  # the trainer itself sees to it that updates are finite
    return Screening(training.on_not_finite, training.max_update_norm, training.on_large_update)


def _corruption(config: Config) -> Corruption | None:
    corruption = config.clients.corruption
    if corruption.probability == 0:
        return None
    return Corruption(corruption.probability, corruption.kind, corruption.scale, config.run.seed)


def build_cohort_policy(config: CohortConfig, num_clients: int) -> CohortPolicy:
    """How cohorts are chosen among `num_clients`; a fraction is rounded down, to one client at least."""
    if config.client_ids is not None:
        return CohortPolicy(num_clients, len(config.client_ids), config.client_ids)
    expected = config.clients_a_round(num_clients)
    if config.sampling == "poisson":
        return CohortPolicy(num_clients, max(1, round(expected)), None, expected / num_clients)
    return CohortPolicy(num_clients, int(expected), as_published=config.sampling == "flexlora")


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
        proximal_mu=training.proximal_mu,
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


def _answers(
    config: Config, model: AdaptedModel | StackedModel, base: BaseModel, data: FederatedData
) -> AnswerEvaluation | None:
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
    return AnswerEvaluation(test, tasks, known if len(known) == len(categories) else (), _suffix(config))


def _suffix(config: Config) -> str:
    """What is put behind the names of figures of answers."""
    return "" if config.evaluation.answers.metric == "generated" else "_tf"


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


def _validation(
    config: Config, scorer: Scorer, model: AdaptedModel | StackedModel, base: BaseModel, data: FederatedData
) -> Validation | None:
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
