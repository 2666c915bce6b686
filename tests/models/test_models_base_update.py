"""The base's weights follow the server's update, and depend on nothing else."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsim.config.loader import load_config
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.models.base import build_base
from fedsim.models.base_update import UpdatableBase
from fedsim.models.merged import save_merged_model
from fedsim.models.targets import find_targets
from tests.helpers import tiny_opt, word_tokenizer


def update(targets: dict, rank: int, seed: int, size: float = 0.01) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            path: LoraFactors(
                size * torch.randn(rank, i, generator=generator),
                torch.randn(o, rank, generator=generator),
                0.5,
            )
            for path, (i, o) in targets.items()
        }
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_those_that_were_loaded_plus_the_update(dtype):
    model = tiny_opt(dtype)
    targets = find_targets(model, ["q_proj", "fc2"])
    loaded = {path: model.get_parameter(f"{path}.weight").clone() for path in targets}
    base = UpdatableBase(model, targets)
    base.apply(None)
    assert all(torch.equal(model.get_parameter(f"{path}.weight"), loaded[path]) for path in targets)
    for seed in range(3):
        base.apply(update(targets, 2, seed))  # several in a row: only the last one counts
    for path, factors in update(targets, 2, 2).items():
        wide = torch.promote_types(torch.float32, dtype)
        expected = (loaded[path].to(wide) + 0.5 * factors.B.to(wide) @ factors.A.to(wide)).to(dtype)
        assert torch.equal(model.get_parameter(f"{path}.weight"), expected)
    others = [name for name, _ in model.named_parameters() if name.removesuffix(".weight") not in targets]
    fresh = tiny_opt(dtype)
    assert all(torch.equal(model.get_parameter(name), fresh.get_parameter(name)) for name in others)
    base.apply(None)
    assert all(torch.equal(model.get_parameter(f"{path}.weight"), loaded[path]) for path in targets)


def test_the_way_to_an_update_leaves_no_trace_in_the_bits():
    """In float32, adding twice rounds twice; a run that was resumed would differ from one that was not."""
    one, other = tiny_opt(), tiny_opt()
    targets = find_targets(one, ["v_proj"])
    straight, winding = UpdatableBase(one, targets), UpdatableBase(other, targets)
    last = update(targets, 3, seed=9)
    straight.apply(last)
    for seed in range(5):
        winding.apply(update(targets, 2, seed, size=3.0))
    winding.apply(last)
    for path in targets:
        assert torch.equal(one.get_parameter(f"{path}.weight"), other.get_parameter(f"{path}.weight"))


def test_a_merged_model_computes_what_base_and_adapter_compute(tmp_path):
    from peft import PeftModel

    from fedsim.lora.peft_format import save_peft_adapter

    folder, merged, adapter_folder = tmp_path / "base", tmp_path / "merged", tmp_path / "adapter"
    tiny_opt().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    config = load_config(None, [f"model.name_or_path={folder}", "model.dtype=float32"]).model
    adapter = update(find_targets(tiny_opt(), ["q_proj", "fc1"]), 2, 1, size=0.3)
    for path in (merged, adapter_folder):
        path.mkdir()
    save_merged_model(build_base(config, "cpu"), adapter, merged)
    save_peft_adapter(adapter, adapter_folder, str(folder), ["q_proj", "fc1"])
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter_folder)(
            ids
        ).logits
        plain = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)
