"""The frozen base with one LoRA adapter on it, exchangeable in place.

Shapes: b = sequences of a batch, L = their padded length, r = LoRA rank, i / o = in / out features of a module.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import NEITHER, Sides
from fedsim.models.dropout import (
    feature_keys,
    keep_mask,
    keyed_base_dropout,
    seeded_global_generators,
    token_keys,
)
from fedsim.models.targets import check_same_modules, set_module
from fedsim.seeding import derive_seed

LORA_DROPOUT = "lora_dropout"
BASE_DROPOUT = "base_dropout"


class KeyedDropout:
    """Dropout on the adapters' inputs, and where wanted in the base, for one micro-batch of one client.

    Args:
        probability: of a value of an adapter's input being dropped, in [0, 1).
        in_base: whether the base trains with its own dropout.
        seed: the run's seed.
        key: what names the micro-batch: round, client, step, micro-batch.
        attention_mask: (b, L), true where a token is real.
    """

    def __init__(
        self, probability: float, in_base: bool, seed: int, key: tuple[int, ...], attention_mask: Tensor
    ) -> None:
        self.probability = probability
        self.in_base = in_base
        self.base_seed = derive_seed(seed, BASE_DROPOUT, *key)
        self.lora_tokens = _spread(
            token_keys(seed, LORA_DROPOUT, key, int(attention_mask.sum())), attention_mask
        )
        self.base_tokens = _spread(
            token_keys(seed, BASE_DROPOUT, key, int(attention_mask.sum())), attention_mask
        )

    def __call__(self, x: Tensor, features: Tensor) -> Tensor:
        """(b, L, i): x with dropped values 0 and the others divided by 1 - probability."""
        return x * keep_mask(self.lora_tokens, features, self.probability, x.dtype).view(x.shape)


def _spread(keys: NDArray[np.int32], attention_mask: Tensor) -> Tensor:
    """(b * L,) the keys of real tokens at their places, 0 at padding."""
    real = attention_mask.reshape(-1).bool()
    spread = torch.zeros(real.shape, dtype=torch.int32, device=real.device)
    spread[real] = torch.from_numpy(keys).to(real.device)
    return spread


class LoraLinear(nn.Module):
    """A frozen linear module plus the current adapter: y = W x + bias + scaling * B (A dropout(x))."""

    def __init__(self, base: nn.Linear, index: int) -> None:
        super().__init__()
        self.base = base
        self.factors: LoraFactors | None = None
        self.dropout: KeyedDropout | None = None
        self.features = feature_keys(index, base.in_features).to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in the base's dtype; the adapter computes in its own."""
        y: Tensor = self.base(x)
        if self.factors is None:
            return y
        h = x.to(self.factors.A.dtype)
        if self.dropout is not None:
            h = self.dropout(h, self.features)
        product = (h @ self.factors.A.T) @ self.factors.B.T
        return y + (product * self.factors.scaling).to(y.dtype)


class AdaptedModel:
    """A frozen causal language model whose target modules carry an exchangeable adapter.

    Args:
        model: the base; its target modules are replaced in place, its parameters are frozen.
        targets: dotted module path -> (in, out features), in model order.
        device: where the base lives.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, tuple[int, int]], device: torch.device
    ) -> None:
        model.requires_grad_(False)
        model.eval()
        self.model = model
        self.device = device
        self.targets = dict(targets)
        self._linears: dict[str, LoraLinear] = {}
        for index, path in enumerate(targets):
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear), "find_targets gives linear modules only"
            linear = LoraLinear(base, index)
            set_module(model, path, linear)
            self._linears[path] = linear

    def load(self, adapter: AdapterState | None, trainable: Sides = NEITHER) -> dict[str, LoraFactors]:
        """Put an adapter on the base; None takes it off.

        Args:
            adapter: factors of all target modules; copied, so that training never writes into them.
            trainable: factors whose copies have a gradient.

        Returns:
            The copies, leaf tensors, by module in model order; what is written into them is on the base.

        Raises:
            AdapterError: the adapter's modules or shapes are not those of the base.
        """
        if adapter is not None:
            check_same_modules(adapter, self.targets)
        live: dict[str, LoraFactors] = {}
        for path, linear in self._linears.items():
            if adapter is None:
                linear.factors = None
                continue
            wanted = (adapter[path].A.shape[1], adapter[path].B.shape[0])
            if wanted != self.targets[path]:
                raise AdapterError(
                    f"factors of {path} must have (in, out) {self.targets[path]}, got {wanted}"
                )
            linear.factors = adapter[path].map(lambda factor: factor.detach().to(self.device, copy=True))
            linear.factors.A.requires_grad_("A" in trainable)
            linear.factors.B.requires_grad_("B" in trainable)
            live[path] = linear.factors
        return live

    def read(self) -> AdapterState:
        """The adapter as it stands, copied and without gradients."""
        modules = {}
        for path, linear in self._linears.items():
            if linear.factors is None:
                raise AdapterError("no adapter is loaded")
            modules[path] = linear.factors.map(lambda factor: factor.detach().clone())
        return AdapterState(modules)

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(b, L, vocabulary) logits of right-padded sequences.

        Args:
            input_ids: (b, L) int64.
            attention_mask: (b, L), 1 for real tokens.
        """
        output: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def keyed_dropout(self, dropout: KeyedDropout) -> Iterator[None]:
        """Train with `dropout` within the block."""
        with ExitStack() as undo:
            if dropout.probability > 0:
                for linear in self._linears.values():
                    linear.dropout = dropout
                undo.callback(self._without_dropout)
            if dropout.in_base:
                self.model.train()
                undo.callback(self.model.eval)
                undo.enter_context(keyed_base_dropout(dropout.base_tokens))
                # what is left draws from the global generators: dropout inside attention, dropped layers
                undo.enter_context(seeded_global_generators(dropout.base_seed, self.device))
            yield

    def _without_dropout(self) -> None:
        for linear in self._linears.values():
            linear.dropout = None
