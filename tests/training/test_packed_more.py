"""The parts of the packed engine by themselves: isolation, optimizer, slots, operations, dropout, head, attention."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.comm.group import SoloGroup
from fedsim.config.loader import load_config
from fedsim.errors import ModelError
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import ClientPlan
from fedsim.models import head as head_module
from fedsim.models import packing, stacked
from fedsim.models.adapted import AdaptedModel
from fedsim.models.base import BaseModel
from fedsim.models.dropout import feature_keys, keep_mask, token_keys
from fedsim.models.head import LinearHead, frozen_cross_entropy
from fedsim.models.pack_check import alone_logits, packing_problem, undivided_randomness
from fedsim.models.packing import BUCKET_STEP, layout_of, pack_tokens, packed_attention
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_products
from fedsim.models.targets import find_targets
from fedsim.server.engine import build_engine
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import Pack
from fedsim.training.row_optimizers import RowOptimizer, SlotStep
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import OptimizerSettings, make_optimizer
from fedsim.training.slots import plan_slots
from tests.helpers import make_store, random_texts, tiny_opt
from tests.training.test_packed import (
    ADAMW,
    CPU,
    FAMILIES,
    PAD,
    TWO,
    assert_same,
    clients,
    random_adapter,
    starts_for,
    tiny_qwen2,
    train_packed,
    train_sequential,
)
from tests.training.test_sequential_oracle import train_with_peft

ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def store() -> Any:
    return make_store(random_texts(40, seed=1))


EXAMPLES = {0: [0, 1, 2], 1: [3, 4], 2: [5, 6, 7, 8], 3: [9]}
RANK_OF = {0: 2, 1: 3, 2: 1, 3: 4}


def ones_own_mean(packed: Any, num_parts: int) -> Tensor:
    counts = torch.bincount(packed.owner_of_label, minlength=num_parts)
    return (1.0 / counts.double())[packed.owner_of_label]


def packs_mean(packed: Any, num_parts: int) -> Tensor:
    """The likely mistake: one mean over the label tokens of everybody."""
    return torch.full((len(packed.label_rows),), 1.0 / len(packed.label_rows), dtype=DOUBLE)


def loaded_rows(
    members: Sequence[int], store: Any, weights: Callable[[Any, int], Tensor] = ones_own_mean, seeds: int = 0,
) -> RankRows:  # fmt: skip
    """Rows of the clients `members`, with the gradients of one joint step; `seeds` changes all adapters but 0's."""
    model = tiny_opt(DOUBLE)
    engine = StackedModel(model, find_targets(model, TWO), CPU)
    rows = RankRows(engine.targets, [RANK_OF[member] for member in members], DOUBLE, CPU)
    for slot, member in enumerate(members):
        seed = member if member == 0 else member + 100 * seeds
        rows.load(slot, random_adapter(engine.targets, RANK_OF[member], DOUBLE, seed))
    engine.attach(rows)
    examples = [np.asarray(EXAMPLES[member]) + (20 * seeds if member else 0) for member in members]
    packed = pack_tokens(store, examples, CPU)
    with engine.planned(StepPlan(plan_products(rows, packed, range(len(members)), DOUBLE))):
        engine.label_losses(packed, weights(packed, len(members))).sum().backward()
    return rows


def own(rows: RankRows, tensor: Tensor, members: Sequence[int], client: int = 0) -> Tensor:
    return tensor[slice(*rows.row_ranges[list(members).index(client)])].clone()


COMPANIES = [([0], 0), ([3, 2, 1, 0], 0), ([1, 0], 0), ([0, 1, 2, 3], 1)]
"""Others removed, reordered, fewer, and with other adapters and other texts."""


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("members", "seeds"), COMPANIES)
def test_a_gradient_does_not_depend_on_others(members, seeds, store):
    everybody = [0, 1, 2, 3]
    rows = loaded_rows(everybody, store)
    other = loaded_rows(members, store, seeds=seeds)
    expected = own(rows, rows.gradients, everybody)
    assert expected.abs().max() > 1e-3
    assert relative(own(other, other.gradients, members), expected) <= 1e-12


