"""Sections `strategy` and `aggregation`: what the server does with what the clients send."""

from typing import Annotated, Literal

from pydantic import Field

from fedsim.config.node import Node, key, one_of_or_own

STRATEGY_NAMES = (
    "fedavg",
    "local",
    "centralized",
    "flexlora",
    "flexlora_delta",
    "flexlora_partitioned",
    "hlora",
    "hetlora",
    "hetlora_naive",
    "rbla",
    "flora",
    "fedex",
    "ffa",
    "rolora",
    "fedsa",
    "fedsvd",
    "florist",
    "slora",
    "scaffold",
)
STRATEGY_PATTERN = one_of_or_own(STRATEGY_NAMES)
OPTION_PATTERN = r"^[A-Za-z_]\w*="


class HetLoraConfig(Node):
    """Strategy hetlora (arXiv 2401.06432)."""

    pruning_factor: float = key(
        0.99, "gamma: share of its rank that a client keeps when it prunes itself; 1: no pruning", gt=0, le=1
    )
    tail_penalty: float = key(
        1e-3, "lambda: weight of the penalty on the rank rows that pruning would cut", ge=0
    )
    min_rank: int = key(1, "least LoRA rank after pruning", gt=0)


class FloristConfig(Node):
    """Strategy florist (arXiv 2506.09199)."""

    energy: float = key(
        0.99, "share of the squared singular values that the global adapter keeps", "fraction", gt=0, le=1
    )


class SloraConfig(Node):
    """Strategy slora (arXiv 2308.06522)."""

    rounds: int = key(
        5, "rounds of sparse full-weight training before LoRA (arXiv 2402.11505: 5)", "rounds", gt=0
    )
    density: float = key(
        0.0012,
        "share of the weights that train in these rounds (arXiv 2402.11505: 0.0012)",
        "fraction",
        gt=0,
        le=1,
    )
    tier_densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = key(
        (),
        "instead of density: the share for clients of each tier, in the order of lora.tiers, or of types 1 to 4 with "
        "lora.distribution (code of arXiv 2402.11505: [0.0012, 0.0246, 0.0822, 0.1222]); the weights of a smaller "
        "share are among those of every larger one; empty: density for all",
        "fraction",
    )
    then: Literal["fedavg", "flexlora", "hetlora", "hetlora_naive"] = key(
        "fedavg", "strategy of the rounds after them; strategy.hetlora holds for hetlora here too"
    )


class StrategyConfig(Node):
    """The federated method."""

    name: str = key(
        "fedavg",
        "one of "
        + ", ".join(STRATEGY_NAMES)
        + "; or a class of your own as package.module:Class (docs/strategies.md describes all)",
        pattern=STRATEGY_PATTERN,
    )
    options: tuple[Annotated[str, Field(pattern=OPTION_PATTERN)], ...] = key(
        (), "arguments for a class of your own, each as name=value"
    )
    hetlora: HetLoraConfig = Field(default_factory=HetLoraConfig)
    florist: FloristConfig = Field(default_factory=FloristConfig)
    slora: SloraConfig = Field(default_factory=SloraConfig)


class ServerOptimizerConfig(Node):
    """A server optimizer around a strategy that averages factors (arXiv 2003.00295; fedavgm: arXiv 1909.06335)."""

    name: Literal["none", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = key(
        "none", "none: the mean of the cohort is the next adapter"
    )
    lr: float | None = key(
        None,
        "server learning rate; null: 1 for fedavgm, else 0.01, which is our choice: the paper tunes it",
        gt=0,
    )
    beta1: float = key(0.9, "decay of the mean change; not used by fedadagrad", ge=0, lt=1)
    beta2: float = key(0.99, "fedadam, fedyogi: decay of the mean squared change", ge=0, lt=1)
    tau: float = key(1e-3, "added to the root of the mean squared change; not used by fedavgm", gt=0)


class PrivacyConfig(Node):
    """Client-level differential privacy (arXiv 1710.06963), for strategies that average factors."""

    clip_norm: float | None = key(
        None, "norm to which each client's whole update is clipped; null: no differential privacy", gt=0
    )
    noise_multiplier: float = key(
        1.0, "standard deviation of the noise on the sum of updates / clip_norm", ge=0
    )
    delta: float = key(1e-5, "delta of the (epsilon, delta) that is reported as privacy/epsilon", gt=0, lt=1)


class AggregationConfig(Node):
    """How the server combines updates."""

    client_weights: Literal["examples", "tokens", "uniform"] = key(
        "examples", "weight of a client: its training examples, its label tokens, or 1"
    )
    svd_device: Literal["cpu", "cuda"] = key(
        "cpu", "where the server's mathematics runs: on the CPU, or on the GPU of the process"
    )
    svd_placement: Literal["root", "sharded"] = key(
        "root",
        "root: rank 0 aggregates all modules, as the papers do; sharded: each process some of them, with equal bits",
    )
    server_optimizer: ServerOptimizerConfig = Field(default_factory=ServerOptimizerConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
