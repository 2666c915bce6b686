"""A base model with what was learned merged into its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedsim.lora.factors import LoraFactors
from fedsim.models.base import BaseModel
from fedsim.models.base_update import gain_in


def save_merged_model(base: BaseModel, adapter: Mapping[str, LoraFactors], folder: Path) -> None:
    """Write a model that `AutoModelForCausalLM.from_pretrained(folder)` loads, and its tokenizer.

    W + scaling * B A is computed in float32 at least and rounded once to the base's dtype.

    Args:
        base: as it was loaded, its modules not replaced by anything; its weights are changed.
        adapter: dotted module path -> factors.
        folder: an existing folder.
    """
    with torch.no_grad():
        for path, factors in adapter.items():
            weight = base.model.get_parameter(f"{path}.weight")
            wide = torch.promote_types(torch.float32, weight.dtype)
            weight.copy_(weight.to(wide) + gain_in(factors, weight.device, wide))
    untyped: Any = base.model
    untyped.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
