"""The frozen base with the adapters of several clients on it, for packed rows of tokens.

Letters: T = tokens of a packed row, R = rank rows of all slots, i / o = in / out features, n = label tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.lora.plan import BOTH, Sides
from fedsim.models.dropout import feature_keys, keep_mask, keyed_base_dropout, no_base_dropout
from fedsim.models.head import Head, frozen_cross_entropy, make_head
from fedsim.models.packing import ATTENTION, LAYOUT_ARGUMENT, PackedTokens, register_packed_attention
from fedsim.models.passes import FreePasses, Passes
from fedsim.models.products import GroupedProduct, RowProduct, Tile, TiledProduct, may_be_grouped
from fedsim.models.rows import RankRows
from fedsim.models.targets import set_module
from fedsim.models.transfer import to_device

DENSE_SHARE = 4
"""One dense product over all rank rows pays while they are at most 1 / DENSE_SHARE of a module's width."""

DENSE_ROWS_AT_LEAST = 32
"""Fewer rows than this never pay for being cut up."""


@dataclass(slots=True)
class StepPlan:
    """What the adapted modules need to know about the packed row they are given.

    Attributes:
        products: how each module multiplies.
        dropout: (T,) keys of the tokens and the probability, or None.
        trains: factors that any client in the row trains; the others get no gradient.
    """

    products: Mapping[str, RowProduct]
    dropout: tuple[Tensor, float] | None = None
    trains: Sides = BOTH


class StackedLinear(nn.Module):
    """A frozen linear module plus, for each token, the adapter of the client it belongs to."""

    def __init__(
        self, base: nn.Module, path: str, index: int, in_features: int, device: torch.device
    ) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.features = feature_keys(index, in_features).to(device)
        self.leaves: tuple[nn.Parameter, nn.Parameter] | None = None
        self.plan: StepPlan | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, i) -> (1, T, o)."""
        y: Tensor = self.base(x)
        if self.plan is None or self.leaves is None:
            return y
        rows = x.reshape(-1, x.shape[-1])
        adapted: Tensor = _RankRowProduct.apply(  # type: ignore[no-untyped-call]
            rows,
            y.reshape(-1, y.shape[-1]),
            *self.leaves,
            self.plan.products[self.path],
            self.plan.dropout,
            self.features,
            self.plan.trains,
        )
        return adapted.view(y.shape)


class _RankRowProduct(torch.autograd.Function):
    """y + gate * (dropout(x) A^T) B for all clients; gradients of A and B are added into their buffers directly.

    Two products forward and four backward, whatever the number of clients in a tile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        down: Tensor,
        up: Tensor,
        product: RowProduct,
        dropout: tuple[Tensor, float] | None,
        features: Tensor,
        trains: Sides,
    ) -> Tensor:
        kept = x if dropout is None else x * keep_mask(dropout[0], features, dropout[1], x.dtype)
        adapted, hidden = product.multiply(kept, y, down.to(x.dtype), up.to(x.dtype))
        ctx.save_for_backward(kept, *hidden)
        ctx.leaves = (down, up)
        ctx.rest = (product, dropout, features, trains)
        return adapted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, *hidden = ctx.saved_tensors
        down, up = ctx.leaves
        product, dropout, features, trains = ctx.rest
        (gradient,) = gradients
        to_x = product.gradients(
            gradient,
            kept,
            hidden,
            down.to(kept.dtype),
            up.to(kept.dtype),
            down.grad if "A" in trains else None,
            up.grad if "B" in trains else None,
            ctx.needs_input_grad[0],
        )
        if to_x is not None and dropout is not None:
            to_x = to_x.mul_(keep_mask(dropout[0], features, dropout[1], to_x.dtype))
        return to_x, gradient if ctx.needs_input_grad[1] else None, None, None, None, None, None, None