def test_a_mean_over_the_pack_would_be_seen(store):
    alone = loaded_rows([0], store, packs_mean)
    together = loaded_rows([0, 1, 2, 3], store, packs_mean)
    assert relative(together.gradients[:2], alone.gradients) > 0.1


def clipped_step(rows: RankRows, limit: float | None) -> None:
    steps = [
        SlotStep(slot, OptimizerSettings("sgd", lr=1.0), 1.0, 0, limit)
        for slot in range(len(rows.row_ranges))
    ]
    RowOptimizer(rows).step(steps)


@pytest.mark.parametrize(("members", "seeds"), COMPANIES)
def test_clipping_does_not_depend_on_others(members, seeds, store):
    everybody = [0, 1, 2, 3]
    rows, other = loaded_rows(everybody, store), loaded_rows(members, store, seeds=seeds)
    start = own(rows, rows.values, everybody)
    clipped_step(rows, 0.01)
    clipped_step(other, 0.01)
    moved = own(rows, rows.values, everybody) - start
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    assert relative(own(other, other.values, members) - start, moved) <= 1e-12


def test_clipping_the_whole_pack_would_be_seen(store):
    moves = []
    for members in ([0, 1, 2, 3], [0]):
        rows = loaded_rows(members, store)
        start = own(rows, rows.values, members)
        norm = rows.gradients.norm()
        rows.gradients.mul_(0.01 / (norm + 1e-6))  # the likely mistake
        clipped_step(rows, None)
        moves.append(own(rows, rows.values, members) - start)
    assert relative(moves[0], moves[1]) > 0.1


SLOT_SETTINGS = (
    OptimizerSettings(lr=1e-2),
    OptimizerSettings(lr=3e-3, weight_decay=0.1, beta1=0.8),
    OptimizerSettings(lr=5e-2, beta2=0.95, eps=1e-3),
    OptimizerSettings(lr=1e-3, weight_decay=0.01, eps=1e-6),
)
LIMITS = (None, 1.0, 0.1, 50.0)


