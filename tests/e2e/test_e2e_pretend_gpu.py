"""Whole runs on a pretend GPU: every tensor lies where its operation wants it, and the figures are those of the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.models import packing
from tests.helpers import run_program
from tests.pretend_gpu import pretend_gpu

MIXED = "lora.tiers=[{share: 0.5, rank: 2}, {share: 0.5, rank: 4}]"
FLOAT32 = ("model.dtype=float32", "training.optimizer.lr=0.01")

ON_GPU = "aggregation.svd_device=cuda"
SGD = ("training.optimizer.name=sgd", "training.max_grad_norm=null")
MIXING = (
    "flexlora",
    "flexlora_delta",
    "flexlora_partitioned",
    "hlora",
    "hetlora",
    "hetlora_naive",
    "rbla",
    "flora",
)

CASES: dict[str, list[str]] = {
    "dropout": ["lora.dropout=0.1", "training.gradient_accumulation_steps=2", "training.pack.max_tokens=40"],
    "the base's dropout": ["model.dropout=as_config", "training.trainer=sequential"],
    "sequential": ["training.trainer=sequential", "lora.dropout=0.1"],
    "padded": ["lora.use_rslora=true", "lora.target_modules=[q_proj, k_proj, v_proj, out_proj, fc1, fc2]"],
    "checkpointing": ["training.gradient_checkpointing=true", "training.proximal_mu=0.1"],
    "sgd": [*SGD, "training.optimizer.momentum=0.9", "training.optimizer.weight_decay=0.1"],
    "updates on the CPU": ["training.pack.keep_updates_on=cpu", "training.pack.max_slots=1"],
    "updates on the GPU": ["training.pack.keep_updates_on=device", "strategy.name=flexlora"],
    "decompositions on the CPU": ["strategy.name=flexlora", MIXED, "aggregation.svd_device=cpu"],
    **{name: [f"strategy.name={name}", MIXED, ON_GPU] for name in MIXING},
    **{name: [f"strategy.name={name}"] for name in ("ffa", "rolora", "fedsa", "local", "centralized")},
    **{
        name: [f"strategy.name={name}", ON_GPU] for name in ("fedex", "fedsvd", "florist")
    },
    "scaffold": ["strategy.name=scaffold", *SGD, "aggregation.client_weights=uniform", ON_GPU],
    "sequential scaffold": [
        "strategy.name=scaffold", *SGD, "aggregation.client_weights=uniform", "training.trainer=sequential",
    ],
    "sequential slora": [
        "strategy.name=slora", "strategy.slora.rounds=1", "strategy.slora.tier_densities=[0.1, 0.2]",
        "strategy.slora.then=hetlora", MIXED, "training.trainer=sequential",
    ],
    "slora": ["strategy.name=slora", "strategy.slora.rounds=1", "strategy.slora.density=0.1", ON_GPU],
    "slora, flexlora": [
        "strategy.name=slora", "strategy.slora.rounds=1", "strategy.slora.then=flexlora", MIXED,
        ON_GPU,
    ],
    "fedadam": ["aggregation.server_optimizer.name=fedadam", ON_GPU],
    "private": [
        ON_GPU,
        "cohort.sampling=poisson", "aggregation.client_weights=uniform", "aggregation.privacy.clip_norm=0.5",
        "aggregation.privacy.noise_multiplier=0.01",
    ],
    "unreliable": [
        "clients.dropout=0.2", "clients.corruption.probability=0.3", "clients.corruption.kind=scaled",
        "training.max_update_norm=5", "training.on_large_update=clip",
    ],
    "not finite": ["clients.corruption.probability=0.3", "training.on_not_finite=drop"],
    "early stopping": ["early_stopping.metric=validation_loss", "run.merged_model=true"],
}  # fmt: skip


def figures(folder: Path) -> list[float]:
    """Everything that was measured on the test set, by round and name."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        value
        for line in lines
        for name, value in sorted(json.loads(line).items())
        if name.startswith("test/")
    ]


