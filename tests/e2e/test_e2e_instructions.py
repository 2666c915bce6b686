"""Whole runs on instruction data: clients are tasks, unseen tasks are tested, answers are generated and scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

NUM_TASKS = 8


@pytest.fixture
def instructions(tmp_path: Path) -> Path:
    """Eight tasks in two categories, each with twelve rows; the answer repeats the first word of the input."""
    generator = np.random.default_rng(0)
    rows = []
    for task in range(NUM_TASKS):
        for _ in range(12):
            words = [f"w{word}" for word in generator.integers(3, 60, 4)]
            rows.append(
                {
                    "instruction": f"w{task + 3}",
                    "input": " ".join(words),
                    "output": [words[0], "w63"],
                    "task": f"task {task}",
                    "category": f"kind {task % 2}",
                }
            )
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(path: Path) -> list[str]:
    return [
        f"data.source={path}",
        "data.instruction.format=rows",
        "data.instruction.task_field=task",
        "data.instruction.category_field=category",
        "data.client_field=task",
        "data.instruction.template=custom",
        "data.instruction.custom_template='{instruction} {input} w62'",
        "data.instruction.hold_out=task",
        "data.instruction.hold_out_fraction=0.25",
        "data.partition.name=natural",
        "data.partition.num_clients=6",
        "run.rounds=2",
        "evaluation.answers.max_new_tokens=4",
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(folder: Path) -> list[dict[str, float]]:
    named = ("test/rougeL", "test/exact", "test/num_without", "test/loss")
    return [{k: v for k, v in row.items() if k.startswith(named)} for row in metrics(folder)]


def test_generated_answers_are_scored_alike_on_one_and_two_processes(program, instructions):
    extra = [*settings(instructions), "evaluation.answers.metric=generated"]
    assert program.run(*extra, "run.name=one") == 0
    outcomes = program.start_ranks(2, *extra, "run.name=two")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    one, two = (scores(program.run_folder.parent / name) for name in ("one", "two"))
    assert one == two
    assert 0 <= one[-1]["test/rougeL"] <= 1
    assert {
        "test/rougeL_stem",
        "test/exact_match",
        "test/rougeL_by_client",
        "test/num_without_rouge_tokens",
    } <= set(one[0])
    assert any(key.startswith("test/rougeL_category/kind") for key in one[0])


@pytest.mark.parametrize("metric", ["teacher_forced", "teacher_forced_published"])
def test_teacher_forced_figures_have_names_of_their_own(program, instructions, metric):
    extra = [argument for argument in settings(instructions) if "max_new_tokens" not in argument]
    assert program.run(*extra, f"evaluation.answers.metric={metric}") == 0
    last = metrics(program.run_folder)[-1]
    assert 0 < last["test/rougeL_tf"] <= 1
    assert "test/rougeL" not in last


def test_plain_text_has_no_answers(program, capsys):
    assert program.run("evaluation.answers.metric=generated") == 2
    assert "evaluation.answers.metric must be off for plain text" in capsys.readouterr().err


def test_the_papers_tiers_scaled_to_a_small_model(program):
    modules = "lora.target_modules=[q_proj, k_proj, v_proj, out_proj, fc1, fc2]"
    extra = ["strategy.name=flexlora", "lora.distribution=uniform", "lora.rank_scale=0.08", modules]
    assert program.run(*extra, "cohort.size=6", "run.rounds=1") == 0
    saved = json.loads((program.run_folder / "tiers.json").read_text())
    table = pq.read_table(program.run_folder / "clients.parquet").to_pydict()
    assert len(saved["tier_of"]) == 6
    for client, trained in zip(table["client_id"], table["trained_parameters"], strict=True):
        ranks = saved["tiers"][saved["tier_of"][client]]["lora_ranks"]
        sizes = {"fc1": 16 + 32, "fc2": 16 + 32}
        assert trained == 2 * sum(rank * sizes.get(name, 16 + 16) for name, (rank,) in ranks.items()), (
            "two layers"
        )
