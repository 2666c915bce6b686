"""From a configuration to the federated method, and whether the rest of the configuration goes with it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedsim.aggregation.build import build_strategy
from fedsim.aggregation.privacy import PrivacyAccountant
from fedsim.aggregation.private import PrivacySettings
from fedsim.aggregation.server_optimizers import ServerOptimizerSettings
from fedsim.aggregation.strategy import Federation, Strategy
from fedsim.config.messages import refuse
from fedsim.config.schema import Config
from fedsim.config.strategy_section import StrategyConfig
from fedsim.config.strategy_traits import KnownTraits, client_weight_problems, trait_problems
from fedsim.config.yaml_text import read_yaml
from fedsim.errors import ConfigError
from fedsim.lora.initial import ScalingRule
from fedsim.server.cohort import CohortPolicy
from fedsim.server.tiers import Tiers


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
        tier_ranks=tiers.ranks_with_clients() if tiers.are_mixed else {},
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


def build_accountant(config: Config, cohort: CohortPolicy) -> PrivacyAccountant | None:
    """What counts the privacy that rounds spend; None without differential privacy."""
    privacy = config.aggregation.privacy
    if privacy.clip_norm is None:
        return None
    assert cohort.probability is not None, "checked with the configuration"
    return PrivacyAccountant(cohort.probability, privacy.noise_multiplier, privacy.delta)


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
        set_keys = [
            name for name in ("distribution", "rank_policy") if getattr(config.lora, name) is not None
        ]
        key = f"lora.{set_keys[0]}" if set_keys else "lora.tiers"
        if tiers.phases and len(tiers.ranks) == 1:
            raise ConfigError(
                f"lora.rank_schedule must not change the LoRA ranks with strategy.name={strategy.name}, which keeps "
                f"them, got {len(tiers.phases)} phases; use a strategy for mixed ranks, such as flexlora"
            )
        raise ConfigError(
            f"{key} must give all clients the same LoRA ranks with strategy.name={strategy.name}, got "
            f"{len(tiers.ranks)} tiers; use a strategy for mixed ranks, such as flexlora"
        )
    known = KnownTraits(**{field.name: getattr(traits, field.name) for field in fields(KnownTraits)})
    refuse(
        [
            *client_weight_problems(config, strategy.name, known),
            *trait_problems(config, strategy.name, known),
        ]
    )
