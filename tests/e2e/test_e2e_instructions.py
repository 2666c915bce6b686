"""Whole runs on instruction data: clients are tasks, unseen tasks are tested, answers are generated and scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.recorded import undocumented

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
    assert undocumented(metrics(program.run_folder.parent / "one")) == set()
    assert {
        "test/rougeL_stem",
        "test/exact_match",
        "test/rougeL_by_client",
        "test/num_without_rouge_tokens",
    } <= set(one[0])
    assert any(key.startswith("test/rougeL_category/kind") for key in one[0])
    by_task = [value for key, value in one[0].items() if key.startswith("test/rougeL_task/task ")]
    assert len(by_task) == 2, "a quarter of eight tasks"
    assert one[0]["test/rougeL_by_client"] == pytest.approx(sum(by_task) / 2)
    for score in ("rougeL_stem", "exact_match"):
        assert {key for key in one[0] if key.startswith(f"test/{score}_task/task ")}, score
        assert {key for key in one[0] if key.startswith(f"test/{score}_category/kind")}, score


def test_what_became_of_prompts_and_answers_is_said(program, instructions, capsys):
    rows = [json.loads(line) for line in instructions.read_text().splitlines()]
    rows[0]["output"] = [""]
    rows[1]["output"] = ["\u732b"]
    instructions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    extra = [
        *settings(instructions)[:-1],
        "data.instruction.hold_out_names=[task 6, task 7]",
        "data.on_empty=drop",
    ]
    extra = [
        argument
        for argument in extra
        if not argument.startswith(("data.instruction.hold_out_f", "run.rounds"))
    ]
    assert program.run(*extra, "data.max_tokens=7", "tracking.progress=plain", "run.rounds=1") == 0
    counts = json.loads((program.run_folder / "run.json").read_text())["answers"]
    # </s>, six words, the answer and </s> are nine tokens, so two of each prompt go
    assert counts["training"] == {
        "examples": 71,
        "prompts_cut": 71,
        "answers_cut": 0,
        "dropped_without_label_token": 1,
        "without_rouge_tokens": 1,
    }
    assert counts["test"]["examples"] == counts["test"]["prompts_cut"] == 24
    told = capsys.readouterr().err
    assert (
        "training: 71 of 71 prompts and 0 answers cut, 1 rows without a label token dropped, 1 without"
        in told
    )


def test_clients_whose_parts_the_corpus_names_need_no_fraction(program, instructions, capsys):
    rows = [json.loads(line) for line in instructions.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["part"] = ("train", "train", "train", "test")[index % 4]
    instructions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    extra = [*settings(instructions)[:-1], "data.client_test_fraction=0", "evaluation.client_test=own_split"]
    assert program.run(*extra, "data.instruction.part_field=part") == 0
    table = pq.read_table(program.run_folder / "clients.parquet").to_pydict()
    assert all(loss is not None for loss in table["test_loss_after"])
    capsys.readouterr()
    assert program.run(*extra, "run.name=without") == 2
    assert (
        "data.client_test_fraction must be > 0 when evaluation.client_test is own_split"
        in capsys.readouterr().err
    )
    pooled = [argument for argument in extra if not argument.startswith("data.partition.name")]
    assert program.run(*pooled, "data.instruction.part_field=part", "data.partition.name=iid") == 2


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
