"""What a packed row costs a base model, found by running the engine on the meta device: shapes only, no weights.

The forward and backward pass of the model as it will train is followed operation by operation. So the figures hold for
any architecture that can be packed, and nothing about a family of models is written down here.

Letters: T = tokens of a row, L = tokens of one sequence, H = attention heads, D = width of a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedsim.models.products import Tile, TiledProduct
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel, StepPlan

TRACED_TOKENS = 256
TRACED_RANK = 1
ROUGH_SAVED = 16
"""Hidden states that a layer keeps for each token in a model that cannot be followed; OPT keeps 11, Llama 16."""
ROUGH_OPERATIONS = 60
"""Operations of a layer in such a model, forward and backward."""
ATTENTION = "fedsim_traced"

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """Costs of a base model with adapters, apart from the adapters' own products.

    Attributes:
        forward_flops: of a token in the forward pass, without attention and output head.
        backward_flops: of a token in the backward pass: input gradients, from the last layer down to the first
            adapted module.
        head_flops: of a label token in one product with the output head.
        attention_flops: times L^2, of a sequence in the forward pass; all layers.
        attention_backward_flops: the same in the backward pass.
        saved_bytes: of a token, kept from the forward to the backward pass.
        layer_input_bytes: of a token, what gradient checkpointing keeps instead: each layer's input.
        num_layers: of the body.
        widest_bytes: of a token, the largest activation.
        hidden_bytes: of a token, the hidden state before the output head.
        cache_bytes: of a token in the key-value cache of generation.
        num_operations: that are started for a forward and backward pass.
        forward_operations: of them, those of the forward pass.
        vocab_size: outputs of the head.
        parameter_bytes: weights, shared ones counted once, and buffers.
        linear_shapes: (o, i) of each linear module.
        target_bytes: weights of the adapted modules.
        dequantized_bytes: the largest weight in the type of the products, where weights are kept in fewer bits.
    """

    forward_flops: float
    backward_flops: float
    head_flops: float
    attention_flops: float
    attention_backward_flops: float
    saved_bytes: float
    layer_input_bytes: float
    num_layers: int
    widest_bytes: float
    hidden_bytes: float
    cache_bytes: float
    num_operations: int
    forward_operations: int
    vocab_size: int
    parameter_bytes: int
    linear_shapes: tuple[tuple[int, int], ...]
    target_bytes: int
    dequantized_bytes: int = 0


def trace_model(
    model: nn.Module, targets: Mapping[str, tuple[int, int]], copies_attention: bool = True
) -> ModelCosts:
    """Follow a training step of the packed engine through a model without weights.

    Args:
        model: on the meta device, in the dtype of the run; its modules and attention are changed and put back.
        targets: dotted module path -> (in features, out features), in model order.
        copies_attention: queries, keys and values are copied into buckets of equal length, as in float32 and on CPUs;
            else a kernel for sequences of different lengths takes them as they are.

    Raises:
        ModelError: the model cannot be packed.
        RuntimeError, TypeError, ValueError, AttributeError, IndexError: its forward pass needs values, not only shapes.
    """
    facts = _weights(model, targets)
    stacked = StackedModel(model, targets, _META)
    try:
        attention, saved, counts = _run(stacked, copies_attention)
    finally:
        stacked.attach(None)
        stacked.unwrap()
    untyped: Any = model
    settings = untyped.config.get_text_config()
    head = untyped.get_output_embeddings().weight
    size = head.element_size()
    num_layers = int(settings.num_hidden_layers)
    return ModelCosts(
        forward_flops=counts.forward_flops / TRACED_TOKENS,
        backward_flops=counts.backward_flops / TRACED_TOKENS,
        head_flops=2.0 * head.numel(),
        attention_flops=4.0 * attention.width,
        attention_backward_flops=10.0 * attention.backward_width,
        saved_bytes=saved.num_bytes / TRACED_TOKENS,
        layer_input_bytes=float(num_layers * settings.hidden_size * size),
        num_layers=num_layers,
        widest_bytes=float(
            max(max(shape) for shape in facts.linear_shapes if shape != tuple(head.shape)) * size
        ),
        hidden_bytes=float(head.shape[1] * size),
        cache_bytes=float(attention.cached_width * size),
        num_operations=counts.num_operations,
        forward_operations=counts.forward_operations,
        vocab_size=int(head.shape[0]),
        parameter_bytes=facts.parameter_bytes,
        linear_shapes=facts.linear_shapes,
        target_bytes=facts.target_bytes,
    )


def rough_costs(model: nn.Module, targets: Mapping[str, tuple[int, int]]) -> ModelCosts:
    """Costs of a model that cannot be followed: each weight of a linear module is used once for a token.

    Args:
        model: on the meta device, in the dtype of the run.
        targets: as for `trace_model`.
    """
    facts = _weights(model, targets)
    untyped: Any = model
    settings = untyped.config.get_text_config()
    head = untyped.get_output_embeddings().weight
    body = 2.0 * (sum(o * i for o, i in facts.linear_shapes) - head.numel())
    num_layers, hidden, size = int(settings.num_hidden_layers), int(settings.hidden_size), head.element_size()
    return ModelCosts(
        forward_flops=body,
        backward_flops=body,
        head_flops=2.0 * head.numel(),
        attention_flops=4.0 * num_layers * hidden,
        attention_backward_flops=10.0 * num_layers * hidden,
        saved_bytes=float(ROUGH_SAVED * num_layers * hidden * size),
        layer_input_bytes=float(num_layers * hidden * size),
        num_layers=num_layers,
        widest_bytes=float(4 * hidden * size),
        hidden_bytes=float(hidden * size),
        cache_bytes=float(2 * num_layers * hidden * size),
        num_operations=ROUGH_OPERATIONS * num_layers,
        forward_operations=ROUGH_OPERATIONS * num_layers // 3,
        vocab_size=int(head.shape[0]),
        parameter_bytes=facts.parameter_bytes,
        linear_shapes=facts.linear_shapes,
        target_bytes=facts.target_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    parameter_bytes: int
    linear_shapes: tuple[tuple[int, int], ...]
    target_bytes: int


def _weights(model: nn.Module, targets: Mapping[str, tuple[int, int]]) -> _Weights:
    shapes = tuple(
        (linear.out_features, linear.in_features)
        for linear in dict.fromkeys(module for module in model.modules() if type(module) is nn.Linear)
    )
    return _Weights(
        sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers())),
        shapes,
        sum(_bytes(_linear(model, path).weight) for path in targets),
    )


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear), "checked where the targets were found"
    return module


@dataclass
class _Attention:
    """Adds up H D of all attention modules: in the forward pass, in the backward pass, and of keys and values."""

    copies: bool
    width: int = 0
    backward_width: int = 0
    cached_width: int = 0


@dataclass
class _Saved:
    """Adds up what is kept for the backward pass: each tensor's own storage once, frozen weights left out."""

    weights: set[int]
    seen: dict[int, Tensor] = field(default_factory=dict)
    num_bytes: int = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """A hook of `torch.autograd.graph.saved_tensors_hooks`."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights and storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor  # held, so that no other storage gets its address
            self.num_bytes += storage.nbytes()
        return tensor


@dataclass
class _Counts:
    forward_flops: float
    backward_flops: float
    num_operations: int
    forward_operations: int


class _OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute something: views cost a GPU nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass on and count."""
        self.num_operations += not func.is_view
        return func(*args, **(kwargs or {}))


