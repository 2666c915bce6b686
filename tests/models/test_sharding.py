"""A base that is split over processes: the same adapters, and no process that holds it whole."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsim.comm.group import SoloGroup
from fedsim.comm.sharding import ShardingGroup
from fedsim.errors import ConfigError, ModelError
from fedsim.models.memory_limit import check_memory
from tests.faults.harness import start
from tests.helpers import random_texts, tiny_opt, word_tokenizer

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'fedsim[deepspeed]'"
)

SIZES = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a corpus."""
    folder = tmp_path_factory.mktemp("sharding")
    tiny_opt(**SIZES).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [json.dumps({"text": text}) for text in random_texts(160)]
    (folder / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def run(inputs: Path, world_size: int, name: str, *changes: str) -> Path:
    """Two rounds of five clients in three packs of unequal length; the run folder."""
    settings: dict[str, Any] = {
        "run.output_dir": inputs / "runs",
        "run.name": name,
        "run.rounds": 2,
        "data.source": inputs / "texts.jsonl",
        "data.max_tokens": 24,
        "model.name_or_path": inputs / "model",
        "model.cpu_linear": "torch",
        "data.partition.name": "quantity_skew",
        "data.partition.num_clients": 5,
        "data.partition.num_length_classes": 3,
        "cohort.size": 5,
        "lora.dropout": 0.1,
        "training.batch_size": 3,
        # not AdamW, which makes a step of full length of a gradient that is rounding noise around 0
        "training.optimizer.name": "sgd",
        "training.optimizer.lr": 0.5,
        "training.pack.num_packs": 3,
        "comm.timeout_s": 120,
        "tracking.wandb.mode": "disabled",
        "tracking.progress": "off",
    }
    given = {change.partition("=")[0] for change in changes}
    command = [f"{key}={value}" for key, value in settings.items() if key not in given]
    ranks = start([*command, *changes], world_size, inputs).wait(240.0)
    assert [ended.code for ended in ranks] == [0] * world_size, [ended.errors for ended in ranks]
    return inputs / "runs" / name


def largest_difference(one: Path, other: Path) -> float:
    first, second = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["test/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(inputs: Path) -> Path:
    """The run on an unsharded base."""
    return run(inputs, 1, "whole")


@needs_deepspeed
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, []),
        (4, ["model.sharding_group_size=2", "run.rounds=1"]),  # a rank has no pack
        (2, ["training.gradient_checkpointing=true"]),
    ],
)
def test_the_adapters_are_those_of_the_whole_base(
    world_size: int, changes: list[str], inputs: Path, whole: Path
) -> None:
    name = f"sharded-{world_size}-{len(changes)}-{'checkpointing' in str(changes)}"
    sharded = run(inputs, world_size, name, "model.sharding=zero3", *changes)
    if "run.rounds=1" in changes:
        whole = run(inputs, 1, "whole-1", "run.rounds=1")

    assert largest_difference(whole, sharded) < 2e-6
    assert losses(sharded) == pytest.approx(losses(whole), abs=1e-5)


@needs_deepspeed
def test_adapters_that_were_averaged_over_the_ranks_would_show(inputs: Path, whole: Path) -> None:
    """What a distributed optimizer does to gradients: here, as if each client had seen another one's data too."""
    other = run(inputs, 1, "other-data", "run.seed=1")
    assert largest_difference(whole, other) > 1e-3


@needs_deepspeed
def test_mixed_strategies_and_sides(inputs: Path) -> None:
    """FFA-LoRA trains B alone, FlexLoRA different ranks."""
    for number, changes in enumerate(
        (["strategy.name=ffa"], ["strategy.name=flexlora", "lora.tiers=[{rank: 2}, {rank: 4}]"])
    ):
        plain = run(inputs, 1, f"plain-{number}", *changes)
        sharded = run(inputs, 2, f"split-{number}", *changes, "model.sharding=zero3")
        assert losses(sharded) == pytest.approx(losses(plain), abs=2e-5)


@needs_deepspeed
def test_an_error_on_one_rank_ends_all(inputs: Path) -> None:
    """Between two passes: the others are not left waiting for a pass that will not come."""
    from tests.faults.harness import Injection

    command = [
        f"run.output_dir={inputs / 'runs'}", "run.name=hurt", "run.rounds=2", f"data.source={inputs / 'texts.jsonl'}",
        f"model.name_or_path={inputs / 'model'}", "data.max_tokens=24", "data.partition.num_clients=5",
        "data.partition.num_length_classes=3", "cohort.size=5", "training.pack.num_packs=4", "comm.timeout_s=60",
        "tracking.wandb.mode=disabled", "tracking.progress=off", "model.sharding=zero3", "training.batch_size=3",
    ]  # fmt: skip
    broken = Injection("fedsim.training.packed:client_report", "raise", rank=1, call=1)
    ranks = start(command, 2, inputs, [broken]).wait(100.0)
    assert all(ended.code not in (0, None) for ended in ranks), ranks
    assert "rank 1" in ranks[0].errors


