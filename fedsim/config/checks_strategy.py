"""Rules about strategy, server and privacy that tie several keys together."""

from collections.abc import Iterator

from fedsim.config.keys import show
from fedsim.config.rules import unused_keys
from fedsim.config.run_section import RunConfig
from fedsim.config.schema import Config
from fedsim.config.strategy_section import AggregationConfig, StrategyConfig

OPTIONS_OF = ("hetlora", "florist", "slora")
UNUSED_BY_SERVER_OPTIMIZER = {
    "none": ("lr", "beta1", "beta2", "tau"),
    "fedavgm": ("beta2", "tau"),
    "fedadam": (),
    "fedyogi": (),
    "fedadagrad": ("beta1", "beta2"),
}


def check_strategy(strategy: StrategyConfig) -> Iterator[str]:
    """Options of strategies that are not in use."""
    for section in OPTIONS_OF:
        if section in (strategy.name, strategy.slora.then if strategy.name == "slora" else None):
            continue
        node = getattr(strategy, section)
        because = f"when strategy.name is {strategy.name}"
        yield from unused_keys(f"strategy.{section}", node, tuple(type(node).model_fields), because)
    if ":" not in strategy.name:
        yield from unused_keys(
            "strategy",
            strategy,
            ("options",),
            "unless strategy.name is a class of your own (package.module:Class)",
        )


def check_slora(config: Config) -> Iterator[str]:
    """Its first stage ends before the run does; densities go by tier, of which the configuration must say the order."""
    densities, lora = config.strategy.slora.tier_densities, config.lora
    if config.strategy.name != "slora":
        return
    if config.strategy.slora.rounds > config.run.rounds:
        yield (
            f"strategy.slora.rounds must be at most run.rounds={config.run.rounds}, since no LoRA factors are made "
            f"before its first stage ends, got {config.strategy.slora.rounds}"
        )
    if not densities:
        return
    key = "strategy.slora.tier_densities"
    yield from unused_keys("strategy.slora", config.strategy.slora, ("density",), f"when {key} is set")
    if lora.distribution == "by_size" or (lora.distribution is None and not lora.tiers):
        yield f"{key} must be empty unless lora.tiers or lora.distribution names tiers, got {show(densities)}"
        return
    expected = len(lora.tiers) if lora.tiers else 4
    if len(densities) != expected:
        whose = "tier of lora.tiers" if lora.tiers else f"type of lora.distribution={lora.distribution}"
        yield f"{key} must have {expected} values, one for each {whose}, got {show(densities)}"


def check_scaffold(config: Config) -> Iterator[str]:
    """SCAFFOLD's control variates are sums of plain gradients."""
    if config.strategy.name != "scaffold":
        return
    because = (
        "with strategy.name=scaffold, whose control variates stand for plain gradients (arXiv 1910.06378)"
    )
    optimizer = config.training.optimizer
    if optimizer.name != "sgd":
        yield f"training.optimizer.name must be sgd {because}, got {show(optimizer.name)}"
    elif optimizer.momentum != 0:
        yield f"training.optimizer.momentum must be 0 {because}, got {show(optimizer.momentum)}"
    if config.training.max_grad_norm is not None:
        yield f"training.max_grad_norm must be null {because}, got {show(config.training.max_grad_norm)}"
    if config.training.proximal_mu != 0:
        yield f"training.proximal_mu must be 0 {because}, got {show(config.training.proximal_mu)}"
    if config.training.max_update_norm is not None and config.training.on_large_update != "fail":
        yield (
            f"training.on_large_update must be fail {because} and would no longer add up to the server's, got "
            f"{show(config.training.on_large_update)}"
        )
    if config.clients.corruption.probability > 0:
        yield (
            f"clients.corruption.probability must be 0 {because} and would no longer add up to the server's, got "
            f"{show(config.clients.corruption.probability)}"
        )
    if optimizer.lr == 0:
        yield f"training.optimizer.lr must be > 0 {because}, got 0"
    if config.aggregation.client_weights != "uniform":
        yield (
            "aggregation.client_weights must be uniform with strategy.name=scaffold, which minimises the unweighted "
            f"mean of the clients' losses, got {show(config.aggregation.client_weights)}"
        )


def check_aggregation(aggregation: AggregationConfig, run: RunConfig) -> Iterator[str]:
    """Options of server optimizers and of privacy that are not in use, and the place of decompositions."""
    optimizer, privacy = aggregation.server_optimizer, aggregation.privacy
    because = f"when aggregation.server_optimizer.name is {optimizer.name}, which does not use it"
    unused = UNUSED_BY_SERVER_OPTIMIZER[optimizer.name]
    yield from unused_keys("aggregation.server_optimizer", optimizer, unused, because)
    if privacy.clip_norm is None:
        because = "when aggregation.privacy.clip_norm is null"
        yield from unused_keys("aggregation.privacy", privacy, ("noise_multiplier", "delta"), because)
    if run.device == "cpu" and aggregation.svd_device == "cuda":
        yield "aggregation.svd_device must be cpu when run.device is cpu, got 'cuda'"


def check_privacy(config: Config) -> Iterator[str]:
    """What the accountant assumes."""
    if config.aggregation.privacy.clip_norm is None:
        return
    because = "with aggregation.privacy.clip_norm set"
    num_clients, delta = config.data.partition.num_clients, config.aggregation.privacy.delta
    if delta >= 1 / num_clients:
        yield (
            f"aggregation.privacy.delta must be below 1 / data.partition.num_clients={1 / num_clients:g}, or telling "
            f"all of one client would count as private, got {show(delta)}"
        )
    if config.cohort.sampling != "poisson":
        yield (
            f"cohort.sampling must be poisson {because}, since the privacy accountant counts on it, got "
            f"{show(config.cohort.sampling)}"
        )
    if config.aggregation.client_weights != "uniform":
        yield (
            f"aggregation.client_weights must be uniform {because}, since one client must not count more than another, "
            f"got {show(config.aggregation.client_weights)}"
        )
