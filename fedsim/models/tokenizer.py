"""Tokenizers: loading one, and checking that it fits the model."""

import json
from pathlib import Path
from typing import Any

from fedsim.config.model_section import ModelConfig
from fedsim.config.node import EMBEDDED
from fedsim.errors import ModelError
from fedsim.models.embedded import embedded_tokenizer_folder
from fedsim.models.hub import CODE_FILES, TOKENIZER_FILES, locate

LEAST_SHARE = 0.5
"""A tokenizer with fewer entries than this share of the model's embedding rows is taken for a wrong one. Models pad
their vocabulary by some per cent at most (OPT: 50,265 of 50,272)."""


def build_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a base model, a fast one where there is one. Loads no weights and trains no base.

    Raises:
        ModelError: it cannot be found or read, or needs code of its own that is not trusted.
        ConfigError: `model.revision` is set for a local folder.
        DataError, CacheError: the embedded one cannot be trained or kept.
    """
    key, name = ("model.name_or_path", config.name_or_path)
    if config.tokenizer is not None:
        key, name = ("model.tokenizer", config.tokenizer)
    if name == EMBEDDED:
        return load_tokenizer(embedded_tokenizer_folder(), key, name, trust_remote_code=False)
    patterns = TOKENIZER_FILES + (CODE_FILES if config.trust_remote_code else ())
    revision = config.revision if config.tokenizer is None else None
    return load_tokenizer(locate(key, name, revision, patterns), key, name, config.trust_remote_code)


def load_tokenizer(folder: Path, key: str, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer in a local folder.

    Args:
        key, name: the configuration key and its value, for messages.
        trust_remote_code: let the repository's own tokenizer class run.

    Raises:
        ModelError: the folder holds no tokenizer, or one that this version of `transformers` cannot read.
    """
    from transformers import AutoTokenizer

    _check_files(folder, key, name, trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise ModelError(
            f"{key}={name}: the tokenizer in {folder} cannot be loaded "
            f"({type(error).__name__}: {one_line(error)}); set model.tokenizer to one that fits the model"
        ) from error


def check_tokenizer_fits(tokenizer: Any, num_rows: int, tokenizer_name: str, model_name: str) -> None:
    """Refuse a tokenizer that was not made for the model.

    Args:
        tokenizer: a `transformers` tokenizer.
        num_rows: rows of the model's input embedding.

    Raises:
        ModelError: it has ids beyond the embedding, or so few entries that it must be another model's, or broken.
    """
    num_entries = len(tokenizer)
    highest = max([num_entries - 1, *tokenizer.get_vocab().values(), *tokenizer.all_special_ids])
    facts = (
        f"model.tokenizer must fit the model: {tokenizer_name} has {num_entries} entries (highest id {highest}), "
        f"{model_name} has {num_rows} embedding rows"
    )
    remedy = "set model.tokenizer to the id or folder of the tokenizer that the model was trained with"
    if highest >= num_rows:
        raise ModelError(f"{facts}, too few; {remedy}")
    if num_entries < LEAST_SHARE * num_rows:
        raise ModelError(f"{facts}, more than twice as many; {remedy}")


def padding_id(tokenizer: Any) -> int:
    """The id that fills short sequences: the pad token, else the end of sequence, else 0. It is always masked."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's message on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _check_files(folder: Path, key: str, name: str, trust_remote_code: bool) -> None:
    known = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "tokenizer.model",
        "spiece.model",
    )
    if not any((folder / file).is_file() for file in known):
        raise ModelError(
            f"{key}={name}: there is no tokenizer in {folder} (none of {', '.join(known)}); set model.tokenizer to "
            "the id or folder of one"
        )
    _read_settings(folder / "config.json", key, name)  # `transformers` reads the model's as well
    auto_map = _read_settings(folder / "tokenizer_config.json", key, name).get("auto_map") or {}
    if trust_remote_code:
        return
    if "AutoTokenizer" in auto_map and not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{key}={name}: its tokenizer is Python code in the repository; set model.trust_remote_code=true if you "
            "trust it"
        )


def _read_settings(file: Path, key: str, name: str) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{key}={name}: {file} is not a readable JSON object ({one_line(error)})") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{key}={name}: {file} is not a readable JSON object")
    return settings
