"""Whole runs of the program with strategies: tiers, exports, resuming, privacy, and a class of the user's own."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedsim.lora.peft_format import load_peft_adapter
from tests.recorded import undocumented

ROOT = Path(__file__).resolve().parents[2]
TIERS = "lora.tiers=[{share: 0.5, rank: 1}, {share: 0.5, rank: 3, module_ranks: {v_proj: 5}}]"
PHASES = "lora.rank_schedule=[{from_round: 1, scale: 0.5}]"
LEARNING = ("training.optimizer.lr=0.05", "lora.dropout=0.1")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logits_of(model_folder: Path, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def test_flexlora_with_tiers_on_two_processes(program):
    extra = ("strategy.name=flexlora", TIERS, "cohort.size=6", *LEARNING)
    assert program.run(*extra, "run.name=alone") == 0
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1", "scipy's eigenvectors depend on the threads of its BLAS"
    outcomes = program.start_ranks(2, *extra, "aggregation.svd_placement=sharded", "run.name=two")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    alone, two = (program.run_folder.parent / name for name in ("alone", "two"))
    weights = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (alone, two)]
    assert weights[0] == weights[1]
    assert (alone / "spectra.jsonl").read_bytes() == (two / "spectra.jsonl").read_bytes()

    table = pq.read_table(alone / "clients.parquet").to_pydict()
    ranks = dict(zip(table["client_id"], table["lora_rank"], strict=True))
    assert set(ranks.values()) == {1, 5}, "the seed gives both tiers clients"
    trained = dict(zip(table["client_id"], table["trained_parameters"], strict=True))
    per_rank = 2 * (16 + 16)  # two layers
    assert all(trained[k] == per_rank * (2 if rank == 1 else 3 + 5) for k, rank in ranks.items())

    record = metrics(alone)[-1]
    assert undocumented(metrics(alone)) == set()
    assert record["spectrum/energy_kept_rank_5"] == pytest.approx(1.0, abs=0.5)
    assert 0 <= record["spectrum/energy_beyond_smallest_rank"] < 1
    spectra = [json.loads(line) for line in (alone / "spectra.jsonl").read_text().splitlines()]
    assert [row["round_index"] for row in spectra] == [0, 1, 2]
    values = spectra[-1]["model.decoder.layers.0.self_attn.v_proj"]
    assert values == sorted(values, reverse=True)
    adapter = load_peft_adapter(alone / "adapter")
    assert {f.rank for m, f in adapter.items() if m.endswith("v_proj")} == {5}
    assert {f.rank for m, f in adapter.items() if m.endswith("q_proj")} == {3}


@pytest.mark.parametrize("name", ["flora", "fedex", "slora", "flexlora"])
def test_the_merged_model_and_the_adapter_are_one(program, model_folder, name):
    extra = ["run.merged_model=true", f"strategy.name={name}", "cohort.size=6", "lora.rank=5", *LEARNING]
    extra += ["strategy.slora.rounds=1", "strategy.slora.density=0.2"] if name == "slora" else []
    assert program.run(*extra) == 0
    folder = program.run_folder
    merged = logits_of(folder / "model")
    assert torch.allclose(merged, logits_of(model_folder, folder / "adapter"), atol=2e-4)
    assert not torch.allclose(merged, logits_of(model_folder), atol=1e-2)


@pytest.mark.parametrize("name", ["fedsa", "local", "flora", "slora"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(program, name):
    extra = [f"strategy.name={name}", *LEARNING]
    extra += ["strategy.slora.rounds=2", "strategy.slora.density=0.2"] if name == "slora" else []
    assert program.run(*extra, "run.name=whole") == 0
    assert program.run(*extra, "run.name=parts", "run.rounds=2") == 0
    outcomes = program.start_ranks(2, *extra, "run.name=parts")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    whole, parts = (program.run_folder.parent / n for n in ("whole", "parts"))
    found = [
        {str(path.relative_to(f)): path.read_bytes() for path in sorted(f.glob("adapter*/**/*.safetensors"))}
        for f in (whole, parts)
    ]
    assert found[0]
    assert found[0] == found[1]
    assert [row.get("test/loss") for row in metrics(whole)] == [
        row.get("test/loss") for row in metrics(parts)
    ]
    if name in ("fedsa", "local"):
        states = [sorted(path.name for path in (f / "clients").rglob("client_*")) for f in (whole, parts)]
        assert states[0] == states[1]
        newest = json.loads((whole / "checkpoints" / "round_000003" / "state.json").read_text())
        assert set(found[0]) == {
            f"adapters/client_{int(client):06d}/adapter_model.safetensors"
            for client in newest["client_versions"]
        }


def test_privacy_is_counted_and_a_resume_counts_on(program):
    extra = (
        "strategy.name=ffa",
        "cohort.sampling=poisson",
        "aggregation.client_weights=uniform",
        "aggregation.privacy.clip_norm=0.3",
        "aggregation.privacy.noise_multiplier=2.0",
        "aggregation.server_optimizer.name=fedavgm",
    )
    assert program.run(*extra, "run.rounds=2") == 0
    assert program.run(*extra) == 0
    spent = [row["privacy/epsilon"] for row in metrics(program.run_folder)]
    assert undocumented(metrics(program.run_folder)) == set()
    assert len(spent) == 3
    assert 0 < spent[0] < spent[1] < spent[2] < 20


def test_the_example_of_the_docs_runs_and_is_what_the_docs_print(program, monkeypatch):
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    code = (ROOT / "examples" / "median.py").read_text(encoding="utf-8")
    found = re.search(r"<!-- example: begin -->\n```python\n(.*?)```\n<!-- example: end -->", text, re.DOTALL)
    assert found
    assert found[1] == code
    body = code[code.index("class Median") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 30

    monkeypatch.syspath_prepend(str(ROOT))
    own = ("strategy.name=examples.median:Median", "cohort.size=5", *LEARNING)
    assert program.run(*own, "run.name=whole") == 0
    assert program.run(*own, "run.name=half", "strategy.options=[step=0.5]") == 0
    whole, half = (
        load_peft_adapter(program.run_folder.parent / name / "adapter") for name in ("whole", "half")
    )
    assert not whole.equal(half)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["strategy.name=examples.median:Mean"], "strategy.name=examples.median:Mean cannot be imported"),
        (["strategy.name=no.such:Thing"], "cannot be imported"),
        (["strategy.name=examples.median:torch"], "must be a class that takes a Federation"),
        (
            ["strategy.name=examples.median:Median", "strategy.options=[stop=1]"],
            r"strategy\.options \['stop'\]",
        ),
        (["strategy.name=collections:OrderedDict"], "must be a class that takes a Federation|missing: name"),
        ([TIERS], r"lora\.tiers must give all clients the same LoRA ranks with strategy\.name=fedavg"),
        (["lora.tiers=[{rank: 2, module_ranks: {fc9: 3}}]"], "got 'fc9'"),
        (["lora.tiers=[{rank: 99}]"], "must be at most 16"),
        (["strategy.name=flexlora", "aggregation.server_optimizer.name=fedadam"], "strategy.name=flexlora"),
        (["strategy.name=local", "run.merged_model=true"], r"run\.merged_model must be false"),
        (["strategy.name=fedsa", "evaluation.client_test=off"], "no global model"),
        (["strategy.name=scaffold"], r"training\.optimizer\.name must be sgd"),
        (["aggregation.privacy.clip_norm=1.0"], r"cohort\.sampling must be poisson"),
        (["strategy.options=[a=1]"], r"strategy\.options must stay at its default"),
        (["strategy.florist.energy=0.5"], r"strategy\.florist\.energy must stay at its default"),
        (["aggregation.svd_device=cuda", "run.device=cpu"], r"aggregation\.svd_device must be cpu"),
        (
            ["aggregation.svd_device=cuda", "run.device=auto"],
            r"aggregation\.svd_device must be cpu where the run",
        ),
        (
            ["training.schedule.warmup_steps=500"],
            r"training\.schedule\.warmup_steps must be at most the \d+ steps that the largest client makes",
        ),
        ([PHASES], r"lora\.rank_schedule must not change the LoRA ranks with strategy\.name=fedavg"),
        (
            ["strategy.name=centralized", PHASES],
            r"lora\.rank_schedule must be empty .* one adapter of the largest",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_trained(program, capsys, monkeypatch, extra, message):
    monkeypatch.syspath_prepend(str(ROOT))
    assert program.run(*extra) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert re.search(message, told[0]), told[0]
    assert not (program.run_folder / "metrics.jsonl").exists()


TWO_TIERS = "lora.tiers=[{share: 0.5, rank: 1}, {share: 0.5, rank: 3}]"
PHONES = (
    "strategy.name=flexlora",
    "clients.devices=[{tokens_per_s: 50, uplink_mbps: 1, downlink_mbps: 5}, {tokens_per_s: 200, uplink_mbps: 1, "
    "downlink_mbps: 5}]",
    "clients.slowness.name=lognormal",
    "clients.over_selection=1.5",
    "clients.dropout=0.2",
    "clients.corruption.probability=0.2",
    "training.on_not_finite=drop",
    "cohort.size=4",
)


def test_unreliable_clients_resume_with_their_clock(program):
    assert program.run(TWO_TIERS, *PHONES, *LEARNING, "run.name=whole", "run.rounds=3") == 0
    assert program.run(TWO_TIERS, *PHONES, *LEARNING, "run.name=cut", "run.rounds=1") == 0
    assert program.run(TWO_TIERS, *PHONES, *LEARNING, "run.name=cut", "run.rounds=3") == 0
    whole, cut = (metrics(program.run_folder.parent / name) for name in ("whole", "cut"))
    keys = [key for key in whole[0] if key.startswith(("cohort/", "simulated/"))]
    assert {"cohort/num_surplus", "cohort/num_corrupted", "simulated/elapsed_s"} <= set(keys)
    assert [[row[key] for key in keys] for row in whole] == [[row[key] for key in keys] for row in cut]
    assert whole[-1]["simulated/elapsed_s"] == pytest.approx(sum(row["simulated/round_s"] for row in whole))


def test_devices_must_fit_the_tiers(program, capsys):
    assert (
        program.run(*PHONES, "lora.tiers=[{share: 1, rank: 1}, {share: 1, rank: 2}, {share: 1, rank: 3}]")
        == 2
    )
    assert "or one for each of 3 resource tiers, got 2" in capsys.readouterr().err
    assert not program.run_folder.exists()