class StackedModel:
    """A frozen causal language model that trains or measures several clients' adapters on packed rows.

    Args:
        model: the base; its target modules are replaced in place and its attention is switched to packed rows.
        targets: dotted module path -> (i, o), in model order.
        device: where the base lives.
        head: the output head; None to use the model's own linear module.
        checkpoint_gradients: keep no activations within a layer and compute them again in the backward pass.

    Attributes:
        passes: through which each use of the base goes, here and where it is trained.

    Raises:
        ModelError: the model has no body and head that could be run apart, or no gradient checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, tuple[int, int]],
        device: torch.device,
        head: Head | None = None,
        checkpoint_gradients: bool = False,
    ) -> None:
        model.requires_grad_(False)
        model.eval()
        untyped: Any = model
        self.model = untyped
        self.targets = dict(targets)
        self.device = device
        self._own_attention: str = untyped.config._attn_implementation
        self.dtype: torch.dtype = untyped.dtype
        self.head = head or _plain_head(untyped)
        self.passes: Passes = FreePasses()
        self._linears: dict[str, StackedLinear] = {}
        self.checkpoint_gradients = False
        register_packed_attention()
        untyped.set_attn_implementation(ATTENTION)
        if untyped.config._attn_implementation != ATTENTION:
            self.unwrap()
            raise ModelError("the model does not let its attention be replaced")
        if checkpoint_gradients:
            if not untyped.supports_gradient_checkpointing or vars(untyped.config).get("layerdrop"):
                self.unwrap()
                raise ModelError("the model has no gradient checkpointing without dropped layers")
            # not the reentrant kind, which would ask for gradients below the first adapted layer as well
            _renamed(untyped, "activation_checkpointing_enable", "gradient_checkpointing_enable")(
                {"use_reentrant": False}
            )
            self.checkpoint_gradients = True
        for index, (path, (in_features, _)) in enumerate(targets.items()):
            linear = StackedLinear(model.get_submodule(path), path, index, in_features, device)
            set_module(model, path, linear)
            self._linears[path] = linear

    def unwrap(self) -> None:
        """Give the model back as it was."""
        for path, linear in self._linears.items():
            set_module(self.model, path, linear.base)
        self._linears = {}
        if self.checkpoint_gradients:
            _renamed(self.model, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
        self.model.set_attn_implementation(self._own_attention)

    @contextmanager
    def unwrapped(self) -> Iterator[nn.Module]:
        """The model as it was given, with its own attention, within the block.

        What takes the places of its target modules there is gone afterwards.
        """
        for path, linear in self._linears.items():
            set_module(self.model, path, linear.base)
        self.model.set_attn_implementation(self._own_attention)
        try:
            yield self.model
        finally:
            for path, linear in self._linears.items():
                set_module(self.model, path, linear)
            self.model.set_attn_implementation(ATTENTION)

    def attach(self, rows: RankRows | None) -> None:
        """Use the adapters in `rows` from now on; None for the plain base."""
        for path, linear in self._linears.items():
            linear.leaves = None if rows is None else rows.parameters(path)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the block other adapters and plans may be used; afterwards those of before are back."""
        before = {path: (linear.leaves, linear.plan) for path, linear in self._linears.items()}
        try:
            yield
        finally:
            for path, linear in self._linears.items():
                linear.leaves, linear.plan = before[path]

    @contextmanager
    def planned(self, plan: StepPlan | None) -> Iterator[None]:
        """Give the adapted modules their plan within the block."""
        for linear in self._linears.values():
            linear.plan = plan
        try:
            yield
        finally:
            for linear in self._linears.values():
                linear.plan = None

    def label_losses(
        self, packed: PackedTokens, weights: Tensor | None = None, base_dropout: Tensor | None = None
    ) -> Tensor:
        """(n,) loss of each label token, times its weight if weights are given.

        Args:
            packed: the row.
            weights: (n,), which also asks for gradients.
            base_dropout: (T,) int32 keys of the tokens where the base trains with its own dropout.
        """
        with ExitStack() as undo:
            if base_dropout is not None:
                self.model.train()
                undo.callback(self.model.eval)
                undo.enter_context(keyed_base_dropout(base_dropout))
            elif self.checkpoint_gradients and weights is not None:
                # transformers checkpoints in training mode only, which would switch the base's dropout on
                self.model.train()
                undo.callback(self.model.eval)
                undo.enter_context(no_base_dropout())
            states = self.body(packed.input_ids, packed.position_ids, **{LAYOUT_ARGUMENT: packed.layout})
        hidden = states[0].index_select(0, packed.label_rows)
        with self.head.whole():
            return frozen_cross_entropy(hidden, self.head, packed.label_targets, weights)

    def body(self, input_ids: Tensor, position_ids: Tensor, **arguments: object) -> Tensor:
        """(1, T, width) last hidden states, before the output head.

        Args:
            input_ids: (1, T).
            position_ids: (1, T).
            arguments: further keywords for the model's body.
        """
        untyped: Any = self.model
        states: Tensor = untyped.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **arguments
        ).last_hidden_state
        return states


