"""Refuses a base that takes more memory than a process may give it, before its weights are fetched or read."""

import math

import torch
from torch import nn

from fedsim.errors import ModelError
from fedsim.models.quantized import Quantization, weight_bytes


def check_memory(
    model: nn.Module,
    name: str,
    dtype: torch.dtype,
    quantization: Quantization,
    most_gib: float,
    size: int,
) -> None:
    """Check the weights, or a process's part of them, against a limit.

    Args:
        model: may be on the meta device.
        name: the value of `model.name_or_path`, for messages.
        dtype, quantization: as `base_bytes`.
        most_gib: `model.max_memory_gib`.
        size: processes that share the weights.

    Raises:
        ModelError: they take more.
    """
    whole_gib = base_bytes(model, dtype, quantization) / 2**30
    if whole_gib / size > most_gib:
        more = math.ceil(whole_gib / most_gib)
        advice = "set model.sharding=zero3 and start" if size == 1 else "start"
        in_bits = "" if quantization == "none" else f" with model.quantization={quantization}"
        raise ModelError(
            f"model.name_or_path={name}: its weights take {whole_gib / size:.2f} GiB a process in {dtype}{in_bits}, "
            f"more than model.max_memory_gib={most_gib:g}; {advice} at least {more} processes, or choose a smaller "
            "model.dtype"
        )


def base_bytes(model: nn.Module, dtype: torch.dtype, quantization: Quantization) -> int:
    """Bytes of a model's weights; those that modules share count once.

    Args:
        model: may be on the meta device.
        dtype: of all weights but those that are quantized: of the linear modules without the output head.
        quantization: `model.quantization`.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    few_bits = {
        id(module.weight): weight_bytes(quantization, module.out_features, module.in_features)
        for module in model.modules()
        if quantization != "none" and isinstance(module, nn.Linear) and module is not head
    }
    return sum(few_bits.get(id(p), p.numel() * dtype.itemsize) for p in model.parameters())
