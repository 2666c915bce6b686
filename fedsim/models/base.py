"""The frozen base model that all clients share."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.cache import content_hash
from fedsim.config.model_section import ModelConfig
from fedsim.config.node import EMBEDDED
from fedsim.errors import ModelError
from fedsim.models.architecture import KEY, read_model_config
from fedsim.models.description import build_empty_base
from fedsim.models.embedded import embedded_base_folder
from fedsim.models.hub import CODE_FILES, CONFIG_FILES, PICKLE_FILES, SAFETENSORS_FILES, locate
from fedsim.models.memory_limit import check_memory
from fedsim.models.quantized import Quantization, check_available, loading_options, replace_quantized
from fedsim.models.quiet import quiet_transformers
from fedsim.models.sharding import SharedBy, load_sharded, sharded_fingerprint
from fedsim.models.shared_weights import shared_folder
from fedsim.models.tokenizer import build_tokenizer, check_tokenizer_fits, one_line, padding_id

HASHED_BYTES = 2**20
"""Tensors up to this size are hashed whole."""

SAMPLED_VALUES = 2**16
SUMMED_VALUES = 2**22
"""Values of a large tensor that are added up at a time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """A base model ready for adapters.

    Attributes:
        model: a causal language model of `transformers`, in evaluation mode, no parameter requires a gradient.
        tokenizer: checked to fit the model.
        pad_id: fills short sequences; always masked.
        name: as configured.
        source: hub id or local folder from which transformers loads it; that of the cache for the embedded base.
        dtype: of the weights.
        fingerprint: hash of names, shapes and values; equal on two processes if they hold the same base.
        sharding: the processes that share the weights; None if this one has them all.
        settings: see `settings_fingerprint`; equal on two processes if they compute the same with the same weights.
    """

    model: nn.Module
    tokenizer: Any
    pad_id: int
    name: str
    source: str
    dtype: torch.dtype
    fingerprint: str
    sharding: SharedBy | None = None
    settings: str = ""


def build_base(
    config: ModelConfig, device: torch.device | str, sharding: SharedBy | None = None, *, alone: bool = False
) -> BaseModel:
    """Load the base model onto `device`, frozen. The embedded one is trained first if it is not in the cache.

    With `sharding` all ranks of the group load it together, each its part. `alone` is as in `load_frozen`.

    Raises:
        ModelError: the model or its tokenizer cannot be found, read or used, or they do not fit each other; its
            weights are only there in pickle format and `model.allow_pickle` is false; weights are missing or take more
            than `model.max_memory_gib`; `model.quantization` needs a package that is not installed.
        ConfigError: `model.revision` is set for a local folder.
        DataError, CacheError: the embedded base cannot be trained or kept.
    """
    device = torch.device(device)
    dtype = choose_dtype(config.dtype, device)
    if config.dtype == "auto" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        logger.info(
            "this GPU has no arithmetic in bfloat16, and is slow at it; model.dtype=float16 suits it better"
        )
    check_available(config.quantization)
    tokenizer = build_tokenizer(config)
    if config.max_memory_gib is not None:
        shapes, size = build_empty_base(config), sharding.size if sharding else 1
        check_memory(shapes, config.name_or_path, dtype, config.quantization, config.max_memory_gib, size)
    folder = locate_base(config)
    if sharding is not None:
        return _build_sharded(config, device, dtype, tokenizer, folder, sharding)
    model = load_frozen(
        folder,
        config.name_or_path,
        dtype,
        allow_pickle=config.allow_pickle,
        trust_remote_code=config.trust_remote_code,
        quantization=config.quantization,
        device=device,
        alone=alone,
    )
    rows = model.get_input_embeddings().num_embeddings
    check_tokenizer_fits(tokenizer, rows, config.tokenizer or config.name_or_path, config.name_or_path)
    source = str(folder) if config.name_or_path == EMBEDDED else config.name_or_path
    return BaseModel(
        model,
        tokenizer,
        padding_id(tokenizer),
        config.name_or_path,
        source,
        dtype,
        fingerprint(model),
        settings=settings_fingerprint(folder),
    )


def locate_base(config: ModelConfig) -> Path:
    """The folder with the files of the base on this machine, fetched or made if they are not there.

    Raises:
        ModelError, ConfigError, DataError, CacheError: as `build_base`.
    """
    return embedded_base_folder() if config.name_or_path == EMBEDDED else _locate_weights(config)


