"""`--estimate`, as a user calls it, against the runs that follow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsim.estimate.devices import USABLE_SHARE, Gpu
from tests.helpers import random_texts

Snapshot = Callable[[Path], dict[str, bytes | None]]


def estimated(program: Any, *extra: str) -> dict[str, Any]:
    """The figures of an estimate with the program's settings."""
    path = program.folder / "estimate.json"
    assert program.run("--estimate", "--json", str(path), *extra) == 0
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def rounds_of(program: Any) -> list[dict[str, Any]]:
    text = (program.run_folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_tokens_steps_and_bytes_are_those_of_the_run(program: Any) -> None:
    told = estimated(program)
    assert program.run() == 0
    rounds = rounds_of(program)

    assert told["round"]["label_tokens"] * len(rounds) == pytest.approx(
        sum(one["train/tokens"] for one in rounds), abs=1e-6
    )
    assert told["round"]["clients"] == 3
    assert told["round"]["occupancy"] == pytest.approx(
        sum(one["packs/slot_occupancy"] for one in rounds) / len(rounds), abs=0.2
    )
    assert told["round"]["gathered_bytes"] == 0


def test_nothing_is_written_and_no_weights_are_needed(
    program: Any, snapshot: Snapshot, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = program.folder / "without-weights"
    empty.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (empty / file.name).write_bytes(file.read_bytes())
    before = snapshot(program.folder)

    assert program.run("--estimate", f"model.name_or_path={empty}") == 0

    text = capsys.readouterr().out
    assert snapshot(program.folder) == before
    assert "base" in text
    assert "not known without a rate; add --probe" in text
    assert "ask for" not in text


def test_a_probe_measures_and_writes_nothing(
    program: Any, snapshot: Snapshot, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.estimate.probe.SECONDS", 0.2)
    before = snapshot(program.folder)

    assert program.run("--estimate", "--probe") == 0

    text = capsys.readouterr().out
    assert snapshot(program.folder) == before
    assert "from measured rates" in text
    assert "--time=00:" in text
    assert "the probe took" in text


@pytest.mark.parametrize(
    "extra",
    [
        ["strategy.name=flexlora", "lora.tiers=[{share: 0.5, rank: 2}, {share: 0.5, rank: 4}]"],
        ["strategy.name=flora"],
        ["strategy.name=fedsa", "evaluation.client_test=own_split"],
        [
            "strategy.name=scaffold",
            "training.optimizer.name=sgd",
            "training.max_grad_norm=null",
            "aggregation.client_weights=uniform",
        ],
        ["strategy.name=centralized"],
        ["strategy.name=slora", "strategy.slora.rounds=2", "evaluation.every_rounds=2"],
        ["training.trainer=sequential", "training.gradient_accumulation_steps=2"],
        ["training.gradient_checkpointing=true", "aggregation.server_optimizer.name=fedadam"],
    ],
    ids=lambda extra: extra[0],
)
def test_every_kind_of_run_can_be_probed(
    program: Any, extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.estimate.probe.SECONDS", 0.1)
    told = estimated(program, "--probe", *extra)

    assert told["time"]["round_mean_s"] > 0
    assert told["time"]["ask_s"] >= told["time"]["total_s"]
    assert told["memory"]["measured_bytes"] > 0
    assert told["round"]["train_flops"] > 0


def test_a_base_in_fewer_bits_is_counted(program: Any) -> None:
    """Two layers of four modules of 16 x 16 and two of 16 x 32; the head and the rest stay in float32."""
    whole = estimated(program)["memory"]["resident"]
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 32)
    rows = 2 * (4 * 16 + 16 + 32)
    for kind, expected in (("int8", weights + 4 * rows), ("nf4", weights // 2 + 4 * weights // 64)):
        small = estimated(program, f"model.quantization={kind}")["memory"]["resident"]
        assert small["base"] == whole["base"] - 4 * weights + expected
        assert small["a dequantized weight"] == 4 * 16 * 32
    assert "a dequantized weight" not in whole


def test_answers_are_counted(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.estimate.probe.SECONDS", 0.1)
    texts = random_texts(120, longest=8)
    rows = [{"instruction": text, "input": "", "output": text} for text in texts]
    corpus = tmp_path / "questions.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    extra = [
        f"data.source={corpus}",
        "data.instruction.format=rows",
        "data.instruction.template=custom",
        "data.instruction.custom_template='{instruction}'",
        "evaluation.answers.metric=generated",
        "evaluation.answers.max_new_tokens=5",
        "data.max_tokens=40",
    ]
    told = estimated(program, *extra)

    cache = told["memory"]["phases"]["the test of answers"]["key-value cache"]
    # a token's keys and values in 2 layers of width 16, float32
    assert cache % (2 * 2 * 16 * 4) == 0
    assert cache > 0


def test_a_machine_one_is_not_on_can_be_planned_for(program: Any) -> None:
    told = estimated(program, "--gpu", "a100-80", "--processes", "8")

    assert told["world_size"] == 8
    assert told["time"]["measured"] is False
    assert told["memory"]["capacity_bytes"] == 80 * 2**30
    assert told["round"]["received_bytes"] == 8 * told["round"]["gathered_bytes"] > 0
    assert any("processes never train" in line for line in told["advice"])


def small_gpu(num_bytes: float) -> Gpu:
    return Gpu("Small", int(num_bytes / USABLE_SHARE), 1e13, 1e12, 1e11, has_bfloat16=False)


def test_memory_that_does_not_fit_comes_with_a_remedy(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = ["evaluation.client_test=off", "evaluation.max_test_examples=1", "lora.rank=16"]
    memory = estimated(program, "--gpu", "t4", *extra)["memory"]
    resident = sum(memory["resident"].values())
    assert memory["peak_phase"] == "training"
    half = (resident + memory["peak_bytes"]) / 2

    monkeypatch.setattr("fedsim.estimate.devices.GPUS", (small_gpu(half),))
    too_small = estimated(program, "--gpu", "small", *extra)
    monkeypatch.setattr("fedsim.estimate.devices.GPUS", (small_gpu(memory["peak_bytes"] + 100),))
    enough = estimated(program, "--gpu", "small", *extra)
    monkeypatch.setattr("fedsim.estimate.devices.GPUS", (small_gpu(resident - 100),))
    hopeless = estimated(program, "--gpu", "small", *extra)

    [line] = [line for line in too_small["advice"] if "does not fit" in line]
    assert "in training; try" in line
    assert "training.gradient_checkpointing=true" in line
    assert too_small["slots"]["fitting"] < too_small["slots"]["planned"]
    assert not any("does not fit" in line for line in enough["advice"])
    assert enough["slots"]["fitting"] >= enough["slots"]["planned"]
    assert any("stay whatever the settings" in line for line in hopeless["advice"])
    assert any("no bfloat16" in line for line in enough["advice"])


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--probe"], ["--probe must come with --estimate"]),
        (["--gpu", "H100"], ["--gpu must come with --estimate"]),
        (["--estimate", "--dry-run"], ["--dry-run and --estimate must not be given together"]),
        (["--estimate", "--gpu", "H1000"], ["--gpu must be one of", "A100-80", "got 'H1000'"]),
        (["--estimate", "--probe", "--gpu", "H100"], ["--gpu must be left out with --probe"]),
        (["--estimate", "--gpu", "H100", "run.device=cpu"], ["run.device must be auto or cuda with --gpu"]),
        (["--estimate", "--processes", "0"], ["--processes must be a whole number from 1 on, got '0'"]),
        (["--estimate", "--processes", "two"], ["--processes must be a whole number"]),
        (["--estimate", "--processes"], ["--processes: expected one argument"]),
        (["--estimate", "cohort.size=500"], ["cohort.size must be in [1, data.partition.num_clients=6]"]),
        (
            ["--estimate", "--json", "/nowhere/at/all.json"],
            ["--json must name a file in a folder that exists"],
        ),
        (["--estimate", "--json", ""], ["--json must name a file in a folder that exists, got ''"]),
        (["--estimate", "--json", "/tmp"], ["--json must name a file in a folder that exists, got '/tmp'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_refused(
    program: Any, arguments: list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = program.run(*arguments)

    errors = capsys.readouterr().err
    assert code == 2, errors
    for fragment in fragments:
        assert fragment in errors
    assert "Traceback" not in errors


def test_all_processes_probe_together(program: Any) -> None:
    path = program.folder / "estimate.json"
    ends = program.start_ranks(2, "--estimate", "--probe", "--json", str(path), timeout_s=240.0)

    assert [code for code, _ in ends] == [0, 0], ends
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["world_size"] == 2
    assert told["round"]["received_bytes"] == 2 * told["round"]["gathered_bytes"] > 0


def test_what_the_figures_do_not_count_is_said(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.run("--estimate") == 0
    assert "not counted" not in capsys.readouterr().out
    rules = ["strategy.name=slora", "strategy.slora.rounds=1", "run.rounds=3"]
    rules += ["early_stopping.metric=validation_loss", "early_stopping.from_round=1"]
    assert program.run("--estimate", *rules) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not counted: the first stage of strategy.name=slora" in told
    assert "not counted: the validation of early_stopping.metric=validation_loss" in told