def limit(most_gib: float, dtype: torch.dtype = torch.float32, size: int = 1, bits: Any = "none") -> None:
    check_memory(tiny_opt(**SIZES), "m", dtype, bits, most_gib, size)


def test_a_base_over_the_limit_is_refused_with_advice() -> None:
    whole_gib = sum(p.numel() for p in tiny_opt(**SIZES).parameters()) * 4 / 2**30
    limit(whole_gib * 1.01)
    limit(whole_gib * 0.51, size=2)
    limit(whole_gib * 0.51, torch.bfloat16)
    with pytest.raises(
        ModelError, match=r"model\.max_memory_gib=.*model\.sharding=zero3 and start at least 2 "
    ):
        limit(whole_gib * 0.51)
    with pytest.raises(ModelError, match="start at least 5 processes"):
        limit(whole_gib * 0.21, size=2)


def test_the_limit_counts_quantized_weights_in_their_bits() -> None:
    model = tiny_opt(**SIZES)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    quantized = sum(m.weight.numel() for m in linears)
    rest = sum(p.numel() for p in model.parameters()) - quantized
    scales = sum(m.out_features for m in linears)
    needed_gib = (4 * rest + quantized + 4 * scales) / 2**30  # int8: a byte a weight and a scale a row
    limit(needed_gib * 1.0001, bits="int8")
    with pytest.raises(ModelError, match=r"with model\.quantization=int8, more than model\.max_memory_gib"):
        limit(needed_gib * 0.9999, bits="int8")


@pytest.fixture(scope="module")
def large(inputs: Path) -> Path:
    """A folder with a base of 300 MB, and the corpus of `inputs`."""
    folder = inputs / "large"
    tiny_opt(
        hidden_size=1024, word_embed_proj_dim=1024, ffn_dim=4096, num_hidden_layers=6, num_attention_heads=8
    ).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_bytes((inputs / "texts.jsonl").read_bytes())
    return folder


FEW_PASSES = (
    "run.rounds=1",
    "training.local_steps=1",
    "evaluation.max_test_examples=2",
    "evaluation.client_test=off",
)


def peak_mib(folder: Path) -> float:
    """Of the process that held most, in the first round."""
    record = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return float(record["ranks/peak_memory_mib"])


@needs_deepspeed
def test_a_base_over_the_cap_is_refused_whole_and_runs_sharded(inputs: Path, large: Path) -> None:
    files = (large / "model").glob("*.safetensors")
    weights_mib = sum(file.stat().st_size for file in files) / 2**20
    assert weights_mib > 250
    cap = f"model.max_memory_gib={0.75 * weights_mib / 1024:.4f}"

    (refused,) = start(
        [f"model.name_or_path={large / 'model'}", f"data.source={large / 'texts.jsonl'}", cap, *FEW_PASSES,
         "data.max_tokens=24", f"run.output_dir={large / 'runs'}", "run.name=refused", "tracking.wandb.mode=disabled"],
        1,
        large,
    ).wait(100.0)  # fmt: skip
    assert refused.code == 2, refused.errors
    assert "set model.sharding=zero3 and start at least 2 processes" in refused.errors
    assert not (large / "runs" / "refused").exists()

    # what a process holds besides the base is what it holds with a base of next to nothing
    sharded = peak_mib(run(large, 4, "sharded", "model.sharding=zero3", cap, *FEW_PASSES))
    sharded -= peak_mib(run(inputs, 4, "small-sharded", "model.sharding=zero3", *FEW_PASSES))
    whole = peak_mib(run(large, 1, "whole", *FEW_PASSES)) - peak_mib(run(inputs, 1, "small", *FEW_PASSES))
    assert sharded < 0.75 * weights_mib
    assert whole > 0.95 * weights_mib


def test_groups_must_divide_the_processes() -> None:
    for world_size, size in ((1, None), (3, 2), (4, 3)):
        group = SoloGroup()
        group.world_size = world_size
        with pytest.raises(ConfigError, match=r"multiple of model\.sharding_group_size"):
            ShardingGroup(group, size, False)
