"""What of a strategy decides which other keys it goes with, before any of its code is loaded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from fedsim.config.keys import show
from fedsim.config.model_section import LoraConfig
from fedsim.config.schema import Config

LARGEST_TYPE, SMALLEST_TYPE = 200, 8
"""LoRA ranks of the resource types 4 and 1 of arXiv 2402.11505."""


@dataclass(frozen=True, slots=True)
class KnownTraits:
    """Of the traits of a strategy (`fedsim.aggregation.strategy.Traits`, where they are explained) those used here."""

    reduce: Literal["sum", "stack"] = "stack"
    mixed_ranks: bool = False
    changes_base: bool = False
    keeps_client_state: bool = False
    has_global_model: bool = True
    trains_pool: bool = False
    uses_client_weights: bool = True


MEAN = KnownTraits(reduce="sum")
MIXED = KnownTraits(mixed_ranks=True)
KNOWN: dict[str, KnownTraits] = {
    "fedavg": MEAN,
    "ffa": MEAN,
    "rolora": MEAN,
    "fedsa": KnownTraits(reduce="sum", keeps_client_state=True, has_global_model=False),
    "local": KnownTraits(
        mixed_ranks=True, keeps_client_state=True, has_global_model=False, uses_client_weights=False
    ),
    "centralized": KnownTraits(mixed_ranks=True, trains_pool=True, uses_client_weights=False),
    "flexlora": MIXED,
    "flexlora_delta": MIXED,
    "flexlora_partitioned": MIXED,
    "hlora": MIXED,
    "hetlora": KnownTraits(mixed_ranks=True, keeps_client_state=True, uses_client_weights=False),
    "hetlora_naive": MIXED,
    "rbla": MIXED,
    "florist": MIXED,
    "flora": KnownTraits(mixed_ranks=True, changes_base=True),
    "fedex": KnownTraits(changes_base=True),
    "fedsvd": KnownTraits(),
    "scaffold": KnownTraits(keeps_client_state=True, uses_client_weights=False),
}
"""Strategy -> its traits; a test holds them against the strategies."""


def known_traits(name: str, then: str) -> KnownTraits:
    """Those of a strategy that fedsim brings along; slora has those of its second stage, `then`, but two."""
    if name == "slora":
        return replace(KNOWN[then], reduce="stack", uses_client_weights=True)
    return KNOWN[name]


def check_traits(config: Config) -> Iterator[str]:
    """What the strategy does not go with; those of the user's own are asked when they are built."""
    name = config.strategy.name
    if ":" in name:
        return
    traits = known_traits(name, config.strategy.slora.then)
    yield from _ranks(config.lora, name, traits)
    yield from _around(config, name, traits)
    # scaffold and the accountant have rules of their own
    if name != "scaffold" and config.aggregation.privacy.clip_norm is None:
        yield from client_weight_problems(config, name, traits)
    yield from trait_problems(config, name, traits)


def _ranks(lora: LoraConfig, name: str, traits: KnownTraits) -> Iterator[str]:
    """Clients or rounds of several LoRA ranks, as far as the configuration alone tells.

    What `module_ranks`, the sizes of clients or a function come to is known when the run has its modules and clients.
    """
    if traits.mixed_ranks:
        return
    use = "use a strategy for mixed ranks, such as flexlora"
    same = f"must give all clients the same LoRA ranks with strategy.name={name}, got"
    known = _known_ranks(lora)
    if len(known) > 1:
        got = f"{len(lora.tiers)} tiers" if lora.tiers else show(lora.distribution)
        yield f"lora.{'tiers' if lora.tiers else 'distribution'} {same} {got}; {use}"
    elif any(scaled_rank(rank, phase.scale) != rank for rank in known for phase in lora.rank_schedule):
        yield (
            f"lora.rank_schedule must not change the LoRA ranks with strategy.name={name}, which keeps them, got "
            f"{len(lora.rank_schedule)} phases; {use}"
        )


def _known_ranks(lora: LoraConfig) -> set[int]:
    """LoRA ranks of clients, as far as the configuration alone tells them."""
    if lora.tiers:
        return set() if any(tier.module_ranks for tier in lora.tiers) else {tier.rank for tier in lora.tiers}
    if lora.distribution in ("by_size", "homogeneous") or lora.rank_policy is not None:
        return set()
    if lora.distribution is None:
        return {lora.rank}
    return {scaled_rank(rank, lora.rank_scale) for rank in (SMALLEST_TYPE, LARGEST_TYPE)}


def scaled_rank(rank: int, scale: float) -> int:
    """A LoRA rank times a factor, rounded half up, and 1 at least."""
    return max(1, math.floor(rank * scale + 0.5))


def _around(config: Config, name: str, traits: KnownTraits) -> Iterator[str]:
    """What may stand around a strategy that averages factors."""
    aggregation = config.aggregation
    averages = traits.reduce == "sum"
    if aggregation.server_optimizer.name != "none" and not averages:
        yield (
            f"aggregation.server_optimizer.name must be none with strategy.name={name}, which does not average "
            f"factors, got {show(aggregation.server_optimizer.name)}; use a strategy that does, such as fedavg or ffa"
        )
    if aggregation.privacy.clip_norm is not None and not averages:
        yield (
            f"aggregation.privacy.clip_norm must be null with strategy.name={name}, got "
            f"{show(aggregation.privacy.clip_norm)}; use one that averages the factors of clients of one LoRA rank, "
            "such as fedavg or ffa"
        )


def client_weight_problems(config: Config, name: str, traits: KnownTraits) -> Iterator[str]:
    """Client weights that a strategy would not look at."""
    weights = config.aggregation.client_weights
    if not traits.uses_client_weights and weights not in ("examples", "uniform"):
        yield (
            f"aggregation.client_weights must be examples with strategy.name={name}, which has no use for it, got "
            f"{show(weights)}"
        )


def trait_problems(config: Config, name: str, traits: KnownTraits) -> Iterator[str]:
    """What a strategy with these traits does not go with, whatever LoRA ranks the clients come to have."""
    evaluation, phases = config.evaluation, config.lora.rank_schedule
    if phases and traits.keeps_client_state and not traits.has_global_model:
        yield (
            f"lora.rank_schedule must be empty with strategy.name={name}, whose clients keep their adapters, got "
            f"{len(phases)} phases"
        )
    if phases and traits.trains_pool:
        yield (
            f"lora.rank_schedule must be empty with strategy.name={name}, which trains one adapter of the largest "
            f"ranks, got {len(phases)} phases"
        )
    if not traits.has_global_model:
        none = f"strategy.name={name}, which has no global model"
        if evaluation.answers.metric != "off":
            yield f"evaluation.answers.metric must be off with {none} to answer, got {show(evaluation.answers.metric)}"
        if evaluation.client_test == "off":
            yield f"evaluation.client_test must be common or own_split with {none} to test, got 'off'"
        if config.early_stopping.metric != "off":
            yield f"early_stopping.metric must be off with {none} to measure, got {show(config.early_stopping.metric)}"
        if config.run.merged_model:
            yield f"run.merged_model must be false with {none}, got true"
    if traits.changes_base:
        changes = f"strategy.name={name}, which changes the weights of the base"
        if config.model.quantization != "none":
            yield f"model.quantization must be none with {changes}, got {show(config.model.quantization)}"
        if config.model.sharding != "none":
            yield f"model.sharding must be none with {changes}, got {show(config.model.sharding)}"
