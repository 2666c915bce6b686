"""The adapter a run starts from.

Shapes: r = LoRA rank, i = in features, o = out features of the adapted module.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.seeding import torch_generator


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """Factor on the product B A: lora_alpha / r (arXiv 2106.09685), or lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732).

    Attributes:
        lora_alpha: the same for every rank.
        use_rslora: divide by sqrt(r).
    """

    lora_alpha: float
    use_rslora: bool = False

    def __call__(self, lora_rank: int) -> float:
        """The factor for a LoRA rank, which must be positive."""
        return self.lora_alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)


def initial_down(module: str, lora_rank: int, in_features: int, seed: int, *key: int) -> Tensor:
    """(r, i) float64 on the CPU: uniform in +-1/sqrt(i), which is PEFT's Kaiming draw of A.

    From the stream (seed, module, key); of two ranks, the smaller one has the first rows of the larger one.
    """
    generator = torch_generator(seed, f"lora_init/{module}", *key)
    uniform = torch.rand(lora_rank, in_features, generator=generator, dtype=torch.float64)
    return (2 * uniform - 1) / math.sqrt(in_features)


def initial_adapter(
    shapes: Mapping[str, tuple[int, int]],
    lora_ranks: Mapping[str, int],
    scaling: ScalingRule,
    seed: int,
    dtype: torch.dtype = torch.float32,
    *key: int,
) -> AdapterState:
    """A fresh adapter, such as that of round 0: A from `initial_down`, and B zero.

    Each module has its own stream, so that the draw does not depend on which others are adapted.

    Args:
        shapes: dotted module path -> (in features, out features), in the base model's order.
        lora_ranks: module -> r, at most min(i, o).
        scaling: of each rank.
        seed: the run's seed.
        dtype: type of the factors, which live on the CPU.
        key: what tells this draw from others of the run; nothing for round 0.

    Raises:
        AdapterError: there is no module, or a rank exceeds a module's smaller side.
    """
    if not shapes:
        raise AdapterError("an adapter needs at least one module, got none")
    modules = {}
    for module, (in_features, out_features) in shapes.items():
        rank = lora_ranks[module]
        if rank > min(in_features, out_features):
            raise AdapterError(
                f"lora.rank must be at most {min(in_features, out_features)}, the smaller side of {module} "
                f"({out_features} x {in_features}), got {rank}"
            )
        down = initial_down(module, rank, in_features, seed, *key).to(dtype)
        modules[module] = LoraFactors(down, torch.zeros(out_features, rank, dtype=dtype), scaling(rank))
    return AdapterState(modules)
