"""Rules about the base, its adapters and their training that tie several keys together."""

from collections.abc import Iterator

from fedsim.config.keys import show
from fedsim.config.model_section import LoraConfig, ModelConfig
from fedsim.config.node import EMBEDDED
from fedsim.config.rules import exactly_one, unused_keys
from fedsim.config.run_section import RunConfig
from fedsim.config.schema import Config
from fedsim.config.training_section import OptimizerConfig, TrainingConfig

UNUSED_BY_EMBEDDED_MODEL = ("revision", "tokenizer", "trust_remote_code", "allow_pickle")
UNUSED_BY_OPTIMIZER = {"adamw": ("momentum",), "sgd": ("beta1", "beta2", "eps")}


def check_model(model: ModelConfig, run: RunConfig) -> Iterator[str]:
    """The embedded base, and quantized ones."""
    if model.name_or_path == EMBEDDED:
        yield from unused_keys(
            "model", model, UNUSED_BY_EMBEDDED_MODEL, "when model.name_or_path is embedded"
        )
    if model.quantization == "none":
        return
    because = f"when model.quantization is {model.quantization}"
    yield from _plain_weights(model, because)
    if run.merged_model:
        yield f"run.merged_model must be false {because}, since an adapter cannot be merged into such weights, got true"


def _plain_weights(model: ModelConfig, because: str) -> Iterator[str]:
    """What needs each process to hold the weights as they are."""
    if model.dtype == "float64":
        yield f"model.dtype must be float32, bfloat16, float16 or auto {because}, got 'float64'"
    if model.cpu_linear == "onednn":
        yield f"model.cpu_linear must be auto or torch {because}, got 'onednn'"


def check_sharding(config: Config) -> Iterator[str]:
    """What a base in parts cannot do."""
    model = config.model
    if model.sharding == "none":
        yield from unused_keys(
            "model", model, ("sharding_group_size", "offload"), "when model.sharding is none"
        )
        return
    because = f"when model.sharding is {model.sharding}"
    if model.quantization != "none":
        yield f"model.quantization must be none {because}, got {show(model.quantization)}"
    yield from _plain_weights(model, because)
    if model.allow_pickle:
        yield f"model.allow_pickle must be false {because}, which reads parts of safetensors files, got true"
    if config.training.trainer == "sequential":
        yield f"training.trainer must be auto or packed {because}, got 'sequential'"
    if config.run.merged_model:
        yield f"run.merged_model must be false {because}, since no process holds the whole base, got true"
    if config.early_stopping.metric.startswith("validation"):
        yield f"early_stopping.metric must not be of a validation {because}, got {show(config.early_stopping.metric)}"
    if config.evaluation.answers.metric != "off":
        yield (
            f"evaluation.answers.metric must be off {because}, since texts of different lengths keep the processes "
            f"out of step, got {show(config.evaluation.answers.metric)}"
        )


def check_checkpointing(training: TrainingConfig, model: ModelConfig) -> Iterator[str]:
    """What gradient checkpointing cannot go with."""
    if not training.gradient_checkpointing:
        return
    if training.trainer == "sequential":
        yield "training.gradient_checkpointing must be false with training.trainer=sequential, got true"
    if model.dropout == "as_config":
        yield (
            "training.gradient_checkpointing must be false with model.dropout=as_config, whose masks a second forward "
            "pass would not repeat, got true"
        )


def check_lora(lora: LoraConfig) -> Iterator[str]:
    """Ranks come from one place, phases ascend, modules are named once."""
    if lora.tiers:
        others = ("rank", "distribution", "rank_policy", "rank_scale")
        yield from unused_keys("lora", lora, others, "when lora.tiers is set")
    elif lora.rank_policy is not None:
        yield from unused_keys("lora", lora, ("distribution", "rank_scale"), "when lora.rank_policy is set")
    elif lora.distribution is None:
        yield from unused_keys("lora", lora, ("rank_scale",), "when lora.distribution is null")
    elif lora.distribution == "by_size":
        because = "when lora.distribution is by_size, which takes lora.rank"
        yield from unused_keys("lora", lora, ("rank_scale",), because)
    else:
        because = f"when lora.distribution is {lora.distribution}, whose types have ranks of their own"
        yield from unused_keys("lora", lora, ("rank",), because)
    begins = [phase.from_round for phase in lora.rank_schedule]
    if begins != sorted(set(begins)):
        yield f"lora.rank_schedule must have ascending values of from_round, got {show(begins)}"
    twice = sorted({name for name in lora.target_modules if lora.target_modules.count(name) > 1})
    if twice:
        yield f"lora.target_modules must name each module once, got {show(twice)} more than once"


def check_training(training: TrainingConfig) -> Iterator[str]:
    """One length of local training, a warm-up within it, and what its optimizer uses."""
    yield from exactly_one(
        "training", {"local_epochs": training.local_epochs, "local_steps": training.local_steps}
    )
    warmup = training.schedule.warmup_steps
    if training.local_steps is not None and warmup > training.local_steps:
        limit = f"training.local_steps={training.local_steps}"
        yield f"training.schedule.warmup_steps must be at most {limit}, got {warmup}"
    if training.max_update_norm is None:
        yield from unused_keys(
            "training", training, ("on_large_update",), "when training.max_update_norm is null"
        )
    yield from _optimizer(training.optimizer)
    begins = [phase.from_round for phase in training.round_schedule]
    if begins != sorted(set(begins)):
        yield f"training.round_schedule must have ascending values of from_round, got {show(begins)}"


def _optimizer(optimizer: OptimizerConfig) -> Iterator[str]:
    because = f"when training.optimizer.name is {optimizer.name}, which does not use it"
    yield from unused_keys("training.optimizer", optimizer, UNUSED_BY_OPTIMIZER[optimizer.name], because)
