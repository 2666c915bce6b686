"""Sections `model` and `lora`: the frozen base, and the adapters on it."""

from typing import Annotated, Literal

from pydantic import Field

from fedsim.config.node import EMBEDDED, OWN_PATTERN, Node, key

Distribution = Literal[
    "homogeneous",
    "uniform",
    "heavy_tail_light",
    "heavy_tail_light_readme",
    "normal",
    "normal_code",
    "heavy_tail_strong",
    "heavy_tail_strong_readme",
    "by_size",
]
"""Resource distributions in the order of arXiv 2402.11505, table 2."""


class ModelConfig(Node):
    """The frozen base model."""

    name_or_path: str = key(
        EMBEDDED,
        "embedded (a tiny OPT, trained once in seconds and cached), a Hugging Face model id, or a local "
        "folder of a causal language model",
        min_length=1,
    )
    revision: str | None = key(None, "branch, tag or commit on the hub", min_length=1)
    tokenizer: str | None = key(
        None, "id or folder of the tokenizer; null: the one beside the model", min_length=1
    )
    trust_remote_code: bool = key(False, "let a hub repository run its own Python code")
    allow_pickle: bool = key(False, "accept weights in PyTorch's pickle format as well; they can run code")
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = key(
        "auto",
        "type of the base weights and of the products with them; auto: bfloat16 on a GPU, float32 on a CPU; adapters, "
        "their gradients and their optimizers stay in float32 (float64 for float64)",
    )
    quantization: Literal["none", "int8", "nf4", "fp4"] = key(
        "none",
        "bits in which the weights of linear modules but the output head are kept: 8 (int8), 4 (nf4: NormalFloat, "
        "arXiv 2305.14314; fp4), by bitsandbytes (pip install 'fedsim[quantization]'); products take the dequantized "
        "weight in model.dtype",
    )
    sharding: Literal["none", "zero3"] = key(
        "none",
        "zero3: no process holds the whole base; the weights are split over the processes of a group and gathered "
        "module by module, by DeepSpeed's ZeRO-3 (pip install 'fedsim[deepspeed]'); slower, for bases that do not fit",
    )
    sharding_group_size: int | None = key(
        None,
        "processes that share one copy of the base under sharding; a divisor of their number; null: all of them",
        "processes",
        ge=2,
    )
    offload: Literal["none", "cpu"] = key(
        "none", "under sharding, cpu: keep the parts in main memory, and gather on the GPU"
    )
    max_memory_gib: float | None = key(
        None,
        "refuse a base whose weights, or this process's part of them, take more; null: no limit",
        "GiB",
        gt=0,
    )
    cpu_linear: Literal["auto", "torch", "onednn"] = key(
        "auto",
        "products with the frozen weights on a CPU: torch's own, or oneDNN's with weights packed once, which takes "
        "about twice the linear weights' memory more; auto: oneDNN on CPUs where it is known to pay",
    )
    dropout: Literal["off", "as_config"] = key(
        "off",
        "the base's own dropout in local training; as_config: as its config says, which is what the papers' "
        "code does, since Hugging Face's trainer puts the model into training mode",
    )


class TierConfig(Node):
    """A resource tier: clients with the same LoRA ranks."""

    share: float = key(
        1.0, "probability of a client being of this tier; shares are divided by their sum", gt=0
    )
    rank: int = key(..., "LoRA rank", gt=0)
    module_ranks: dict[str, Annotated[int, Field(gt=0)]] = key(
        {}, "other ranks for some modules, by their names or the ends of them"
    )


class RankPhaseConfig(Node):
    """LoRA ranks from a round on."""

    from_round: int = key(..., "first round of the phase, counted from 0", "rounds", ge=0)
    scale: float = key(
        ..., "factor on all LoRA ranks, which are rounded, halves up, to 1 at least", gt=0, le=1
    )


class LoraConfig(Node):
    """The adapter that clients train."""

    rank: int = key(2, "LoRA rank (arXiv 2502.18910: 2)", gt=0)
    lora_alpha: float = key(
        16.0,
        "LoRA alpha; the product B A is scaled by lora_alpha / rank (arXiv 2402.11505 and Plato: 16)",
        gt=0,
    )
    dropout: float = key(
        0.05, "dropout on the adapter's input (arXiv 2402.11505 and Plato: 0.05)", "probability", ge=0, lt=1
    )
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = key(
        ("q_proj", "v_proj"),
        "names, or ends of dotted names, of the linear modules that get an adapter",
        min_length=1,
    )
    use_rslora: bool = key(False, "scale by lora_alpha / sqrt(rank) instead (arXiv 2312.03732)")
    tiers: tuple[TierConfig, ...] = key(
        (),
        "resource tiers with LoRA ranks of their own, such as [{share: 0.8, rank: 8}, {share: 0.2, rank: 30, "
        "module_ranks: {fc1: 200, fc2: 200}}]; each client is of one tier for the whole run; empty: all have lora.rank",
    )
    distribution: Distribution | None = key(
        None,
        "instead of lora.tiers: the resource types 1 to 4 of arXiv 2402.11505 (LoRA rank 8; 30; 30, and 200 on the "
        "feed-forward; 200) with shares in percent of homogeneous 100/0/0/0, uniform 25/25/25/25, heavy_tail_light "
        "80/5/5/10 (.._readme 85/5/5/5), normal 5.75/44.25/44.25/5.75 (.._code 5.75/5.75/44.25/44.25), "
        "heavy_tail_strong 5/5/10/80 (.._readme 5/5/5/85); by_size: ranks below lora.rank that grow with a client's "
        "data, as in HLoRA (arXiv 2503.00813)",
    )
    rank_policy: str | None = key(
        None,
        "instead of lora.tiers: a function of your own, package.module:function, that gives each client its LoRA ranks "
        "by the modules, the clients' sizes, lora.rank and run.seed (docs/strategies.md)",
        pattern=OWN_PATTERN,
    )
    rank_scale: float = key(
        1.0,
        "factor on the LoRA ranks of arXiv 2402.11505's types, for a base of another size; ranks are rounded, to 1 at "
        "least, and lora.lora_alpha stays as it is",
        gt=0,
        le=100,
    )
    rank_schedule: tuple[RankPhaseConfig, ...] = key(
        (),
        "LoRA ranks that change with the round, such as [{from_round: 0, scale: 0.25}, {from_round: 20, scale: 1.0}]; "
        "before the first phase, and when empty, ranks are whole",
    )
