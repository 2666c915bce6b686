"""LoRA factors of one module, and of a whole adapter.

Shapes: r = LoRA rank, i = in features, o = out features of the adapted linear module.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fedsim.errors import AdapterError


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The adapter of one linear module: its output gains `scaling * B (A x)`.

    Attributes:
        A: (r, i), the down projection.
        B: (o, r), the up projection, same dtype and device as A.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA. Not contained in A or B.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"LoRA factors must be A (r, in) and B (out, r) of one rank r, got A {tuple(self.A.shape)} "
                f"and B {tuple(self.B.shape)}"
            )

    @property
    def rank(self) -> int:
        """LoRA rank r."""
        return self.A.shape[0]

    @property
    def num_parameters(self) -> int:
        """Number of values in A and B together."""
        return self.A.numel() + self.B.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of A and B in their own dtype."""
        return self.A.numel() * self.A.element_size() + self.B.numel() * self.B.element_size()

    def delta_weight(self) -> Tensor:
        """(o, i), `scaling * B A`: what the adapter adds to the module's weight."""
        return self.scaling * (self.B @ self.A)

    def map(self, function: Callable[[Tensor], Tensor]) -> "LoraFactors":
        """Factors with `function` applied to A and to B; the scaling stays."""
        return LoraFactors(function(self.A), function(self.B), self.scaling)


class AdapterState(Mapping[str, LoraFactors]):
    """An immutable adapter: dotted module path -> `LoraFactors`, in one fixed order.

    The order of modules is the order in which the adapter was built (the base model's order) and is the order in
    which factors travel between processes. LoRA ranks and scalings may differ from module to module.
    """

    __slots__ = ("_modules",)

    def __init__(self, modules: Mapping[str, LoraFactors]) -> None:
        self._modules = MappingProxyType(dict(modules))

    def __getitem__(self, module: str) -> LoraFactors:
        return self._modules[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        ranks = sorted({factors.rank for factors in self.values()})
        return f"AdapterState({len(self)} modules, LoRA ranks {ranks}, {self.num_parameters} parameters)"

    @property
    def num_parameters(self) -> int:
        """Number of trainable values."""
        return sum(factors.num_parameters for factors in self.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all factors in their own dtype: what one client sends or receives."""
        return sum(factors.num_bytes for factors in self.values())

    def map(self, function: Callable[[Tensor], Tensor]) -> "AdapterState":
        """The adapter with `function` applied to each factor."""
        return AdapterState({module: factors.map(function) for module, factors in self.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "AdapterState":
        """The adapter on `device`, in `dtype` where one is given."""
        return self.map(lambda factor: factor.to(device=device, dtype=dtype))

    def equal(self, other: "AdapterState") -> bool:
        """True if both hold the same modules, scalings and bits."""
        return list(self) == list(other) and all(
            mine.scaling == other[module].scaling
            and torch.equal(mine.A, other[module].A)
            and torch.equal(mine.B, other[module].B)
            for module, mine in self.items()
        )