def _build_sharded(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: Any,
    folder: Path,
    sharding: SharedBy,
) -> BaseModel:
    name = config.name_or_path
    model_config = read_model_config(folder, name, config.trust_remote_code)
    untyped: Any = load_sharded(folder, model_config, name, dtype, device, sharding)
    rows = untyped.get_input_embeddings().num_embeddings
    check_tokenizer_fits(tokenizer, rows, config.tokenizer or name, name)
    mark = sharded_fingerprint(untyped, _content, hashlib.blake2b(digest_size=16))
    source = str(folder) if name == EMBEDDED else name
    settings = settings_fingerprint(folder)
    return BaseModel(untyped, tokenizer, padding_id(tokenizer), name, source, dtype, mark, sharding, settings)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the base weights; "auto" is bfloat16 on a GPU and float32 on a CPU, whatever the file holds."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_frozen(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
    quantization: Quantization = "none",
    device: torch.device | str = "cpu",
    alone: bool = False,
) -> Any:
    """The model in a local folder, on `device`, in evaluation mode, without gradients.

    On a CPU its weights are mapped from a file, the same one in all processes of a node; see `shared_weights`.

    Args:
        name: the value of `model.name_or_path`, for messages.
        allow_pickle, trust_remote_code, quantization: as in the configuration.
        alone: the other processes of the node do not load it, so nothing is put into the cache for them.

    Raises:
        ModelError: as `build_base`.
    """
    model_config = read_model_config(folder, name, trust_remote_code)
    use_safetensors = _choose_format(folder, name, allow_pickle)

    def load(source: Path) -> Any:
        from transformers import AutoModelForCausalLM

        try:
            with quiet_transformers():
                model, loading = AutoModelForCausalLM.from_pretrained(
                    source,
                    config=model_config,
                    dtype=dtype,
                    use_safetensors=use_safetensors,
                    trust_remote_code=trust_remote_code,
                    local_files_only=not trust_remote_code,
                    ignore_mismatched_sizes=True,  # refused below, with the names of the tensors
                    output_loading_info=True,
                    device_map={"": device},  # each tensor goes there by itself: the host holds no copy
                    **loading_options(quantization, dtype),
                )
        except Exception as error:  # damaged weights raise errors of safetensors, pickle, zipfile, torch ...
            raise ModelError(
                f"{KEY}={name}: its weights in {source} cannot be loaded "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
        _check_complete(loading, name, source)
        return model

    shares = torch.device(device).type == "cpu" and not alone
    if shares and use_safetensors and quantization == "none" and not trust_remote_code:
        model = load(shared_folder(folder, dtype, lambda: load(folder)))
    else:
        model = load(folder)
    if quantization != "none" and not replace_quantized(model):
        raise ModelError(
            f"{KEY}={name}: it has no linear module that model.quantization could keep in fewer bits"
        )
    return model.eval().requires_grad_(False)


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's parameters and buffers, the same on every device.

    Tensors of at most `HASHED_BYTES` are hashed whole. Of a larger one go into the hash the exact sum of its values
    read as integers, so that any one changed bit shows, and `SAMPLED_VALUES` values at even distances: a base of
    billions of parameters takes a pass over its memory, and next to nothing is copied from a GPU.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


UNIMPORTANT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that say who wrote it, or what is chosen elsewhere."""


def settings_fingerprint(folder: Path) -> str:
    """Hash of a model's config.json, but for `UNIMPORTANT`.

    It decides about the passes as the weights do: of rotary positions, norms and activations they hold nothing.
    """
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content_hash({key: value for key, value in tree.items() if key not in UNIMPORTANT})


def _content(tensor: Tensor) -> bytes:
    values = tensor.detach().contiguous().view(-1)
    if values.numel() * values.element_size() <= HASHED_BYTES:
        return values.cpu().view(torch.uint8).numpy().tobytes()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size(), torch.uint8)
    integers = values.view(words)
    # in parts, since torch makes a copy in int64 of what it adds up; modulo 2^64, as torch does
    parts = torch.split(integers, SUMMED_VALUES)
    total = sum(int(part.sum(dtype=torch.int64)) for part in parts) % 2**64
    sample = integers[:: -(-integers.numel() // SAMPLED_VALUES)].cpu().contiguous()
    return total.to_bytes(8, "little") + sample.view(torch.uint8).numpy().tobytes()


def _locate_weights(config: ModelConfig) -> Path:
    patterns: tuple[str, ...] = (
        CONFIG_FILES + SAFETENSORS_FILES + (PICKLE_FILES if config.allow_pickle else ())
    )
    patterns += CODE_FILES if config.trust_remote_code else ()
    return locate(KEY, config.name_or_path, config.revision, patterns)


def _choose_format(folder: Path, name: str, allow_pickle: bool) -> bool:
    """True for safetensors, which win where both are there."""
    if any(folder.glob("*.safetensors")):
        return True
    if not allow_pickle:
        raise ModelError(
            f"{KEY}={name}: {folder} has no weights in safetensors format (*.safetensors); set model.allow_pickle=true "
            "to accept PyTorch's pickle format if you trust their source, convert them with "
            "save_pretrained, or set model.revision to a hub revision that has them (such as refs/pr/...)"
        )
    if not any(folder.glob("*.bin")):
        raise ModelError(f"{KEY}={name}: {folder} has no weights (*.safetensors or *.bin)")
    return False


def _check_complete(loading: dict[str, Any], name: str, folder: Path) -> None:
    for what, keys in (
        ("missing", loading["missing_keys"]),
        ("of another shape", loading["mismatched_keys"]),
    ):
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            raise ModelError(
                f"{KEY}={name}: the weights in {folder} do not fit its config.json; {len(names)} tensors are {what}, "
                f"such as {names[0]}"
            )
    if loading["unexpected_keys"]:
        logger.info(
            "%s has weights that its architecture does not use, such as %s",
            name,
            min(loading["unexpected_keys"]),
        )