def plan_products(
    rows: RankRows, packed: PackedTokens, slots: Sequence[int], dtype: torch.dtype
) -> dict[str, RowProduct]:
    """How each module multiplies a packed row with the rank rows.

    One dense product while there are few rank rows; of many, a grouped product where the slots have one capacity and
    lie together; else dense products tile by tile.

    Args:
        rows: the adapters.
        packed: the row; its k-th part belongs to the client in `slots[k]`.
        slots: ascending.
        dtype: of the base's activations.
    """
    widest = max(DENSE_ROWS_AT_LEAST, min(i for i, _ in rows.targets.values()) // DENSE_SHARE)
    groups: list[list[int]] = []
    for part, slot in enumerate(slots):
        first = slots[groups[-1][0]] if groups else slot
        if groups and rows.row_ranges[slot][1] - rows.row_ranges[first][0] <= widest:
            groups[-1].append(part)
        else:
            groups.append([part])
    grouped = len(groups) > 1 and _may_be_grouped(rows, slots, dtype)
    products: dict[tuple[tuple[float, ...], tuple[int, ...]], RowProduct] = {}
    planned = {}
    for module in rows.targets:
        scalings = tuple(rows.scaling(slot, module) for slot in slots)
        ranks = tuple(rows.rank(slot, module) for slot in slots)
        if (scalings, ranks) not in products:
            products[scalings, ranks] = (
                _grouped(rows, packed, slots, scalings, dtype)
                if grouped
                else TiledProduct(
                    tuple(_tile(rows, packed, slots, group, scalings, ranks, dtype) for group in groups)
                )
            )
        planned[module] = products[scalings, ranks]
    return planned


def _may_be_grouped(rows: RankRows, slots: Sequence[int], dtype: torch.dtype) -> bool:
    capacities = [rows.row_ranges[slot][1] - rows.row_ranges[slot][0] for slot in slots]
    neighbours = slots[-1] - slots[0] + 1 == len(slots)
    widths = [width for shape in rows.targets.values() for width in shape]
    return neighbours and may_be_grouped(capacities, widths, rows.values.shape[1], dtype, rows.values.device)


def _grouped(
    rows: RankRows,
    packed: PackedTokens,
    slots: Sequence[int],
    scalings: Sequence[float],
    dtype: torch.dtype,
) -> GroupedProduct:
    device = packed.owner_of_token.device
    first, last = rows.row_ranges[slots[0]], rows.row_ranges[slots[-1]]
    return GroupedProduct(
        rows=slice(first[0], last[1]),
        capacity=first[1] - first[0],
        ends=to_device([end for _, end in packed.token_ranges], device, torch.int32),
        scaling=to_device(scalings, device, dtype)[packed.owner_of_token][:, None],
    )


def _tile(
    rows: RankRows,
    packed: PackedTokens,
    slots: Sequence[int],
    group: Sequence[int],
    scalings: Sequence[float],
    ranks: Sequence[int],
    dtype: torch.dtype,
) -> Tile:
    tokens = slice(packed.token_ranges[group[0]][0], packed.token_ranges[group[-1]][1])
    rank_rows = slice(rows.row_ranges[slots[group[0]]][0], rows.row_ranges[slots[group[-1]]][1])
    if len(group) == 1:
        # the slot's other rows are 0
        own_rows = slice(rank_rows.start, rank_rows.start + ranks[group[0]])
        return Tile(tokens, own_rows, scalings[group[0]])
    device = packed.owner_of_token.device
    owner = packed.owner_of_token[tokens]
    slot_of_part = to_device(slots, device, torch.int64)
    belongs = slot_of_part[owner][:, None] == rows.slot_of_row[rank_rows][None, :]
    scaling = to_device(scalings, device, dtype)[owner]
    return Tile(tokens, rank_rows, belongs.to(dtype).mul_(scaling[:, None]))


def _renamed(model: Any, name: str, old_name: str) -> Any:
    """A method of transformers' models under its name since version 5, or the one before."""
    return getattr(model, name if hasattr(model, name) else old_name)


def _plain_head(model: Any) -> Head:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        raise ModelError("the model must have a body and a linear output head")
    return make_head(head)
