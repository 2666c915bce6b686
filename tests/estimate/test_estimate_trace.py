"""Costs that are followed on the meta device, against real models that are run and measured."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedsim.estimate.memory import row_bytes
from fedsim.estimate.rates import work_flops
from fedsim.estimate.trace import ModelCosts, rough_costs, trace_model
from fedsim.estimate.workload import Work
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.models.cpu_linear import linear_shapes, onednn_available, prepack_frozen_linears
from fedsim.models.packing import PackedTokens, pack_tokens
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_products
from fedsim.models.targets import find_targets
from fedsim.training.row_optimizers import RowOptimizer
from tests.helpers import make_store, tiny_opt

RANK = 3
LENGTH = 32
SEQUENCES = 6


def opt(**changes: Any) -> torch.nn.Module:
    return tiny_opt(
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        **changes,
    )


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def neox() -> torch.nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], list[str]]] = {
    "opt": (opt, ["q_proj", "v_proj"]),
    "opt, all linear": (opt, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "opt, post-norm": (lambda: opt(do_layer_norm_before=False), ["q_proj", "v_proj"]),
    "llama": (llama, ["q_proj", "v_proj"]),
    "neox": (neox, ["query_key_value"]),
}


def on_meta(make: Callable[[], Any]) -> Any:
    """The same model without memory."""
    config = make().config
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def costs_of(name: str) -> ModelCosts:
    make, modules = MODELS[name]
    model = on_meta(make)
    return trace_model(model, find_targets(model, modules))


def step(name: str) -> tuple[StackedModel, RankRows, StepPlan, PackedTokens]:
    """A real engine with one client and a row of sequences whose attention needs no padding."""
    make, modules = MODELS[name]
    model = make()
    targets = find_targets(model, modules)
    stacked = StackedModel(model, targets, torch.device("cpu"))
    rows = RankRows(targets, [RANK], torch.float32, torch.device("cpu"))
    rows.load(0, initial_adapter(targets, dict.fromkeys(targets, RANK), ScalingRule(16.0), 0))
    stacked.attach(rows)
    # the tokenizer puts one token before each text
    words = " ".join(f"w{3 + index % 60}" for index in range(LENGTH - 1))
    store = make_store([words] * SEQUENCES, LENGTH)
    packed = pack_tokens(store, [np.arange(SEQUENCES)], torch.device("cpu"))
    return stacked, rows, StepPlan(plan_products(rows, packed, [0], torch.float32)), packed


def work_of(packed: PackedTokens) -> Work:
    tokens = packed.input_ids.numel()
    assert tokens == SEQUENCES * LENGTH
    return Work(
        passes=1,
        tokens=tokens,
        label_tokens=packed.label_rows.numel(),
        squares=SEQUENCES * LENGTH**2,
        rank_tokens=tokens * RANK,
        most_tokens=tokens,
    )


def width(rows: RankRows) -> int:
    return sum(rows.widths)


@pytest.mark.parametrize("name", MODELS)
def test_forward_operations_equal_those_of_a_real_row(name: str) -> None:
    stacked, rows, plan, packed = step(name)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), stacked.planned(plan), sdpa_kernel(SDPBackend.MATH), counter:
        stacked.label_losses(packed)

    expected = work_flops(costs_of(name), work_of(packed), width(rows), trains=False).total

    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_training_operations_equal_those_of_a_real_row(name: str) -> None:
    stacked, rows, plan, packed = step(name)
    counter = FlopCounterMode(display=False)
    with stacked.planned(plan), counter:
        weights = torch.ones(packed.label_rows.numel())
        stacked.label_losses(packed, weights).sum().backward()  # type: ignore[no-untyped-call]
    products = sum(
        flops
        for operation, flops in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operation)
    )

    flops = work_flops(costs_of(name), work_of(packed), width(rows), trains=True)

    # of an adapter's six products torch's counter leaves out the two that add into the gradients in place
    assert products == pytest.approx(flops.base + flops.adapters * 4 / 6, rel=0.01)
    # a count that adds gradients of the frozen weights would be half as much again
    assert products < 1.5 * flops.base * 0.95


@pytest.mark.parametrize("name", MODELS)
def test_kept_activations_equal_those_of_a_real_row(name: str) -> None:
    stacked, _, plan, packed = step(name)
    weights = {parameter.untyped_storage().data_ptr() for parameter in stacked.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with stacked.planned(plan), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = stacked.body(packed.input_ids, packed.position_ids, packed_layout=packed.layout)
        assert states.requires_grad

    expected = costs_of(name).saved_bytes * packed.input_ids.numel()

    # the row's adapter is wider than the one that is followed
    assert sum(kept.values()) == pytest.approx(expected, rel=0.03)


def test_attention_without_copies_keeps_what_the_model_made() -> None:
    """A fused projection stays whole for the sake of the values in it; grouped heads are not repeated."""
    model = on_meta(neox)
    targets = find_targets(model, ["query_key_value"])
    fused = trace_model(model, targets, copies_attention=False).saved_bytes
    copied = trace_model(model, targets, copies_attention=True).saved_bytes
    grouped = on_meta(llama)
    llama_targets = find_targets(grouped, ["q_proj", "v_proj"])

    assert fused > copied
    assert (
        trace_model(grouped, llama_targets, copies_attention=False).saved_bytes
        < trace_model(grouped, llama_targets, copies_attention=True).saved_bytes
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_a_real_model(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    empty = on_meta(llama).to(dtype)
    costs = trace_model(empty, find_targets(empty, ["q_proj", "v_proj"]))
    tensors = (*model.parameters(), *model.buffers())

    assert costs.parameter_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sorted(costs.linear_shapes) == sorted(linear_shapes(model))
    assert costs.target_bytes == 3 * (64 * 64 + 32 * 64) * dtype.itemsize


def test_the_model_is_given_back_as_it_was() -> None:
    model = on_meta(opt)
    before = [type(module) for module in model.modules()]

    trace_model(model, find_targets(model, ["q_proj"]))

    assert [type(module) for module in model.modules()] == before
    assert model.config._attn_implementation != "fedsim_traced"


def test_operations_do_not_depend_on_where_the_first_adapter_sits_by_mistake() -> None:
    """Below the first adapted module no gradient is computed."""
    model = on_meta(opt)
    targets = find_targets(model, ["q_proj", "v_proj"])
    last = dict(list(targets.items())[-2:])

    assert trace_model(model, last).backward_flops < 0.4 * trace_model(model, targets).backward_flops
    assert trace_model(model, last).saved_bytes < 0.4 * trace_model(model, targets).saved_bytes


def test_a_model_that_cannot_be_followed_is_taken_by_its_sizes() -> None:
    model = on_meta(opt)
    targets = find_targets(model, ["q_proj", "v_proj"])
    rough, exact = rough_costs(model, targets), trace_model(model, targets)

    assert rough.forward_flops == pytest.approx(exact.forward_flops, rel=0.01)
    assert rough.backward_flops == pytest.approx(exact.backward_flops, rel=0.1)
    assert rough.saved_bytes == pytest.approx(exact.saved_bytes, rel=0.6)


def test_rank_rows_take_the_bytes_of_their_tensors() -> None:
    targets = find_targets(opt(), ["q_proj", "fc1"])
    rows = RankRows(targets, [2, 5], torch.float32, torch.device("cpu"))
    optimizer = RowOptimizer(rows)
    buffers = (rows.values, rows.gradients, optimizer.first, optimizer.second)

    assert row_bytes(7, width(rows), 4) == sum(tensor.numel() * 4 for tensor in buffers)


@pytest.mark.skipif(not onednn_available(), reason="this torch has no packed linears of oneDNN")
def test_packed_weights_take_twice_the_bytes_of_linear_modules() -> None:
    model = opt().requires_grad_(False)
    shapes = linear_shapes(model)

    assert prepack_frozen_linears(model).extra_bytes == 2 * 4 * sum(o * i for o, i in shapes)