def random_rows(capacities: Sequence[int] = (2, 1, 3, 2), dtype: torch.dtype = DOUBLE) -> RankRows:
    rows = RankRows({"a": (5, 7), "b": (4, 3)}, capacities, dtype, CPU)
    rows.values.copy_(
        torch.randn(rows.values.shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    )
    return rows


def slot_steps(step: int, slots: Sequence[int], kind: tuple[OptimizerSettings, ...]) -> list[SlotStep]:
    return [
        SlotStep(slot, kind[slot], kind[slot].lr / (1 + step * (slot + 1)), step, LIMITS[slot])
        for slot in slots
    ]


SGD = tuple(replace(one, name="sgd", momentum=0.3 * slot) for slot, one in enumerate(SLOT_SETTINGS))


@pytest.mark.parametrize("kind", [SLOT_SETTINGS, SGD], ids=["adamw", "sgd"])
def test_row_optimizer_equals_torch(kind):
    """Each client with its own settings, clipping and a learning rate that changes with the step."""
    rows = random_rows()
    optimizer = RowOptimizer(rows)
    generator = torch.Generator().manual_seed(1)
    leaves = [rows.values[slice(*span)].clone().requires_grad_() for span in rows.row_ranges]
    oracles = [make_optimizer([leaf], one) for leaf, one in zip(leaves, kind, strict=True)]
    for step in range(7):
        gradient = torch.randn(rows.values.shape, generator=generator, dtype=DOUBLE)
        rows.gradients.copy_(gradient)
        steps = slot_steps(step, range(4), kind)
        optimizer.step(steps)
        assert not rows.gradients.any()
        for leaf, oracle, span, one in zip(leaves, oracles, rows.row_ranges, steps, strict=True):
            leaf.grad = gradient[slice(*span)].clone()
            if one.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_([leaf], one.max_grad_norm)
            oracle.param_groups[0]["lr"] = one.lr
            oracle.step()
    for leaf, span in zip(leaves, rows.row_ranges, strict=True):
        torch.testing.assert_close(rows.values[slice(*span)], leaf.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", [SLOT_SETTINGS, SGD], ids=["adamw", "sgd"])
def test_rows_without_a_step_do_not_move_a_bit(kind):
    rows = random_rows()
    optimizer = RowOptimizer(rows)
    for step in range(3):
        rows.gradients.fill_(0.5)
        optimizer.step(slot_steps(step, range(4), kind))
    rest = slice(*rows.row_ranges[2])
    kept = [tensor[rest].clone() for tensor in (rows.values, optimizer.first, optimizer.second)]
    for step in range(3, 8):
        rows.gradients.fill_(0.5)
        optimizer.step(slot_steps(step, (0, 1, 3), kind))
    for tensor, before in zip((rows.values, optimizer.first, optimizer.second), kept, strict=True):
        assert torch.equal(tensor[rest], before)


def test_a_finished_client_with_zero_gradient_would_keep_moving():
    """Why a client without a step has to be left out, not just given a gradient of 0."""
    rows = random_rows()
    optimizer = RowOptimizer(rows)
    rows.gradients.fill_(0.5)
    optimizer.step(slot_steps(0, range(4), SLOT_SETTINGS))
    before = own(rows, rows.values, range(4))
    for step in range(1, 6):
        optimizer.step(slot_steps(step, range(4), SLOT_SETTINGS))  # gradients are 0
    assert float((own(rows, rows.values, range(4)) - before).abs().max()) > 1e-3


def test_rows_of_zeros_stay_zero():
    """A slot with room for rank 3 that holds a client of rank 1, with weight decay and clipping."""
    rows = random_rows()
    rows.values[4:6] = 0
    optimizer = RowOptimizer(rows)
    for step in range(4):
        rows.gradients.fill_(0.1)
        rows.gradients[4:6] = 0
        optimizer.step(slot_steps(step, range(4), tuple(replace(s, weight_decay=0.1) for s in SLOT_SETTINGS)))
    assert not rows.values[4:6].any()
    assert rows.values[3].all()


def test_adapters_come_back_as_they_went_in():
    """Into slots with room to spare, one LoRA rank for each module."""
    targets = {"a": (5, 7), "b": (4, 3)}
    mixed = AdapterState(
        {module: random_adapter(targets, rank, DOUBLE, 3)[module] for module, rank in (("a", 3), ("b", 1))}
    )
    rows = RankRows(targets, (2, 4), DOUBLE, CPU)
    for slot, adapter in ((0, random_adapter(targets, 2, DOUBLE, 1)), (1, mixed)):
        rows.load(slot, adapter)
        assert rows.read(slot).equal(adapter)
        assert all(f.A.is_contiguous() and f.B.is_contiguous() for f in rows.read(slot).values())
    assert not rows.values[5:].any()
    copy = rows.read(1)
    rows.clear(1)
    assert not rows.values[2:].any()
    assert copy.equal(mixed)


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_hardly_ever_empty(seed):
    generator = np.random.default_rng(seed)
    steps = np.clip(generator.lognormal(np.log(8), 0.7, 96).round(), 2, 40).astype(int).tolist()
    plan = plan_slots(steps, 16)
    assert plan.occupancy >= 0.95
    assert plan == plan_slots(steps, 16)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_slot_plans(steps, max_slots):
    plan = plan_slots(steps, max_slots)
    assert sorted(client for queue in plan.queues for client in queue) == list(range(len(steps)))
    assert all(plan.queues)
    assert len(plan.queues) == min(max_slots, len(steps))
    loads = [sum(steps[client] for client in queue) for queue in plan.queues]
    assert plan.num_steps == max(loads)
    assert plan.occupancy == pytest.approx(sum(steps) / (len(loads) * max(loads)))
    for queue in plan.queues:
        assert [steps[client] for client in queue] == sorted(
            (steps[client] for client in queue), reverse=True
        )
    # longest first never takes longer than the mean and one more client
    assert plan.num_steps <= sum(steps) / len(loads) + max(steps)


VIEWS = {
    *("view", "t", "transpose", "_unsafe_view", "expand", "slice", "as_strided", "detach", "alias", "split"),
    *("unsqueeze", "squeeze", "select", "permute", "reshape", "unbind", "_reshape_alias", "split_with_sizes"),
    *("lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense", "unfold"),
}


class Watch(TorchDispatchMode):
    """Counts operations that are not views, and remembers the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func.__name__.split(".")[0] not in VIEWS
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def count_operations(
    num_clients: int, targets: tuple[str, ...], num_layers: int, rank: int = 1, **shape: int
) -> int:
    """Of the forward and backward pass of one packed row; one text of 20 tokens for each client."""
    model = tiny_opt(num_hidden_layers=num_layers, **shape)
    texts = make_store([" ".join(["w5"] * 20)] * num_clients)
    engine = StackedModel(model, find_targets(model, targets), CPU)
    rows = RankRows(engine.targets, [rank] * num_clients, torch.float32, CPU)
    for slot in range(num_clients):
        rows.load(slot, random_adapter(engine.targets, rank, torch.float32, slot))
    engine.attach(rows)
    packed = pack_tokens(texts, [np.asarray([client]) for client in range(num_clients)], CPU)
    plan = StepPlan(plan_products(rows, packed, range(num_clients), torch.float32))
    weights = torch.ones(len(packed.label_rows))
    with engine.planned(plan), Watch() as watch:
        engine.label_losses(packed, weights).sum().backward()
    return watch.count


@pytest.mark.parametrize(("targets", "most"), [(TWO, 60), (ALL, 115)], ids=["two", "six"])
def test_operations_do_not_grow_with_clients(targets, most):
    few, many = count_operations(8, targets, 4), count_operations(32, targets, 4)
    assert few == many
    per_layer = (many - count_operations(32, targets, 2)) / 2
    assert per_layer <= most


OPT_125M = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_attention_heads": 12}


@pytest.mark.parametrize(("targets", "grouped"), [(TWO, 7), (ALL, 20)], ids=["two", "six"])
def test_operations_at_the_width_of_opt_125m(targets, grouped):
    """They are equal as long as all rank rows together are at most a quarter of the width; from there on a grouped
    product takes some more a layer, once."""
    for rank in (1, 2, 3):
        counts = {clients: count_operations(clients, targets, 1, rank, **OPT_125M) for clients in (8, 32, 64)}
        assert len(set(counts.values())) == 1, (rank, counts)
    dense = count_operations(8, targets, 1, 8, **OPT_125M)
    many = [count_operations(clients, targets, 1, 8, **OPT_125M) for clients in (32, 64)]
    assert many == [dense + grouped] * 2, "as many for 64 clients as for 32"


def mask(key: tuple[int, ...], tokens: int = 400, module: int = 0, seed: int = 5, p: float = 0.3) -> Tensor:
    keys = torch.from_numpy(token_keys(seed, "lora_dropout", key, tokens))
    return keep_mask(keys, feature_keys(module, 128), p, torch.float32)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.5, 0.9])
def test_masks_keep_their_share_and_the_mean(p):
    kept = mask((0, 1, 2, 3), p=p)
    n = kept.numel()
    share = float((kept != 0).double().mean())
    # 6 standard deviations of independent draws, widened as draws share their token's and feature's keys
    assert abs(share - (1 - p)) <= 6 * math.sqrt(p * (1 - p) / n) + 0.01
    assert all(value in (0.0, pytest.approx(1 / (1 - p))) for value in kept.unique().tolist())
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.15)


def test_masks_of_different_purpose_are_unrelated():
    """Seed, round, client, step, micro-batch and module each make another mask, of which 58 % agree by chance."""
    masks = [mask((0, 1, 2, 3)), mask((0, 1, 2, 3), seed=6), mask((0, 1, 2, 3), module=1)]
    masks += [mask(key) for key in ((1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4))]
    by_chance = 0.7**2 + 0.3**2
    for index, one in enumerate(masks):
        for other in masks[:index]:
            assert float(((one != 0) == (other != 0)).double().mean()) == pytest.approx(by_chance, abs=0.02)


def test_tokens_and_features_of_a_mask_are_unrelated():
    kept = (mask((0, 1, 2, 3)) != 0).double() - 0.7
    for table in (kept, kept.T):
        correlation = torch.corrcoef(table)
        correlation.fill_diagonal_(0)
        assert float(correlation.pow(2).mean().sqrt()) <= 1.5 / math.sqrt(table.shape[1])


def test_masks_depend_on_nothing_else():
    """A longer micro-batch has the same masks for its first tokens; another dtype has the same zeros."""
    assert torch.equal(mask((0, 1, 2, 3), tokens=50), mask((0, 1, 2, 3))[:50])
    keys, features = torch.from_numpy(token_keys(5, "x", (1,), 30)), feature_keys(2, 16)
    wide = keep_mask(keys, features, 0.3, DOUBLE)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(keep_mask(keys, features, 0.3, dtype) == 0, wide == 0)


def head_case(dtype: torch.dtype, bias: bool = False) -> tuple[Tensor, torch.nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(8, 300, bias=bias, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(300, 8, generator=generator, dtype=DOUBLE))
    if bias:
        linear.bias.copy_(torch.randn(300, generator=generator, dtype=DOUBLE))
    hidden = torch.randn(23, 8, generator=generator, dtype=DOUBLE).to(dtype).requires_grad_()
    targets = torch.randint(300, (23,), generator=generator)
    weights = torch.rand(23, generator=generator, dtype=DOUBLE).to(
        DOUBLE if dtype == DOUBLE else torch.float32
    )
    return hidden, linear, targets, weights


@pytest.mark.parametrize("budget", [2**26, 300 * 8 * 5, 1], ids=["whole", "chunks of 5", "rows"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_head_equals_cross_entropy(bias, dtype, tolerance, budget, monkeypatch):
    monkeypatch.setitem(head_module.LOGITS_BUDGET_BYTES, "cpu", budget)
    hidden, linear, targets, weights = head_case(dtype, bias)
    losses = F.cross_entropy(linear(hidden).to(weights.dtype), targets, reduction="none") * weights
    (expected,) = torch.autograd.grad(losses.sum(), hidden)
    mine = frozen_cross_entropy(hidden, LinearHead(linear), targets, weights)
    (gradient,) = torch.autograd.grad(mine.sum(), hidden)
    assert mine.dtype == weights.dtype
    torch.testing.assert_close(mine, losses.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        plain = frozen_cross_entropy(hidden, LinearHead(linear), targets, None)
    torch.testing.assert_close(plain * weights, mine.detach())


def test_head_far_from_zero():
    """Logits of +-1e4 overflow an exponential that is not shifted."""
    hidden, linear, targets, weights = head_case(DOUBLE)
    losses = frozen_cross_entropy(hidden.detach() * 1e4, LinearHead(linear), targets, weights)
    expected = F.cross_entropy(linear(hidden.detach() * 1e4), targets, reduction="none") * weights
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-9)


def test_no_tensor_is_larger_than_the_budget(monkeypatch):
    hidden, linear, targets, weights = head_case(DOUBLE)

    def largest() -> int:
        with Watch() as watch:
            frozen_cross_entropy(hidden, LinearHead(linear), targets, weights).sum().backward()
        return watch.largest

    assert largest() == 23 * 300
    budget = 300 * 8 * 9
    monkeypatch.setitem(head_module.LOGITS_BUDGET_BYTES, "cpu", budget)
    assert largest() <= budget // 8


@pytest.mark.parametrize(("groups", "scaling"), [(1, None), (2, 1.0), (4, 0.3)])
def test_packed_attention_equals_each_sequence_alone(groups, scaling):
    heads, width = 4, 6
    lengths = np.random.default_rng(0).integers(1, 41, 12)
    lengths[:3] = (1, 16, 17)
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> Tensor:
        size = (1, num_heads, int(lengths.sum()), width)
        return torch.randn(size, generator=generator, dtype=DOUBLE).requires_grad_()

    leaves = query, key, value = draw(heads), draw(heads // groups), draw(heads // groups)
    output, _ = packed_attention(
        SimpleNamespace(num_key_value_groups=groups), query, key, value, None, scaling=scaling,
        packed_layout=layout_of(lengths, CPU),
    )  # fmt: skip
    expected = []
    for q, k, v in zip(*(leaf.split(lengths.tolist(), dim=2) for leaf in leaves), strict=True):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        expected.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2)
        )
    alone = torch.cat(expected, dim=1)
    torch.testing.assert_close(output, alone, rtol=1e-12, atol=1e-12)
    direction = torch.randn(output.shape, generator=generator, dtype=DOUBLE)
    mine = torch.autograd.grad((output * direction).sum(), leaves)
    theirs = torch.autograd.grad((alone * direction).sum(), leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=30))
@settings(max_examples=80, deadline=None)
def test_layouts(lengths):
    layout = layout_of(np.asarray(lengths, dtype=np.int64), CPU)
    rows = layout.padded_rows.numpy()
    assert layout.boundaries.tolist() == [0, *np.cumsum(lengths)]
    assert layout.longest == max(lengths)
    assert len(set(rows.tolist())) == len(rows) == sum(lengths)
    end = 0
    for bucket in layout.buckets:
        assert bucket.start == end
        end += bucket.num_sequences * bucket.length
    assert end == layout.num_padded_rows
    assert sum(bucket.num_sequences for bucket in layout.buckets) == len(lengths)
    for first, length in zip(layout.boundaries.tolist(), lengths, strict=False):
        own_rows = rows[first : first + length]
        assert (np.diff(own_rows) == 1).all()
        (bucket,) = (
            one for one in layout.buckets if 0 <= own_rows[0] - one.start < one.num_sequences * one.length
        )
        assert (own_rows[0] - bucket.start) % bucket.length == 0
        assert length <= bucket.length < length + BUCKET_STEP


@given(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_packed_tokens(parts):
    texts = make_store(random_texts(40, seed=1))
    packed = pack_tokens(texts, [np.asarray(part) for part in parts], CPU)
    examples = [example for part in parts for example in part]
    sequences = [texts.sequence(example).tolist() for example in examples]
    assert packed.input_ids[0].tolist() == [token for sequence in sequences for token in sequence]
    assert packed.position_ids[0].tolist() == [i for sequence in sequences for i in range(len(sequence))]
    assert packed.label_targets.tolist() == [token for sequence in sequences for token in sequence[1:]]
    assert torch.equal(packed.input_ids[0][packed.label_rows + 1], packed.label_targets)
    assert torch.equal(packed.owner_of_token[packed.label_rows], packed.owner_of_label)
    for index, (first, end) in enumerate(packed.token_ranges):
        assert packed.owner_of_token[first:end].eq(index).all()
        assert end - first == int(texts.num_tokens[parts[index]].sum())


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_passes(family, dtype):
    build, target_modules = FAMILIES[family]
    model = build(dtype)
    alone = alone_logits(model, CPU, 32)
    assert packing_problem(StackedModel(model, find_targets(model, target_modules), CPU), alone, 32) is None


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' own attention in the place of ours: OPT then lets the texts of a row see each other."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def register() -> None:
        ALL_ATTENTION_FUNCTIONS.register(packing.ATTENTION, sdpa_attention_forward)

    monkeypatch.setattr(stacked, "register_packed_attention", register)
    yield
    packing.register_packed_attention()


def test_the_check_catches_texts_that_see_each_other(plain_attention):
    model = tiny_opt()
    alone = alone_logits(model, CPU, 32)
    problem = packing_problem(StackedModel(model, find_targets(model, TWO), CPU), alone, 32)
    assert problem is not None
    assert "do not have the logits they have alone" in problem


def test_a_sliding_window_is_refused():
    model = tiny_qwen2(torch.float32)
    model.config.use_sliding_window, model.config.sliding_window = True, 4
    alone, short = alone_logits(model, CPU, 32), alone_logits(model, CPU, 4)
    engine = StackedModel(model, find_targets(model, TWO), CPU)
    assert "slides over 4 tokens, fewer than data.max_tokens=32" in (packing_problem(engine, alone, 32) or "")
    assert packing_problem(engine, short, 4) is None


def test_what_a_model_that_also_takes_images_says_of_its_texts_counts(monkeypatch):
    """Its configuration has that of the language model as a part."""
    model = tiny_qwen2(torch.float32)
    alone = alone_logits(model, CPU, 32)
    engine = StackedModel(model, find_targets(model, TWO), CPU)
    assert packing_problem(engine, alone, 32) is None
    part = SimpleNamespace(sliding_window=16, attention_dropout=0.1)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self: part)
    assert "slides over 16 tokens" in (packing_problem(engine, alone, 32) or "")
    assert "attention_dropout=0.1" in (undivided_randomness(model) or "")
    monkeypatch.setattr(
        type(model.config), "get_text_config", lambda self: SimpleNamespace(final_logit_softcapping=30.0)
    )
    assert "final_logit_softcapping" in (packing_problem(engine, alone, 32) or "")


def test_attention_that_reaches_less_far_than_a_long_text_is_seen():
    """Whatever its name: a text as long as the run's longest is compared as well."""
    model = tiny_qwen2(torch.float32)
    alone = alone_logits(model, CPU, 64)
    assert [len(logits) for logits in alone] == [7, 3, 12, 5, 64]
    engine = StackedModel(model, find_targets(model, TWO), CPU)
    assert packing_problem(engine, alone, 64) is None
    alone[-1][20:] += 1.0  # as if tokens from the 21st on saw fewer than all before
    assert "do not have the logits they have alone" in (packing_problem(engine, alone, 64) or "")


def engine_for(model: torch.nn.Module, store: Any, *overrides: str) -> tuple[Any, Any]:
    config = load_config(None, ["data.max_tokens=32", "model.cpu_linear=torch", *overrides])
    base = BaseModel(model, None, PAD, "some-model", "some-model", torch.float32, "")
    trainer, scorer, _ = build_engine(config, SoloGroup(), base, store)
    return trainer, scorer


def test_a_model_that_cannot_be_packed_falls_back_with_one_warning(plain_attention, store, caplog):
    model = tiny_opt()
    ids = torch.arange(3, 10)[None]
    before = model(input_ids=ids).logits
    trainer, scorer = engine_for(model, store)
    assert isinstance(trainer, SequentialTrainer)
    assert isinstance(scorer, PaddedScorer)
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "train one after another, not together: for some-model" in warning.getMessage()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("Stacked" in type(module).__name__ for module in model.modules())


def test_packs_that_were_asked_for_are_not_replaced_silently(plain_attention, store):
    with pytest.raises(ModelError, match=r"training\.trainer must be auto or sequential for some-model"):
        engine_for(tiny_opt(), store, "training.trainer=packed")


def test_a_model_that_can_be_packed_is(store, caplog):
    trainer, scorer = engine_for(tiny_opt(), store)
    assert isinstance(trainer, PackedTrainer)
    assert isinstance(scorer, PackedScorer)
    assert not caplog.records


def test_dropout_inside_attention_falls_back(store, caplog):
    trainer, _ = engine_for(tiny_opt(attention_dropout=0.1), store, "model.dropout=as_config")
    assert isinstance(trainer, SequentialTrainer)
    assert "attention_dropout=0.1" in caplog.text


def test_a_model_that_refuses_checkpointing_falls_back(store, caplog):
    model = tiny_opt()
    model.supports_gradient_checkpointing = False
    trainer, _ = engine_for(model, store, "training.gradient_checkpointing=true")
    assert isinstance(trainer, SequentialTrainer)
    assert "the model has no gradient checkpointing" in caplog.text


def test_a_model_with_attention_of_its_own_falls_back(store, caplog):
    """BLOOM does not call the attention functions that transformers lets one register."""
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)).eval()
    ids = torch.arange(3, 10)[None]
    before = model(input_ids=ids).logits
    trainer, _ = engine_for(model, store, "lora.target_modules=[query_key_value]")
    assert isinstance(trainer, SequentialTrainer)
    assert "does not let its attention be replaced" in caplog.text
    assert torch.equal(model(input_ids=ids).logits, before)