def run_both(program: Any, monkeypatch: pytest.MonkeyPatch, *keys: str) -> tuple[list[float], list[float]]:
    """Figures of a run on the CPU, and on the pretend GPU."""
    on_cpu = [key for key in keys if key != ON_GPU]
    assert program.run("run.name=cpu", *on_cpu) == 0
    with monkeypatch.context() as patch, pretend_gpu(patch):
        assert program.run("run.name=gpu", "run.device=cuda", *keys) == 0
    cpu, gpu = (figures(program.run_folder.with_name(name)) for name in ("cpu", "gpu"))
    return cpu, gpu


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_a_pretend_gpu(case: str, program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = run_both(program, monkeypatch, "run.rounds=2", *FLOAT32, *CASES[case])
    assert gpu == pytest.approx(cpu, abs=1e-4)


@pytest.mark.skipif(not packing.HAS_VARLEN, reason="this torch has no attention for packed sequences")
@pytest.mark.parametrize("rank", [2, 8])
def test_bfloat16_through_the_kernel_for_packed_sequences(
    rank: int, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = packing._flash_attention
    monkeypatch.setattr(packing, "_flash_attention", lambda *args: calls.append(1) or original(*args))
    keys = ("model.dtype=bfloat16", f"lora.rank={rank}", "training.optimizer.lr=0.01")
    cpu, gpu = run_both(program, monkeypatch, *keys)
    assert calls
    assert gpu == pytest.approx(cpu, abs=2e-2)


def test_a_run_on_a_pretend_gpu_that_is_stopped_goes_on_to_the_same_bits(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*FLOAT32, "run.device=cuda", "strategy.name=fedsa", "lora.dropout=0.1"]
    with monkeypatch.context() as patch, pretend_gpu(patch):
        assert program.run("run.name=whole", *keys) == 0
        assert program.run("run.name=parts", *keys, "run.rounds=1") == 0
        assert program.run("run.name=parts", *keys) == 0
    whole, parts = (figures(program.run_folder.with_name(name)) for name in ("whole", "parts"))
    assert whole == parts


def test_an_estimate_with_a_probe_on_a_pretend_gpu(
    program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedsim.estimate.probe.SECONDS", 0.2)
    with monkeypatch.context() as patch, pretend_gpu(patch):
        assert program.run("run.device=cuda", "--estimate", "--probe") == 0
    assert "probe" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["generated", "teacher_forced"])
def test_answers_on_a_pretend_gpu(
    metric: str, program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"w{3 + i % 60}" for i in range(96)]
    rows = [{"instruction": words[i], "input": words[-i], "output": words[i]} for i in range(96)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = [f"data.source={path}", "data.instruction.format=rows", f"evaluation.answers.metric={metric}"]
    keys += [
        "data.partition.name=iid",
        "data.instruction.template=custom",
        "data.instruction.custom_template='{instruction} {input} w62'",
    ]
    if metric == "generated":
        keys.append("evaluation.answers.max_new_tokens=4")
    cpu, gpu = run_both(program, monkeypatch, *FLOAT32, "run.rounds=1", *keys)
    assert gpu == pytest.approx(cpu, abs=1e-4)


@pytest.mark.parametrize(
    "keys",
    [
        ["lora.dropout=0.1"],
        ["strategy.name=flexlora", MIXED, ON_GPU, "aggregation.svd_placement=sharded"],
        ["strategy.name=fedsa"],
        ["strategy.name=slora", "strategy.slora.rounds=1", "strategy.slora.density=0.1"],
    ],
    ids=["fedavg", "flexlora", "fedsa", "slora"],
)
def test_two_processes_with_a_pretend_gpu_each(
    keys: list[str], program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL gets tensors of the GPU alone, and one process ends with the same bits."""
    keys = [*FLOAT32, *keys, "run.device=cuda", "run.rounds=2", "cohort.size=6", "training.pack.num_packs=3"]
    two = [*program.arguments([*keys, "run.name=two"])]
    outcomes = run_program(two, 2, program.folder, 120.0, pretend_gpus=True)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    with monkeypatch.context() as patch, pretend_gpu(patch):
        assert program.run("run.name=one", *keys) == 0
    assert figures(program.run_folder.with_name("two")) == figures(program.run_folder.with_name("one"))
