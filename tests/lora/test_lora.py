"""Factors, the initial adapter, payloads and PEFT's format."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.payload import pickled_payload_mib
from fedsim.lora.peft_format import load_peft_adapter, save_peft_adapter
from fedsim.models.adapted import AdaptedModel
from fedsim.models.targets import find_targets
from tests.helpers import tiny_opt

SHAPES = {"layers.0.q_proj": (16, 8), "layers.1.v_proj": (12, 16)}


def random_adapter(rank: int = 3, use_rslora: bool = False) -> AdapterState:
    generator = torch.Generator().manual_seed(1)
    start = initial_adapter(SHAPES, dict.fromkeys(SHAPES, rank), ScalingRule(16.0, use_rslora), 0)
    return AdapterState(
        {
            m: LoraFactors(f.A, torch.randn(f.B.shape, generator=generator), f.scaling)
            for m, f in start.items()
        }
    )


def test_factors_of_two_ranks_are_refused():
    with pytest.raises(AdapterError, match="one rank r"):
        LoraFactors(torch.zeros(2, 5), torch.zeros(4, 3), 1.0)


def test_delta_weight_includes_the_scaling():
    factors = LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 8.0)
    assert torch.equal(factors.delta_weight(), torch.full((4, 3), 16.0))
    assert factors.num_parameters == 14
    assert factors.num_bytes == 56


def test_scaling():
    assert ScalingRule(16)(4) == 4
    assert ScalingRule(16, use_rslora=True)(4) == 8


def test_initial_adapter_is_pefts_draw_and_computes_nothing():
    adapter = initial_adapter({"m": (400, 30)}, dict.fromkeys({"m": (400, 30)}, 8), ScalingRule(16.0), 0)
    a = adapter["m"].A
    bound = 1 / math.sqrt(400)
    assert float(a.abs().max()) <= bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), "uniform, as PEFT's Kaiming draw"
    assert not adapter["m"].B.any()
    peft = torch.empty(8, 400)
    torch.nn.init.kaiming_uniform_(peft, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert float(a.std()) == pytest.approx(float(peft.std()), rel=0.05)


def test_initial_adapter_depends_on_seed_and_module_alone():
    both = initial_adapter(SHAPES, dict.fromkeys(SHAPES, 2), ScalingRule(16.0), 4)
    one = initial_adapter(
        {"layers.1.v_proj": (12, 16)}, dict.fromkeys({"layers.1.v_proj": (12, 16)}, 2), ScalingRule(16.0), 4
    )
    assert torch.equal(both["layers.1.v_proj"].A, one["layers.1.v_proj"].A)
    assert not torch.equal(
        both["layers.1.v_proj"].A,
        initial_adapter(SHAPES, dict.fromkeys(SHAPES, 2), ScalingRule(16.0), 5)["layers.1.v_proj"].A,
    )


def test_modules_of_one_shape_start_from_different_draws():
    shapes = {"layers.0.q_proj": (400, 30), "layers.0.v_proj": (400, 30), "layers.1.q_proj": (400, 30)}
    adapter = initial_adapter(shapes, dict.fromkeys(shapes, 8), ScalingRule(16.0), 0)
    draws = torch.stack([factors.A.flatten() for factors in adapter.values()])
    between = torch.corrcoef(draws)[~torch.eye(3, dtype=torch.bool)]
    assert float(between.abs().max()) < 5 / math.sqrt(8 * 400), "independent draws"


def test_a_rank_above_a_modules_smaller_side_is_refused():
    with pytest.raises(AdapterError, match=r"lora\.rank must be at most 8.*layers\.0\.q_proj.*got 9"):
        initial_adapter(SHAPES, dict.fromkeys(SHAPES, 9), ScalingRule(16.0), 0)


@pytest.mark.parametrize(
    ("hidden", "layers", "raw_bytes", "mib"),
    [(768, 12, 294_912, 0.30), (1024, 24, 786_432, 0.78), (2048, 24, 1_572_864, 1.53)],
    ids=["opt-125m", "opt-350m", "opt-1.3b"],
)
def test_communication_cost_of_cllora_table_1(hidden, layers, raw_bytes, mib):
    """arXiv 2502.18910, Table 1: rank 2 on q_proj and v_proj; the paper rounds to two decimals."""
    shapes = {
        f"model.decoder.layers.{layer}.self_attn.{name}": (hidden, hidden)
        for layer in range(layers)
        for name in ("v_proj", "q_proj")
    }
    adapter = initial_adapter(shapes, dict.fromkeys(shapes, 2), ScalingRule(16.0), 0)
    assert adapter.num_bytes == raw_bytes
    assert adapter.num_bytes == 4 * adapter.num_parameters
    assert pickled_payload_mib(adapter) == pytest.approx(mib, abs=0.01)


def test_communication_cost_does_not_depend_on_where_the_factors_lie_in_memory():
    adapter = random_adapter()
    flat = torch.cat([factor.reshape(-1) for pair in adapter.values() for factor in (pair.A, pair.B)])
    start = 0
    views = {}
    for module, pair in adapter.items():
        middle, end = start + pair.A.numel(), start + pair.num_parameters
        views[module] = LoraFactors(
            flat[start:middle].view_as(pair.A), flat[middle:end].view_as(pair.B), pair.scaling
        )
        start = end
    big = torch.zeros(2**22)  # memory from elsewhere, whose addresses have another number of digits
    elsewhere = adapter.map(lambda factor: big[: factor.numel()].view_as(factor).copy_(factor))
    sizes = {pickled_payload_mib(copy) for copy in (adapter, AdapterState(views), elsewhere)}
    assert len(sizes) == 1


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_format_round_trip(use_rslora, tmp_path):
    adapter = random_adapter(use_rslora=use_rslora)
    save_peft_adapter(adapter, tmp_path, "some/base", ["q_proj", "v_proj"], 0.05)
    loaded = load_peft_adapter(tmp_path)
    assert set(loaded) == set(adapter)
    for module, factors in adapter.items():
        assert torch.equal(loaded[module].A, factors.A)
        assert torch.equal(loaded[module].B, factors.B)
        assert loaded[module].scaling == pytest.approx(factors.scaling, rel=1e-12)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    )
    assert all(
        name.startswith("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")
    )


RAGGED = (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("ranks", "scalings"),
    [
        ((3, 3, 3, 3), [16 / 3] * 4),
        (RAGGED, [16 / rank for rank in RAGGED]),
        (RAGGED, [16 / rank**0.5 for rank in RAGGED]),
        (RAGGED, [1.0] * 4),
    ],
    ids=["one-rank", "ragged", "ragged-rslora", "ragged-unscaled"],
)
def test_peft_computes_the_same_logits_from_the_export(ranks, scalings, tmp_path):
    """One lora_alpha says what `lora_alpha / rank` scales; else each module needs its own."""
    from peft import PeftModel

    base = tiny_opt()
    targets = find_targets(base, ["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(2)
    adapter = AdapterState(
        {
            module: LoraFactors(
                torch.randn(rank, i, generator=generator),
                torch.randn(o, rank, generator=generator),
                scaling,
            )
            for (module, (i, o)), rank, scaling in zip(targets.items(), ranks, scalings, strict=True)
        }
    )
    save_peft_adapter(adapter, tmp_path, "base", ["q_proj", "v_proj"])
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    peft = PeftModel.from_pretrained(tiny_opt(), str(tmp_path)).eval()
    model = AdaptedModel(base, targets, torch.device("cpu"))
    plain = model.logits(ids, mask)
    model.load(adapter)
    with torch.no_grad():
        ours, theirs = model.logits(ids, mask), peft(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert float((ours - plain).abs().max()) > 0.1, "the adapter must do something"
    model.load(None)
    assert torch.equal(model.logits(ids, mask), plain)


def test_what_is_not_a_lora_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        load_peft_adapter(tmp_path)
    save_peft_adapter(random_adapter(), tmp_path, "base", ["q_proj"])
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError, match="not a readable PEFT adapter"):
        load_peft_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    save = random_adapter()
    from safetensors.torch import save_file

    save_file({"x": save["layers.0.q_proj"].A}, weights)
    with pytest.raises(AdapterError, match="plain LoRA"):
        load_peft_adapter(tmp_path)
