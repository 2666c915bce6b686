"""The adapter a run starts from.

Shapes: r = LoRA rank, i = in features, o = out features of the adapted module.
"""

import math
from collections.abc import Mapping

import torch

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.seeding import torch_generator


def lora_scaling(lora_alpha: float, lora_rank: int, use_rslora: bool) -> float:
    """Factor on the product B A: lora_alpha / r (arXiv 2106.09685), or lora_alpha / sqrt(r) (arXiv 2312.03732)."""
    return lora_alpha / math.sqrt(lora_rank) if use_rslora else lora_alpha / lora_rank


def initial_adapter(
    shapes: Mapping[str, tuple[int, int]],
    lora_rank: int,
    lora_alpha: float,
    use_rslora: bool,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> AdapterState:
    """The adapter of round 0: A uniform in +-1/sqrt(i), which is PEFT's Kaiming draw, and B zero.

    Each module has its own stream (seed, module), so that the draw does not depend on which others are adapted.

    Args:
        shapes: dotted module path -> (in features, out features), in the base model's order.
        lora_rank: r, at most min(i, o) of each module.
        lora_alpha: numerator of the scaling.
        use_rslora: scale by lora_alpha / sqrt(r).
        seed: the run's seed.
        dtype: type of the factors, which live on the CPU.

    Raises:
        AdapterError: there is no module, or the rank exceeds a module's smaller side.
    """
    if not shapes:
        raise AdapterError("an adapter needs at least one module, got none")
    scaling = lora_scaling(lora_alpha, lora_rank, use_rslora)
    modules = {}
    for module, (in_features, out_features) in shapes.items():
        if lora_rank > min(in_features, out_features):
            raise AdapterError(
                f"lora.rank must be at most {min(in_features, out_features)}, the smaller side of {module} "
                f"({out_features} x {in_features}), got {lora_rank}"
            )
        uniform = torch.rand(
            lora_rank,
            in_features,
            generator=torch_generator(seed, f"lora_init/{module}"),
            dtype=torch.float64,
        )
        down = (2 * uniform - 1) / math.sqrt(in_features)
        modules[module] = LoraFactors(
            down.to(dtype), torch.zeros(out_features, lora_rank, dtype=dtype), scaling
        )
    return AdapterState(modules)
