"""The frozen base with one LoRA adapter on it, exchangeable in place.

Shapes: b = sequences of a batch, L = their padded length, r = LoRA rank, i / o = in / out features of a module.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.seeding import derive_seed, torch_generator


class KeyedDropout:
    """Dropout on the adapters' inputs whose masks belong to one micro-batch of one client.

    The mask of the t-th real token of a micro-batch depends on (key, module, t) alone: not on padding, nor on who else
    trains on this process or how often the forward pass is repeated.

    Args:
        probability: of a value being dropped, in [0, 1).
        seed: the run's seed.
        key: what names the micro-batch: round, client, step, micro-batch.
        attention_mask: (b, L), true where a token is real.
    """

    def __init__(self, probability: float, seed: int, key: tuple[int, ...], attention_mask: Tensor) -> None:
        self.probability = probability
        self.seed = seed
        self.key = key
        self.real_tokens = attention_mask.reshape(-1).nonzero().squeeze(1)
        self.num_tokens = attention_mask.numel()

    def __call__(self, x: Tensor, module_index: int) -> Tensor:
        """(b, L, i): x with dropped values 0 and the others divided by 1 - probability; padding becomes 0."""
        generator = torch_generator(self.seed, "lora_dropout", *self.key, module_index, device=x.device)
        uniform = torch.rand(len(self.real_tokens), x.shape[-1], generator=generator, device=x.device)
        kept = (uniform >= self.probability).to(x.dtype).div_(1.0 - self.probability)
        if len(self.real_tokens) < self.num_tokens:
            kept = kept.new_zeros(self.num_tokens, x.shape[-1]).index_copy_(0, self.real_tokens, kept)
        return x * kept.view(x.shape)


class LoraLinear(nn.Module):
    """A frozen linear module plus the current adapter: y = W x + bias + scaling * B (A dropout(x))."""

    def __init__(self, base: nn.Linear, index: int) -> None:
        super().__init__()
        self.base = base
        self.index = index
        self.factors: LoraFactors | None = None
        self.dropout: KeyedDropout | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in the base's dtype; the adapter computes in its own."""
        y: Tensor = self.base(x)
        if self.factors is None:
            return y
        h = x.to(self.factors.A.dtype)
        if self.dropout is not None:
            h = self.dropout(h, self.index)
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
            parent_path, _, leaf = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            linear = LoraLinear(getattr(parent, leaf), index)
            setattr(parent, leaf, linear)
            self._linears[path] = linear

    def load(self, adapter: AdapterState | None, trainable: bool = False) -> list[Tensor]:
        """Put an adapter on the base; None takes it off.

        Args:
            adapter: factors of all target modules; copied, so that training never writes into them.
            trainable: give the copies a gradient.

        Returns:
            The copies as leaf tensors: A and B of each module, in model order.

        Raises:
            AdapterError: the adapter's modules or shapes are not those of the base.
        """
        if adapter is not None and list(adapter) != list(self._linears):
            raise AdapterError(
                f"the adapter must hold the {len(self._linears)} target modules of the base in order, got "
                f"{len(adapter)} modules"
            )
        leaves: list[Tensor] = []
        for path, linear in self._linears.items():
            if adapter is None:
                linear.factors = None
                continue
            wanted = (adapter[path].A.shape[1], adapter[path].B.shape[0])
            if wanted != self.targets[path]:
                raise AdapterError(
                    f"factors of {path} must have (in, out) {self.targets[path]}, got {wanted}"
                )
            linear.factors = adapter[path].map(
                lambda factor: factor.detach().to(self.device, copy=True).requires_grad_(trainable)
            )
            leaves += [linear.factors.A, linear.factors.B]
        return leaves

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
    def keyed_dropout(self, dropout: KeyedDropout | None) -> Iterator[None]:
        """Use `dropout` on the adapters' inputs within the block."""
        for linear in self._linears.values():
            linear.dropout = dropout
        try:
            yield
        finally:
            for linear in self._linears.values():
                linear.dropout = None

    @contextmanager
    def base_dropout(self, seed: int, key: tuple[int, ...]) -> Iterator[None]:
        """Train with the base's own dropout within the block, from the stream (seed, key).

        Hugging Face's models draw it from the global generators, which are seeded for the block and put back.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(seed, "base_dropout", *key))
            self.model.train()
            try:
                yield
            finally:
                self.model.eval()
