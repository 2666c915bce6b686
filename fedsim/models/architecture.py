"""The `transformers` configuration of a base model: read and checked, without weights."""

import json
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, ModelError
from fedsim.models.tokenizer import one_line

KEY = "model.name_or_path"


def read_model_config(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The configuration of the causal language model in a local folder.

    Args:
        name: the value of `model.name_or_path`, for messages.

    Raises:
        ModelError: the folder holds no model, no causal language model, one that this version of `transformers` does
            not know, or one that needs code of its own that is not trusted.
    """
    from transformers import AutoConfig

    _check_config_file(folder, name, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
    except Exception as error:  # each model's own checks raise what they like
        raise ModelError(f"{KEY}={name}: its config.json cannot be used ({one_line(error)})") from error
    _check_causal(config, name)
    return config


def empty_model(config: Any, name: str, trust_remote_code: bool) -> Any:
    """The model of a configuration on the meta device: all modules and shapes, no memory.

    Raises:
        ModelError: the configuration contradicts itself.
    """
    import torch._dynamo  # models import it, and torch 2.8 cannot within the context below
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise ModelError(f"{KEY}={name}: its config.json describes no model ({one_line(error)})") from error


def check_sequence_length(max_positions: int | None, max_tokens: int, name: str) -> None:
    """Refuse sequences longer than the model has positions for.

    Raises:
        ConfigError: `data.max_tokens` is larger than `max_positions` (None: the model has no limit).
    """
    if max_positions is not None and max_tokens > max_positions:
        raise ConfigError(
            f"data.max_tokens must be at most {max_positions}, the positions of the model {name}, got {max_tokens}"
        )


def max_positions_of(config: Any) -> int | None:
    """Longest sequence of a model, in tokens; None where its configuration states no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _check_config_file(folder: Path, name: str, trust_remote_code: bool) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{KEY}={name}: {folder} is no model folder, it has no config.json; give the folder that "
            "`save_pretrained` wrote"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        own_code = "AutoModelForCausalLM" in settings.get("auto_map", {}) or "AutoConfig" in settings.get(
            "auto_map", {}
        )
        model_type = settings.get("model_type")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{KEY}={name}: {file} is not a readable JSON object ({one_line(error)})") from error
    if trust_remote_code:
        return
    from transformers import CONFIG_MAPPING, __version__

    if model_type not in CONFIG_MAPPING:
        if own_code:
            raise ModelError(
                f"{KEY}={name}: this model is Python code in its repository; set model.trust_remote_code=true if you "
                "trust it"
            )
        raise ModelError(
            f"{KEY}={name}: transformers {__version__} does not know model_type {model_type!r} of its config.json; "
            "a newer transformers may"
        )


def _check_causal(config: Any, name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    rule = f"{KEY} must be a causal language model (decoder only), and {name} is"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{rule} an encoder-decoder ({config.model_type}); choose one such as OPT, Llama or Qwen"
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not remote and (masked or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ModelError(f"{rule} of type {config.model_type!r}; choose one such as OPT, Llama or Qwen")
