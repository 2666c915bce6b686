"""What a base model is made of, found on the meta device: no weights are read or allocated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.config.model_section import ModelConfig
from fedsim.config.node import EMBEDDED
from fedsim.models.architecture import check_sequence_length, empty_model, max_positions_of, read_model_config
from fedsim.models.embedded import embedded_base_config
from fedsim.models.hub import CODE_FILES, CONFIG_FILES, locate
from fedsim.models.targets import find_targets
from fedsim.models.tokenizer import check_tokenizer_fits


@dataclass(frozen=True)
class BaseDescription:
    """Sizes of a base model.

    Attributes:
        name: as configured.
        num_parameters: of the base, weights shared between modules counted once.
        targets: dotted path -> (in features, out features) of each module that gets an adapter, in the model's order.
        vocab_size: rows of the input embedding.
        max_positions: longest sequence in tokens; None where the model states no limit.
    """

    name: str
    num_parameters: int
    targets: dict[str, tuple[int, int]]
    vocab_size: int
    max_positions: int | None

    def num_lora_parameters(self, lora_rank: int) -> int:
        """Trainable values of an adapter with one LoRA rank on all targets: sum of rank * (in + out)."""
        return sum(lora_rank * (i + o) for i, o in self.targets.values())


def describe_base(
    config: ModelConfig,
    target_modules: Sequence[str],
    tokenizer: Any | None = None,
    max_tokens: int | None = None,
) -> BaseDescription:
    """Describe the configured base model, and check what can be checked before its weights are loaded.

    Args:
        target_modules: as `find_targets`.
        tokenizer: checked against the model where given.
        max_tokens: longest sequence of the run, checked against the model's positions where given.

    Raises:
        ModelError: the model cannot be found or is no causal language model, or the tokenizer does not fit it.
        ConfigError: a target cannot be adapted, or `max_tokens` is too large for the model.
    """
    name = config.name_or_path
    model = build_empty_base(config)
    description = BaseDescription(
        name=name,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        targets=find_targets(model, target_modules),
        vocab_size=model.get_input_embeddings().num_embeddings,
        max_positions=max_positions_of(model.config),
    )
    if tokenizer is not None:
        check_tokenizer_fits(tokenizer, description.vocab_size, config.tokenizer or name, name)
    if max_tokens is not None:
        check_sequence_length(description.max_positions, max_tokens, name)
    return description


def build_empty_base(config: ModelConfig) -> Any:
    """The base model on the meta device: all modules and shapes, no memory.

    Raises:
        ModelError: the model cannot be found or is no causal language model.
    """
    name = config.name_or_path
    if name == EMBEDDED:
        model_config = embedded_base_config()
    else:
        patterns = CONFIG_FILES + (CODE_FILES if config.trust_remote_code else ())
        folder = locate("model.name_or_path", name, config.revision, patterns)
        model_config = read_model_config(folder, name, config.trust_remote_code)
    return empty_model(model_config, name, config.trust_remote_code)
