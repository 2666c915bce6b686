"""From a configuration to the objects of a run."""

import torch

from fedsim.aggregation.strategy import Strategy
from fedsim.comm.group import Group
from fedsim.config.paths import local_path
from fedsim.config.schema import Config
from fedsim.config.training_section import TrainingConfig
from fedsim.data.build import FederatedData
from fedsim.errors import ConfigError
from fedsim.lora.factors import AdapterState
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.models.base import BaseModel
from fedsim.models.base_update import UpdatableBase
from fedsim.models.passes import FreePasses
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.server.aggregation import Aggregator
from fedsim.server.build_clients import (
    build_cohort_policy,
    build_corruption,
    build_participation,
    build_screening,
)
from fedsim.server.build_strategy import build_accountant
from fedsim.server.build_tests import build_answers, build_stopping_rule, build_tests, build_validation
from fedsim.server.client_store import ClientStore
from fedsim.server.cohort import LocalBudget
from fedsim.server.engine import build_engine
from fedsim.server.run import Run
from fedsim.server.tiers import (
    Tiers,
)
from fedsim.server.waiting import most_waiting_bytes
from fedsim.training.settings import LocalSettings, OptimizerSettings

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
        answers=build_answers(config, model, base, data),
        stopping=build_stopping_rule(config),
        validation=build_validation(config, scorer, model, base, data),
        cohort=cohort,
        budget=budget,
        local=local,
        num_packs=config.training.pack.num_packs,
        rounds=config.run.rounds,
        evaluate_every=config.evaluation.every_rounds,
        seed=config.run.seed,
        lr_phases=tuple((phase.from_round, phase.lr_scale) for phase in config.training.round_schedule),
        privacy=build_accountant(config, cohort),
        participation=build_participation(config, tiers),
        screening=build_screening(config),
        passes=model.passes if isinstance(model, StackedModel) else FreePasses(),
        corruption=build_corruption(config),
        most_waiting_bytes=most_waiting_bytes(
            config.training.pack.keep_updates_on,
            torch.cuda.get_device_properties(group.device).total_memory
            if group.device.type == "cuda"
            else None,
        ),
    )


def check_svd_device(wanted: str, device: torch.device) -> None:
    """Check that `aggregation.svd_device` goes with the device of this process.

    Raises:
        ConfigError: it does not.
    """
    if wanted == "cuda" and device.type != "cuda":
        raise ConfigError(
            f"aggregation.svd_device must be cpu where the run computes on a {device.type}, got 'cuda'"
        )


def build_local_training(config: Config) -> tuple[LocalBudget, LocalSettings]:
    """How much a client trains in a round, and how."""
    return _local_budget(config.training), _local_settings(config)


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