def stories(folder: Any, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "models" / "stories260K", dtype=dtype).eval()
    for norm in model.modules():
        if type(norm).__name__ == "LlamaRMSNorm":
            norm.forward = partial(norm_in_full, norm)
    return model


def norm_in_full(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the type of its input; transformers' rounds to float32, by which a last digit becomes a seventh."""
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def test_a_trained_llama(shared, store, tmp_path):
    """Packs, the sequential trainer and plain PEFT agree."""
    starts = starts_for(stories(shared, DOUBLE), TWO, DOUBLE)[:3]
    local = tuple(replace(ADAMW, batch_size=size) for size in (3, 2, 4))
    jobs = clients(store, local)[:3]
    alone = train_sequential(stories(shared, DOUBLE), TWO, jobs, starts, store)
    packed = train_packed(stories(shared, DOUBLE), TWO, jobs, starts, store)
    assert_same(packed, alone, 1e-9)
    expected, losses = train_with_peft(stories(shared, DOUBLE), starts[1], jobs[1], store, local[1], tmp_path)
    assert packed[1].report.train_loss_last == pytest.approx(losses[-1], abs=1e-9)
    for module, factors in packed[1].adapter.items():
        torch.testing.assert_close(factors.A, expected[module].A, rtol=0, atol=1e-9)
        torch.testing.assert_close(factors.B, expected[module].B, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-10), (torch.float32, 1e-4)])