def _run(stacked: StackedModel, copies_attention: bool) -> tuple[_Attention, _Saved, _Counts]:
    """One row of one client, forward and backward; the output head is left out."""
    rows = RankRows(stacked.targets, [TRACED_RANK], torch.float32, _META)
    stacked.attach(rows)
    product = TiledProduct((Tile(slice(0, TRACED_TOKENS), slice(0, TRACED_RANK), 1.0),))
    plan = StepPlan(dict.fromkeys(stacked.targets, product))
    ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.int64, device=_META)
    attention = _Attention(copies_attention)
    _register(attention)
    stacked.model.set_attn_implementation(ATTENTION)
    saved = _Saved({tensor.untyped_storage()._cdata for tensor in stacked.model.parameters()})
    operations = _OperationCounter()
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with stacked.planned(plan), operations:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor), forward:
            states = stacked.body(ids, ids)
        forward_operations = operations.num_operations
        with backward:
            states.backward(torch.empty_like(states))  # type: ignore[no-untyped-call]
    # the adapters' own; in the backward pass torch's counter leaves products that add in place out
    own = 2.0 * TRACED_TOKENS * TRACED_RANK * sum(i + o for i, o in stacked.targets.values())
    counts = _Counts(
        forward.get_total_flops() - own,
        max(0.0, backward.get_total_flops() - own),
        operations.num_operations,
        forward_operations,
    )
    return attention, saved, counts


def _register(counted: _Attention) -> None:
    """Give transformers an attention function that keeps and counts what a fused kernel would, and computes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module,  # noqa: ARG001
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,  # noqa: ARG001
        **kwargs: Any,  # noqa: ARG001
    ) -> tuple[Tensor, None]:
        counted.width += query.shape[1] * query.shape[3]
        counted.cached_width += key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]
        out: Tensor = _FusedAttention.apply(query, key, value, counted)  # type: ignore[no-untyped-call]
        return out, None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, counted: _Attention) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        # what is copied has the heads of the queries, and the output is copied back
        kept = (query.new_empty(3, *query.shape),) if counted.copies else (query, key, value)
        ctx.save_for_backward(*kept, out, sums)
        ctx.shapes = query.shape, key.shape, value.shape
        ctx.counted = counted
        return torch.empty_like(out) if counted.copies else out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = (gradients[0].new_empty(shape) for shape in ctx.shapes)
        ctx.counted.backward_width += query.shape[1] * query.shape[3]
        return query, key, value, None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
