"""Updates of the base's weights between rounds, for strategies that merge what was learned into the base."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.lora.factors import LoraFactors


def gain_in(factors: LoraFactors, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """(o, i) `scaling * B A`, computed on `device` in `dtype`."""
    return factors.map(lambda factor: factor.to(device, dtype)).delta_weight()


class UpdatableBase:
    """The adapted linear modules of a base, whose weights follow the server's `base_update`.

    Each time the weights are computed anew from those that were loaded, W = W_0 + scaling * B A, so that they depend on
    the accumulated update alone: not on how many rounds it came in, nor on whether the run was resumed. The sum runs in
    float32 at least and is rounded once to the base's dtype; in bfloat16 an update below 1/256 of a weight is lost to
    that weight in the forward pass, but not to the accumulated update.

    Args:
        model: the base, before its modules are wrapped.
        targets: paths of linear modules.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, object]) -> None:
        self._weights: dict[str, Tensor] = {}
        for path in targets:
            weight = model.get_submodule(path).weight
            if not isinstance(weight, Tensor) or weight.dtype not in (
                torch.float64,
                torch.float32,
                torch.bfloat16,
                torch.float16,
            ):
                raise ModelError(f"the weight of {path} must be a plain tensor to be updated")
            self._weights[path] = weight
        self._loaded: dict[str, Tensor] = {}
        self._applied: Mapping[str, LoraFactors] | None = None

    def apply(self, update: Mapping[str, LoraFactors] | None) -> None:
        """Set the weights to those that were loaded plus `update`; None for no update, the same object for no work."""
        if update is self._applied:
            return
        if not self._loaded:
            # kept on the CPU, and only from the first update on: most strategies never change the base
            self._loaded = {
                path: weight.detach().to("cpu", copy=True) for path, weight in self._weights.items()
            }
        with torch.no_grad():
            for path, weight in self._weights.items():
                loaded = self._loaded[path].to(weight.device)
                if update is None or path not in update:
                    weight.copy_(loaded)
                    continue
                wide = torch.promote_types(torch.float32, loaded.dtype)
                weight.copy_(loaded.to(wide) + gain_in(update[path], weight.device, wide))
        self._applied = update