def test_scorers_agree(dtype, tolerance, store):
    """Several adapters of different ranks on different examples, which one of them repeats."""
    build, target_modules = FAMILIES["llama"]
    adapters = starts_for(build(dtype), target_modules, dtype)[:3]
    parts = [np.asarray([3, 1, 2]), np.asarray([3]), np.asarray([7, 30, 7, 12])]
    model = build(dtype)
    padded = PaddedScorer(AdaptedModel(model, find_targets(model, target_modules), CPU), PAD)
    model = build(dtype)
    packed = PackedScorer(StackedModel(model, find_targets(model, target_modules), CPU))
    for chosen in ([0, 1, 2], [2], [1, 0]):
        expected = padded.losses([adapters[k] for k in chosen], store, [parts[k] for k in chosen])
        mine = packed.losses([adapters[k] for k in chosen], store, [parts[k] for k in chosen])
        for one, other in zip(mine, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
    assert model.lm_head.weight.grad is None


@pytest.mark.skipif(not packing.HAS_VARLEN, reason="this torch has no attention for packed sequences")
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_base_on_a_gpu(family, store, cuda, monkeypatch):
    """fp32 adapters on a bf16 base: losses near the sequential trainer's, through the varlen kernel."""
    build, target_modules = FAMILIES[family]
    starts = starts_for(build(torch.float32), target_modules, torch.float32)
    jobs = clients(store)
    model = build(torch.bfloat16).to(cuda)
    adapted = AdaptedModel(model, find_targets(model, target_modules), cuda)
    plans = [ClientPlan(start) for start in starts]
    alone = SequentialTrainer(adapted, store, PAD, False, 0).train(Pack(0, jobs), plans, 1)
    kernels = []
    original = packing._flash_attention
    monkeypatch.setattr(packing, "_flash_attention", lambda *args: kernels.append(1) or original(*args))
    model = build(torch.bfloat16).to(cuda)
    engine = StackedModel(model, find_targets(model, target_modules), cuda)
    packed = PackedTrainer(engine, store, 3, 10_000, False, 0).train(Pack(0, jobs), plans, 1)
    assert kernels
    for mine, theirs in zip(packed, alone, strict=True):
        assert all(factors.A.dtype == torch.float32 for factors in mine.adapter.values())
        assert mine.report.train_loss_first == pytest.approx(theirs.report.train_loss_first, abs=2e-2)
        assert mine.report.train_loss_last == pytest.approx(theirs.report.train_loss_last, abs=2e-2)


def test_fp64_on_a_gpu(store, cuda):
    starts = starts_for(tiny_opt(DOUBLE), TWO, DOUBLE)
    jobs = clients(store)
    alone = train_sequential(tiny_opt(DOUBLE), TWO, jobs, starts, store)
    model = tiny_opt(DOUBLE).to(cuda)
    engine = StackedModel(model, find_targets(model, TWO), cuda)
    plans = [ClientPlan(start) for start in starts]
    packed = PackedTrainer(engine, store, 3, 10_000, False, 0).train(Pack(0, jobs), plans, 1)
    for mine, theirs in zip(packed, alone, strict=True):
        for module, factors in mine.adapter.items():
            torch.testing.assert_close(factors.A.cpu(), theirs.adapter[module].A, rtol=0, atol=1e-9)
