"""A base in 8 or 4 bits against a plain one with the dequantized weights."""

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.config.loader import load_config
from fedsim.errors import ModelError
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.lora.plan import ClientPlan
from fedsim.models.adapted import AdaptedModel
from fedsim.models.base import build_base, fingerprint, load_frozen
from fedsim.models.generate import GreedyGenerator
from fedsim.models.pack_check import alone_logits, packing_problem
from fedsim.models.quantized import QuantizedLinear, check_available, weight_bytes
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import Pack
from tests.helpers import make_store, random_texts, tiny_opt, word_tokenizer
from tests.training.test_packed import (
    CPU,
    DIFFERENT,
    PAD,
    assert_same,
    clients,
    starts_for,
    train_packed,
    train_sequential,
    worst_difference,
)

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="the optional package bitsandbytes is not installed"
)
SIZES: dict[str, Any] = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
TARGETS = ("q_proj", "v_proj", "fc1")
KINDS = ["int8", "nf4", "fp4"]
NUM_LINEAR = 12


@pytest.fixture(scope="module")
def store() -> Any:
    return make_store(random_texts(40, seed=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    model: Any = tiny_opt(**SIZES)
    model.save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


def quantized(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = load_frozen(
        folder, "test", dtype, allow_pickle=False, trust_remote_code=False, quantization=kind, device=CPU
    )
    return model


def dequantized(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A plain model whose weights are looked up and scaled here, without bitsandbytes' kernels."""
    source = quantized(folder, kind, dtype)
    plain = tiny_opt(**SIZES)
    plain.load_state_dict(
        load_frozen(folder, "t", torch.float32, allow_pickle=False, trust_remote_code=False).state_dict()
    )
    plain.requires_grad_(False)
    for path, module in source.named_modules():
        if isinstance(module, QuantizedLinear):
            shape = (module.out_features, module.in_features)
            codes = module.weight
            if kind == "int8":
                weight = codes.double() * module.scales.double()[:, None] / 127
            else:
                both = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), dim=1).flatten().long()
                values = module.codebook.double()[both].view(-1, 64) * module.scales.double()[:, None]
                weight = values.reshape(shape)
            linear = plain.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            assert weight.shape == linear.weight.shape
            largest = float(linear.weight.abs().max())
            error = float((weight - linear.weight).abs().max())
            assert 0 < error < (0.01 if kind == "int8" else 0.4) * largest
            linear.weight.copy_(weight)
    return plain.to(dtype)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_modules_but_the_head(kind, folder):
    model = quantized(folder, kind)
    small = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(small) == NUM_LINEAR
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    assert type(head) is nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    for module in small:
        held = sum(t.numel() * t.element_size() for t in (module.weight, module.scales))
        assert held == weight_bytes(kind, module.out_features, module.in_features)
        assert held < (0.3 if kind == "int8" else 0.15) * 4 * module.out_features * module.in_features
    assert find_targets(model, TARGETS) == find_targets(tiny_opt(**SIZES), TARGETS)
    assert fingerprint(model) == fingerprint(quantized(folder, kind))
    assert fingerprint(model) != fingerprint(quantized(folder, "fp4" if kind == "nf4" else "nf4"))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", [train_packed, train_sequential])
def test_clients_learn_what_they_would_on_dequantized_weights(trainer, kind, folder, store):
    starts = starts_for(tiny_opt(**SIZES), TARGETS, torch.float32)
    jobs = clients(store, tuple(replace(settings, lora_dropout=0.3) for settings in DIFFERENT))
    plain = trainer(dequantized(folder, kind), TARGETS, jobs, starts, store)
    small = trainer(quantized(folder, kind), TARGETS, jobs, starts, store)
    full = trainer(quantized(folder, "none"), TARGETS, jobs, starts, store)
    moved = max(worst_difference(u.adapter, s) for u, s in zip(small, starts, strict=True))
    assert moved > 1e-2
    for mine, theirs in zip(small, plain, strict=True):
        assert mine.report.train_loss_mean == pytest.approx(theirs.report.train_loss_mean, abs=1e-5)
    assert (
        max(
            abs(a.report.train_loss_mean - b.report.train_loss_mean) for a, b in zip(small, full, strict=True)
        )
        > 1e-4
    )


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_gradients(kind, dtype, folder):
    """One module, forward and backward, with and without a gradient, and the bits do not change in between."""
    model, plain = quantized(folder, kind, dtype), dequantized(folder, kind, dtype)
    path = "model.decoder.layers.1.fc2"
    module, linear = model.get_submodule(path), plain.get_submodule(path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, SIZES["ffn_dim"], generator=generator).to(dtype).requires_grad_()
    outer = torch.randn(7, SIZES["hidden_size"], generator=generator).to(dtype)
    y, expected = module(x), linear(x)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(y, x, outer)
    (wanted,) = torch.autograd.grad(expected, x, outer)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(module(x), y)
        torch.testing.assert_close(module(x[:1]), y[:1], rtol=tolerance, atol=tolerance)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_a_clients_result_does_not_depend_on_its_neighbours(kind, folder, store):
    """In the types of a plain base; LLM.int8's search for outliers in the whole row would break it."""
    starts = starts_for(tiny_opt(**SIZES), TARGETS, torch.float32)
    jobs = clients(store)
    together = train_packed(quantized(folder, kind), TARGETS, jobs, starts, store)
    alone = train_packed(quantized(folder, kind), TARGETS, jobs[1:2], starts[1:2], store)
    assert_same(together[1:2], alone, 2e-4)


@needs_bitsandbytes
def test_the_packages_own_8_bit_product_would_mix_clients(folder):
    """Why its modules are replaced: one token's outlier changes another token's output."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    source = tiny_opt(**SIZES).get_submodule("model.decoder.layers.0.fc1")
    assert isinstance(source, nn.Linear)
    theirs = Linear8bitLt(64, 128, has_fp16_weights=False, threshold=6.0)
    theirs.weight = Int8Params(source.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    theirs.bias = source.bias
    theirs = theirs.to("cpu").eval()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 64, generator=generator)
    loud = rows.clone()
    loud[1, 3] = 50.0
    ours = QuantizedLinear(theirs)
    with torch.no_grad():
        assert torch.equal(ours(loud)[0], ours(rows)[0])
        change = float((theirs(loud.half())[0] - theirs(rows.half())[0]).abs().max())
    assert change > 1e-4


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_engines_tests_and_answers(kind, folder, store):
    starts = starts_for(tiny_opt(**SIZES), TARGETS, torch.float32)
    targets = find_targets(tiny_opt(**SIZES), TARGETS)
    parts = [np.arange(6, dtype=np.int64), np.arange(6, 9, dtype=np.int64)]
    prompts = [store.sequence(example).astype(np.int64) for example in range(3)]
    model = quantized(folder, kind)
    alone = alone_logits(model, CPU, 32)
    stacked = StackedModel(model, targets, CPU, checkpoint_gradients=True)
    assert packing_problem(stacked, alone, 32) is None
    plain = AdaptedModel(dequantized(folder, kind), targets, CPU)
    expected = PaddedScorer(plain, PAD).losses(starts[:2], store, parts)
    for scorer in (
        PackedScorer(stacked),
        PaddedScorer(AdaptedModel(quantized(folder, kind), targets, CPU), PAD),
    ):
        for mine, theirs in zip(scorer.losses(starts[:2], store, parts), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    answers = GreedyGenerator(stacked, PAD, ()).answers(starts[0], [prompts], 4)
    wanted = GreedyGenerator(plain, PAD, ()).answers(starts[0], [prompts], 4)
    for one, other in zip(answers[0], wanted[0], strict=True):
        np.testing.assert_array_equal(one, other)
    jobs = clients(store)[:2]
    trainer = PackedTrainer(stacked, store, 2, 10_000, False, process_rank=0)
    checkpointed = trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts[:2]], round_index=1)
    kept = train_packed(quantized(folder, kind), TARGETS, jobs, starts[:2], store)
    assert_same(checkpointed, kept, 0)


@needs_bitsandbytes
def test_a_base_as_configured(folder):
    config = load_config(
        None, [f"model.name_or_path={folder}", "model.quantization=nf4", "model.dtype=bfloat16"]
    )
    base = build_base(config.model, "cpu")
    assert base.dtype == torch.bfloat16
    assert isinstance(base.model.get_submodule("model.decoder.layers.0.fc1"), QuantizedLinear)
    assert not any(hasattr(module, "_hf_hook") for module in base.model.modules())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("fedsim.models.quantized.find_spec", lambda name: None)
    check_available("none")
    with pytest.raises(ModelError, match=r"pip install 'fedsim\[quantization\]'") as raised:
        check_available("nf4")
    assert "\n" not in str(raised.value)
    config = load_config(None, ["model.quantization=int8"])
    with pytest.raises(ModelError, match=r"model\.quantization=int8 needs the package bitsandbytes"):
        build_base(config.model, "cpu")
