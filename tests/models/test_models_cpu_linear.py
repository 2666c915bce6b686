"""Frozen linear modules with weights packed for oneDNN, and the rule that decides about them."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedsim.errors import ModelError
from fedsim.models import cpu_linear
from fedsim.models.base import fingerprint
from fedsim.models.cpu_linear import (
    CpuKind,
    FrozenCpuLinear,
    PackedMatrix,
    choose_cpu_linear,
    linear_shapes,
    onednn_available,
    packed_linear,
    padded_rows,
    pays,
    prepack_frozen_linears,
    read_cpu_kind,
    restore_linears,
    self_check,
)
from fedsim.models.targets import find_targets
from tests.helpers import tiny_opt

CPU = torch.device("cpu")
ZEN_3 = CpuKind("AuthenticAMD", "AVX2")
ZEN_4 = CpuKind("AuthenticAMD", "AVX512")
XEON = CpuKind("GenuineIntel", "AVX512")
LARGE = [(768, 768), (3072, 768)]
NUM_OPT_LINEARS = 2 * 6 + 1

needs_onednn = pytest.mark.skipif(not onednn_available(), reason="needs a torch with oneDNN")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frozen_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias, device="meta")
    linear.weight = nn.Parameter(random(out_features, in_features, seed=1), requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(random(out_features, seed=2), requires_grad=False)
    return linear


def frozen_opt(**changes: Any) -> nn.Module:
    return tiny_opt(**changes).requires_grad_(False)


def input_gradient(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    (x_grad,) = torch.autograd.grad(y, x, grad)
    return y.detach(), x_grad


def assert_near(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


def assert_same(linear: nn.Linear, x: Tensor) -> None:
    grad = random(*x.shape[:-1], linear.out_features, seed=4)
    y, x_grad = input_gradient(FrozenCpuLinear(linear), x, grad)
    expected, expected_grad = input_gradient(linear, x, grad)
    assert_near(y, expected)
    assert_near(x_grad, expected_grad)


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (64, 256), (256, 64), (33, 17), (1, 1)])
@pytest.mark.parametrize("shape", [(1,), (32,), (129,), (0,), (2, 5), (2, 0), (3, 1, 4), ()])
def test_output_and_input_gradient_equal_torchs(
    in_features: int, out_features: int, bias: bool, shape: tuple[int, ...]
) -> None:
    assert_same(frozen_linear(in_features, out_features, bias), random(*shape, in_features, seed=3))


@needs_onednn
@given(
    num_rows=st.integers(0, 300),
    in_features=st.integers(1, 140),
    out_features=st.integers(1, 140),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_equals_torchs(num_rows: int, in_features: int, out_features: int, bias: bool) -> None:
    assert_same(frozen_linear(in_features, out_features, bias), random(num_rows, in_features, seed=3))


@needs_onednn
@pytest.mark.parametrize(
    "view",
    [
        lambda: random(24, 6).T,
        lambda: random(2, 24, 5).transpose(1, 2),
        lambda: random(12, 48)[::2, 24:],
        lambda: random(1, 24).expand(5, 24),
        lambda: random(6, 48)[:, ::2],
    ],
    ids=["transposed", "transposed batch", "slice", "expanded", "strided"],
)
def test_any_strides_of_the_input_are_accepted(view: Any) -> None:
    assert_same(frozen_linear(24, 40), view())


@needs_onednn
def test_any_strides_of_the_gradient_are_accepted() -> None:
    linear, x = frozen_linear(24, 40), random(7, 24, seed=3)
    for grad in (torch.ones(1, 1).expand(7, 40), random(40, 7).T):
        _, x_grad = input_gradient(FrozenCpuLinear(linear), x, grad)
        assert_near(x_grad, grad @ linear.weight)


@needs_onednn
@pytest.mark.parametrize("num_threads", [1, 2])
def test_threads_change_nothing_but_rounding(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_same(frozen_linear(128, 512), random(200, 128, seed=3))
    finally:
        torch.set_num_threads(before)


@needs_onednn
def test_the_number_of_rows_may_change_from_call_to_call() -> None:
    linear = frozen_linear(64, 32)
    packed = FrozenCpuLinear(linear)
    for num_rows in (5, 300, 0, 1, 64, 5):
        x = random(num_rows, 64, seed=num_rows)
        assert_near(packed(x), linear(x))


@needs_onednn
def test_repeats_are_equal_bit_by_bit() -> None:
    packed, x, grad = FrozenCpuLinear(frozen_linear(130, 70)), random(45, 130, seed=3), random(45, 70, seed=4)
    first, again = input_gradient(packed, x, grad), input_gradient(packed, x, grad)
    anew = input_gradient(FrozenCpuLinear(frozen_linear(130, 70)), x, grad)

    for y, x_grad in (again, anew):
        assert torch.equal(first[0], y)
        assert torch.equal(first[1], x_grad)


@needs_onednn
def test_one_module_may_be_used_twice_in_a_graph() -> None:
    linear = frozen_linear(32, 32)
    x, grad = random(9, 32, seed=3), random(9, 32, seed=4)

    def twice(module: nn.Module) -> Any:
        return input_gradient(nn.Sequential(module, nn.Tanh(), module), x, grad)

    for value, expected in zip(twice(FrozenCpuLinear(linear)), twice(linear), strict=True):
        assert_near(value, expected)


@needs_onednn
def test_nothing_of_the_input_is_kept_for_the_gradient() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    packed = FrozenCpuLinear(frozen_linear(16, 24))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = packed(random(5, 16).requires_grad_())

    assert y.requires_grad
    assert kept == []


@needs_onednn
def test_gradients_of_gradients_equal_torchs() -> None:
    linear = frozen_linear(8, 12)

    def second_order(module: nn.Module) -> Tensor:
        x = random(5, 8, seed=3).requires_grad_()
        (first,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return second

    assert_near(second_order(FrozenCpuLinear(linear)), second_order(linear))


@needs_onednn
def test_checkpointing_changes_nothing() -> None:
    block = nn.Sequential(
        FrozenCpuLinear(frozen_linear(16, 24)), nn.GELU(), FrozenCpuLinear(frozen_linear(24, 16))
    )
    x, grad = random(6, 16, seed=3), random(6, 16, seed=4)
    recomputed = input_gradient(_Checkpointed(block), x, grad)

    for value, expected in zip(recomputed, input_gradient(block, x, grad), strict=True):
        assert torch.equal(value, expected)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


@needs_onednn
def test_inference_mode_and_training_mix() -> None:
    linear, x = frozen_linear(16, 24), random(6, 16, seed=3)
    with torch.inference_mode():
        packed = FrozenCpuLinear(linear)
        inside = packed(x)
    with torch.no_grad():
        assert not packed(x.clone().requires_grad_()).requires_grad

    assert_near(inside.clone(), linear(x))
    assert input_gradient(packed, x, random(6, 24))[1].shape == x.shape


@needs_onednn
def test_a_matrix_multiplies_by_its_weight_and_the_transpose() -> None:
    weight, bias, x, grad = random(40, 24), random(40, seed=1), random(7, 24, seed=2), random(7, 40, seed=3)
    matrix = PackedMatrix(weight)

    assert_near(matrix.times_weight_t(x), x @ weight.T)
    assert_near(matrix.times_weight_t(x, bias), F.linear(x, weight, bias))
    assert_near(matrix.times_weight(grad), grad @ weight)
    assert_near(packed_linear(x, matrix, bias), F.linear(x, weight, bias))
    assert matrix.extra_bytes == 2 * weight.nbytes
    assert not matrix.times_weight_t(x.requires_grad_()).requires_grad


@needs_onednn
def test_one_row_that_is_not_finite_reaches_no_other() -> None:
    packed, x, grad = FrozenCpuLinear(frozen_linear(48, 40)), random(70, 48, seed=3), random(70, 40, seed=4)
    clean = input_gradient(packed, x, grad)
    x[11], grad[11] = torch.nan, torch.inf
    others = torch.arange(70) != 11

    for value, expected in zip(input_gradient(packed, x, grad), clean, strict=True):
        assert torch.equal(value[others], expected[others])


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"model\.cpu_linear: a (weight|bias) must be float32"):
        FrozenCpuLinear(frozen_linear(8, 8).to(dtype))
    with pytest.raises(ModelError, match=r"take float32 on the CPU, got"):
        FrozenCpuLinear(frozen_linear(8, 8))(random(2, 8).to(dtype))


@needs_onednn
def test_other_devices_are_refused() -> None:
    with pytest.raises(ModelError, match=r"on the CPU and frozen to be packed, got torch\.float32 on meta"):
        FrozenCpuLinear(frozen_linear(8, 8).to("meta"))
    with pytest.raises(ModelError, match="on meta"):
        FrozenCpuLinear(frozen_linear(8, 8))(torch.empty(2, 8, device="meta"))


@needs_onednn
@pytest.mark.gpu
def test_a_gpu_is_refused() -> None:
    with pytest.raises(ModelError, match="on cuda"):
        FrozenCpuLinear(frozen_linear(8, 8).cuda())
    with pytest.raises(ModelError, match="call restore_linears first"):
        FrozenCpuLinear(frozen_linear(8, 8)).cuda()


@needs_onednn
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_learns_is_refused(name: str) -> None:
    linear = frozen_linear(8, 8)
    getattr(linear, name).requires_grad_()
    with pytest.raises(ModelError, match=rf"a {name} must be .* with a gradient"):
        FrozenCpuLinear(linear)


@needs_onednn
def test_a_packed_module_stays_in_place() -> None:
    packed = FrozenCpuLinear(frozen_linear(8, 8))
    for change in (lambda: packed.double(), lambda: packed.to(torch.bfloat16), lambda: packed.to("meta")):
        with pytest.raises(ModelError, match="call restore_linears first"):
            change()

    assert packed.to("cpu", torch.float32) is packed
    assert packed.weight.dtype == torch.float32


@needs_onednn
def test_loading_a_state_dict_packs_anew() -> None:
    packed, other = FrozenCpuLinear(frozen_linear(8, 12)), frozen_linear(8, 12)
    other.weight.mul_(-2.0)
    packed.load_state_dict(other.state_dict())
    x = random(3, 8, seed=3)

    assert_near(packed(x), other(x))


def logits_and_input_gradient(model: nn.Module) -> tuple[Tensor, Tensor]:
    embeddings = random(2, 9, model.get_input_embeddings().embedding_dim, seed=5).requires_grad_()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    logits = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.arange(18) % 64)
    return logits.detach(), torch.autograd.grad(loss, embeddings)[0]


@needs_onednn
@pytest.mark.parametrize("changes", [{}, {"word_embed_proj_dim": 8, "do_layer_norm_before": False}])
def test_a_whole_model_computes_the_same(changes: dict[str, Any]) -> None:
    model = frozen_opt(**changes)
    expected = logits_and_input_gradient(model)
    report = prepack_frozen_linears(model)
    packed = [module for module in model.modules() if isinstance(module, FrozenCpuLinear)]

    for value, wanted in zip(logits_and_input_gradient(model), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert report.num_modules == len(packed) == NUM_OPT_LINEARS + (2 if changes else 0)
    assert report.extra_bytes == sum(2 * module.weight.nbytes for module in packed)


@needs_onednn
def test_lora_factors_get_the_same_gradients() -> None:
    model = frozen_opt()

    def gradients() -> list[Tensor]:
        A, B = random(2, 16, seed=6).requires_grad_(), random(16, 2, seed=7).requires_grad_()

        def add(_module: nn.Module, args: Any, y: Tensor) -> Tensor:
            return y + (args[0] @ A.T) @ B.T

        paths = list(find_targets(model, ["q_proj", "v_proj"]))
        hooks = [model.get_submodule(path).register_forward_hook(add) for path in paths]
        logits = model(input_ids=torch.arange(3, 23).view(2, 10), use_cache=False).logits
        grads = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), torch.arange(20)), [A, B])
        for hook in hooks:
            hook.remove()
        return list(grads)

    expected = gradients()
    prepack_frozen_linears(model)

    for value, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@needs_onednn
def test_the_tied_head_stays_tied_and_names_stay() -> None:
    model = frozen_opt()
    names, mark, targets = list(model.state_dict()), fingerprint(model), find_targets(model, ["q_proj"])
    prepack_frozen_linears(model)

    assert isinstance(model.get_output_embeddings(), FrozenCpuLinear)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert list(model.state_dict()) == names
    assert fingerprint(model) == mark
    assert find_targets(model, ["q_proj"]) == targets


@needs_onednn
def test_restored_linears_are_the_original_ones_bit_by_bit() -> None:
    model = frozen_opt()
    parameters, expected = dict(model.named_parameters()), logits_and_input_gradient(model)
    generator_state = torch.get_rng_state()
    prepack_frozen_linears(model)
    num_restored = restore_linears(model)

    assert num_restored == NUM_OPT_LINEARS
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert not any(isinstance(module, FrozenCpuLinear) for module in model.modules())
    for value, wanted in zip(logits_and_input_gradient(model), expected, strict=True):
        assert torch.equal(value, wanted)


@needs_onednn
def test_a_copied_model_is_packed_and_tied_too() -> None:
    model = frozen_opt()
    prepack_frozen_linears(model)
    twin = copy.deepcopy(model)

    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert twin.get_output_embeddings().weight is not model.get_output_embeddings().weight
    assert twin.get_output_embeddings().packed.weight is twin.get_input_embeddings().weight
    assert torch.equal(logits_and_input_gradient(twin)[0], logits_and_input_gradient(model)[0])


@needs_onednn
def test_skipped_paths_stay_plain() -> None:
    model = frozen_opt()
    report = prepack_frozen_linears(model, skip=["lm_head"])

    assert report.num_modules == NUM_OPT_LINEARS - 1
    assert type(model.get_output_embeddings()) is nn.Linear
    assert prepack_frozen_linears(model).num_modules == 1


@needs_onednn
def test_an_unknown_path_to_skip_is_refused() -> None:
    with pytest.raises(ModelError, match="'head' is to be skipped, but it is no linear module"):
        prepack_frozen_linears(frozen_opt(), skip=["head"])


@needs_onednn
def test_nothing_is_replaced_if_one_module_cannot_be() -> None:
    model = frozen_opt()
    model.get_output_embeddings().weight.requires_grad_()
    with pytest.raises(ModelError, match="with a gradient"):
        prepack_frozen_linears(model)

    assert not any(isinstance(module, FrozenCpuLinear) for module in model.modules())


@needs_onednn
def test_a_shared_module_is_packed_once_and_subclasses_stay() -> None:
    class Special(nn.Linear):
        pass

    shared = frozen_linear(8, 8)
    model = nn.Sequential(shared, nn.Sequential(shared), Special(8, 8)).requires_grad_(False)
    shapes = linear_shapes(model)
    report = prepack_frozen_linears(model)

    assert shapes == [(8, 8)]
    assert report.num_modules == 1
    assert model[0] is model[1][0]
    assert type(model[2]) is Special
    assert restore_linears(model) == 1
    assert model[0] is model[1][0]


def test_shapes_are_read_without_weights() -> None:
    with torch.device("meta"):
        model = tiny_opt()

    assert sorted(set(linear_shapes(model))) == [(16, 16), (16, 32), (32, 16), (64, 16)]
    assert len(linear_shapes(model)) == NUM_OPT_LINEARS
    assert (64, 16) not in linear_shapes(model, skip=["lm_head"])


@needs_onednn
def test_this_torch_passes_the_self_check() -> None:
    assert self_check()


@pytest.fixture
def without_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())


def broken_operations(kind: str) -> SimpleNamespace:
    def changed_signature(x: Tensor) -> Tensor:
        return x

    def wrong_values(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return F.linear(x, weight, bias) * 1.0001

    def refusing(*arguments: Any) -> Tensor:
        raise RuntimeError("could not create a primitive")

    product = {"signature": changed_signature, "values": wrong_values, "error": refusing}[kind]
    return SimpleNamespace(_reorder_linear_weight=lambda weight: weight, _linear_pointwise=product)


@pytest.mark.usefixtures("without_operations")
def test_missing_operations_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    assert not onednn_available()
    assert not self_check()
    with caplog.at_level(logging.WARNING):
        assert not choose_cpu_linear("auto", CPU, torch.float32, LARGE, ZEN_4)
    assert [record.levelname for record in caplog.records if record.levelno > logging.DEBUG] == ["WARNING"]
    assert "which torch" in caplog.text
    with pytest.raises(ModelError, match=r"model\.cpu_linear=onednn needs a torch with oneDNN"):
        choose_cpu_linear("onednn", CPU, torch.float32, LARGE, ZEN_4)


@pytest.mark.parametrize("kind", ["signature", "values", "error"])
def test_changed_operations_are_noticed(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", broken_operations(kind))
    monkeypatch.setattr(cpu_linear, "onednn_available", lambda: True)

    assert not self_check()
    with caplog.at_level(logging.WARNING):
        assert not choose_cpu_linear("auto", CPU, torch.float32, LARGE, ZEN_4)
    assert [record.levelname for record in caplog.records if record.levelno > logging.DEBUG] == ["WARNING"]
    with pytest.raises(ModelError, match="failed the self-check"):
        choose_cpu_linear("onednn", CPU, torch.float32, LARGE, ZEN_4)


@pytest.mark.usefixtures("without_operations")
@pytest.mark.parametrize("cpu", [XEON, ZEN_3])
def test_no_warning_where_packing_would_not_pay(cpu: CpuKind, caplog: pytest.LogCaptureFixture) -> None:
    assert not choose_cpu_linear("auto", CPU, torch.float32, LARGE, cpu)
    assert caplog.records == []


@pytest.fixture
def oneDNN_switched_off() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


@pytest.mark.usefixtures("oneDNN_switched_off")
def test_onednn_that_is_switched_off_is_not_used() -> None:
    assert not onednn_available()


@needs_onednn
@pytest.mark.parametrize(
    ("wanted", "shapes", "cpu", "expected"),
    [
        ("torch", LARGE, ZEN_4, False),
        ("onednn", [(8, 8)], XEON, True),
        ("auto", LARGE, ZEN_4, True),
        ("auto", LARGE, ZEN_3, False),
        ("auto", LARGE, XEON, False),
        ("auto", [(128, 128)], ZEN_4, False),
        ("auto", [], ZEN_4, False),
    ],
)
def test_the_choice_follows_the_rule(wanted: Any, shapes: Any, cpu: CpuKind, expected: bool) -> None:
    assert choose_cpu_linear(wanted, CPU, torch.float32, shapes, cpu) is expected


@pytest.mark.parametrize("num_rows", [0, 1, 7, 8, 9, 63, 64, 65, 100, 1000, 1024, 2047, 2048])
def test_few_lengths_are_given_to_onednn(num_rows: int) -> None:
    padded = padded_rows(num_rows)
    assert num_rows <= padded <= max(num_rows + 7, num_rows * 9 / 8)
    assert padded_rows(padded) == padded
    assert len({padded_rows(rows) for rows in range(1025, 2049)}) == 8


@needs_onednn
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (48,), (9, 48), (100, 48), (3, 67, 48)])
def test_rows_that_are_added_do_not_show(shape: tuple[int, ...]) -> None:
    weight, bias = torch.randn(32, 48), torch.randn(32)
    x = torch.randn(shape)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    product = PackedMatrix(weight).times_weight_t(x, bias)
    assert product.shape == expected.shape
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=1e-4)


def test_half_of_the_weights_must_lie_in_large_matrices() -> None:
    small, large = (128, 128), (512, 512)

    assert pays([large] + 16 * [small], ZEN_4)
    assert not pays([large] + 17 * [small], ZEN_4)


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("cuda", torch.float32, "needs the base on a CPU, got device cuda"),
        ("cpu", torch.float64, "needs model.dtype=float32, got float64"),
        ("cpu", torch.bfloat16, "needs model.dtype=float32, got bfloat16"),
    ],
)
def test_the_impossible_is_refused_or_left(device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(
        ModelError, match=f"model.cpu_linear=onednn {message}; set model.cpu_linear=auto or torch"
    ):
        choose_cpu_linear("onednn", torch.device(device), dtype, LARGE, ZEN_4)

    assert not choose_cpu_linear("auto", torch.device(device), dtype, LARGE, ZEN_4)
    assert not choose_cpu_linear("torch", torch.device(device), dtype, LARGE, ZEN_4)


def test_the_cpu_is_read_as_linux_describes_it(tmp_path: Path) -> None:
    described = tmp_path / "cpuinfo"
    described.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nvendor_id\t: Other\n"
    )
    capability = torch.backends.cpu.get_cpu_capability()

    assert read_cpu_kind(described) == CpuKind("AuthenticAMD", capability)
    assert read_cpu_kind(tmp_path / "missing") == CpuKind("", capability)
    assert choose_cpu_linear("auto", CPU, torch.float32, LARGE) is choose_cpu_linear(
        "auto", CPU, torch.float32, LARGE, read_cpu_kind()
    )
