"""Whole runs that stop before their last round: what is kept, exported and said, and what a resume makes of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from fedsim.lora.state import ServerState
from fedsim.server.checkpoint import CheckpointWriter, list_checkpoints, load_checkpoint
from fedsim.server.client_store import ClientStore
from fedsim.server.early_stopping import StoppingRule
from tests.e2e.test_e2e_run import adapter_bytes, read_metrics, run_record, without_clock

NOT_LEARNING = ["run.rounds=50", "training.optimizer.lr=0", "early_stopping.metric=test_loss"]
"""Every evaluation is the first one again."""

TOO_FAST = ["run.rounds=50", "training.optimizer.lr=2.0", "early_stopping.patience=1"]
"""The model gets worse, but is not the same after any two rounds."""


def changed(arguments: list[str], *changes: str) -> list[str]:
    """Arguments of which some are given anew."""
    new = {change.partition("=")[0] for change in changes}
    return [*(argument for argument in arguments if argument.partition("=")[0] not in new), *changes]


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def exported(folder: Path) -> dict[str, Any]:
    return {
        name: tensor.numpy()
        for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items()
    }


def checkpoint_adapter(folder: Path, rounds: int) -> list[Any]:
    return [
        factor.numpy()
        for factors in load_checkpoint(folder / "checkpoints", rounds).adapter.values()
        for factor in (factors.A, factors.B)
    ]


def same_values(exported: dict[str, Any], saved: list[Any]) -> bool:
    return all(any(np.array_equal(mine, factor) for factor in saved) for mine in exported.values())


def test_a_run_that_does_not_improve_stops_and_says_so(program: Any, caplog: Any) -> None:
    assert program.run(*NOT_LEARNING) == 0
    folder = program.run_folder
    metrics = read_metrics(folder)
    assert [row["early_stopping/evaluations_since"] for row in metrics] == [0, 1, 2, 3, 4]
    assert {row["early_stopping/best_after_rounds"] for row in metrics} == {1}
    assert names(folder) == ["round_000001", "round_000004", "round_000005"]
    record = run_record(folder)
    assert record["status"] == "finished"
    assert record["reason"].startswith(
        "stopped early after 5 of 50 rounds: 4 evaluations in a row did not improve"
    )
    assert record["early_stopping"] == {
        "metric": "test/loss",
        "best": metrics[0]["test/loss"],
        "best_after_rounds": 1,
        "rounds": 5,
        "stopped_early": True,
        "exported_after_rounds": 1,
    }

    caplog.clear()
    with caplog.at_level("INFO", logger="fedsim"):
        assert program.run(*NOT_LEARNING) == 0
    assert "is finished (stopped early after 5 of 50 rounds" in caplog.text
    assert "nothing to do" in caplog.text
    assert len(read_metrics(folder)) == 5
    assert program.run(*changed(NOT_LEARNING, "run.rounds=60")) == 0
    assert len(read_metrics(folder)) == 5, "more rounds do not start a run again that has stopped"
    assert program.run(*NOT_LEARNING, "early_stopping.patience=4") == 0
    assert len(read_metrics(folder)) == 6, "more patience does"
    assert run_record(folder)["early_stopping"]["rounds"] == 6


@pytest.mark.parametrize("metric", ["test_loss", "validation_loss"])
def test_the_best_state_is_exported_or_the_last(program: Any, metric: str) -> None:
    best, last = (f"run.name={metric}-{export}" for export in ("best", "last"))
    chosen = [*TOO_FAST, f"early_stopping.metric={metric}"]
    assert program.run(*chosen, best, "checkpoint.every_rounds=40") == 0
    assert program.run(*chosen, last, "early_stopping.export=last") == 0
    folders = [program.run_folder.parent / f"{metric}-{export}" for export in ("best", "last")]
    assert without_clock(folders[0]) == without_clock(folders[1])
    facts = [run_record(folder)["early_stopping"] for folder in folders]
    ended, after = facts[0]["rounds"], facts[0]["best_after_rounds"]
    assert after < ended < 50
    assert [fact["exported_after_rounds"] for fact in facts] == [after, ended]
    figure = metric.replace("_", "/")
    values = [row[figure] for row in read_metrics(folders[0])]
    assert facts[0]["best"] == min(values)
    assert after == values.index(min(values)) + (metric == "test_loss")
    for folder, rounds in zip(folders, (after, ended), strict=True):
        assert same_values(exported(folder), checkpoint_adapter(folder, rounds))
    assert adapter_bytes(folders[0]) != adapter_bytes(folders[1])


def test_without_a_stop_the_best_state_is_exported_too(program: Any) -> None:
    chosen = changed(
        TOO_FAST, "early_stopping.metric=test_loss", "early_stopping.patience=20", "run.rounds=3"
    )
    assert program.run(*chosen) == 0
    record = run_record(program.run_folder)
    losses = [row["test/loss"] for row in read_metrics(program.run_folder)]
    assert (record["status"], record["reason"]) == ("finished", None)
    assert record["early_stopping"]["stopped_early"] is False
    assert record["early_stopping"]["exported_after_rounds"] == losses.index(min(losses)) + 1


def test_validation_is_of_the_models_that_clients_start_from_on_their_own_examples(program: Any) -> None:
    """Where all clients start from the global model, their own tests before training say the same."""
    chosen = [
        "early_stopping.metric=validation_loss",
        "data.client_test_fraction=0.3",
        "data.partition.name=quantity_skew",
        "data.partition.min_examples=5",
        "training.optimizer.lr=0.5",
    ]
    assert program.run(*chosen, "evaluation.client_test=own_split") == 0
    table = pq.read_table(program.run_folder / "clients.parquet").to_pydict()
    for row in read_metrics(program.run_folder):
        mine = [i for i, t in enumerate(table["round_index"]) if t == row["round_index"]]
        sizes = [table["num_examples"][i] for i in mine]
        before = [table["test_loss_before"][i] for i in mine]
        assert row["validation/loss"] == pytest.approx(np.average(before, weights=sizes), rel=1e-5)
        after = [table["test_loss_after"][i] for i in mine]
        assert row["validation/loss"] != pytest.approx(np.average(after, weights=sizes), rel=1e-4), "contrast"
        assert row["validation/loss"] != pytest.approx(np.mean(before), rel=1e-5), "contrast: without weights"


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Settings with six tasks of sixteen rows whose parts the corpus names."""
    generator = np.random.default_rng(0)
    parts = ["train"] * 12 + ["eval"] * 3 + ["test"]
    rows = [
        {
            "instruction": f"w{task + 3}",
            "input": " ".join(f"w{word}" for word in generator.integers(3, 9, 4)),
            "output": [f"w{generator.integers(3, 9)}", "w7"],
            "task": f"task {task}",
            "part": part,
        }
        for task in range(6)
        for part in parts
    ]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"data.source={path}",
        "data.instruction.format=rows",
        "data.instruction.task_field=task",
        "data.instruction.part_field=part",
        "data.client_field=task",
        "data.client_test_fraction=0",
        "data.instruction.template=custom",
        "data.instruction.custom_template='{instruction} {input} w62'",
        "data.instruction.hold_out=task",
        "data.instruction.hold_out_fraction=0.2",
        "data.partition.name=natural",
        "data.partition.num_clients=5",
        "evaluation.client_test=own_split",
        "evaluation.answers.metric=generated",
        "evaluation.answers.max_new_tokens=3",
        "early_stopping.metric=validation_rouge_l",
        "early_stopping.patience=1",
        "training.optimizer.lr=0.05",
        "run.rounds=12",
    ]


def test_a_resumed_run_on_two_processes_stops_where_an_uninterrupted_one_does(
    program: Any, tasks: list[str]
) -> None:
    assert program.run(*tasks, "run.name=alone") == 0
    assert program.run(*changed(tasks, "run.name=resumed", "run.rounds=2")) == 0
    outcomes = program.start_ranks(2, *tasks, "run.name=resumed")
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    alone, resumed = (program.run_folder.parent / name for name in ("alone", "resumed"))
    assert without_clock(alone) == without_clock(resumed)
    assert adapter_bytes(alone) == adapter_bytes(resumed)
    assert names(alone) == names(resumed)
    facts = run_record(alone)["early_stopping"]
    assert facts == run_record(resumed)["early_stopping"]
    assert facts["metric"] == "validation/rougeL"
    assert {"validation/rougeL_by_client", "validation/num_examples"} <= set(read_metrics(alone)[0])
    assert read_metrics(alone)[0]["validation/num_examples"] == 3 * 3, (
        "the parts for evaluation, not for test"
    )
    assert 2 < facts["rounds"] < 12, "the interruption must come before the stop"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["strategy.name=local", "early_stopping.metric=test_loss"],
            "early_stopping.metric must be off with strategy.name=local, which has no global model to measure",
        ),
        (
            [
                "early_stopping.metric=validation_loss",
                "data.partition.num_clients=180",
                "data.partition.name=iid",
            ],
            "early_stopping.metric must be off or of the test set where no client keeps an example for its own",
        ),
    ],
)
def test_runs_that_could_not_stop_are_refused(
    program: Any, capsys: Any, extra: list[str], message: str
) -> None:
    assert program.run(*extra) == 2
    assert message in capsys.readouterr().err


def test_the_best_state_is_saved_with_what_its_clients_keep(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a state was the best is found out one round later, when its clients have newer versions."""
    save = CheckpointWriter.save
    saved: list[int] = []

    def checked(self: CheckpointWriter, state: ServerState, keep_last: int) -> None:
        ClientStore(program.run_folder / "clients").check(state.client_versions)
        saved.append(state.round_index)
        save(self, state, keep_last)

    monkeypatch.setattr(CheckpointWriter, "save", checked)
    monkeypatch.setattr(StoppingRule, "_gain", lambda self, score, best: 1.0)  # each state is the best so far
    chosen = ["strategy.name=scaffold", "training.optimizer.name=sgd", "training.max_grad_norm=null"]
    chosen += [
        "aggregation.client_weights=uniform",
        "training.optimizer.lr=0.05",
        "training.schedule.name=constant",
    ]
    chosen += ["early_stopping.metric=validation_loss", "checkpoint.every_rounds=50", "run.rounds=6"]
    assert program.run(*chosen) == 0
    improved = [row["early_stopping/best_after_rounds"] for row in read_metrics(program.run_folder)]
    assert improved == [0, 1, 2, 3, 4, 5]
    assert saved == [0, 1, 2, 3, 4, 5, 6]


def test_a_run_that_is_extended_stops_where_one_of_that_length_does(program: Any) -> None:
    """The last round is evaluated whatever its number, and that decides nothing."""
    chosen = changed(
        TOO_FAST, "early_stopping.metric=test_loss", "evaluation.every_rounds=3", "run.rounds=20"
    )
    assert program.run(*chosen, "run.name=whole") == 0
    for rounds in (4, 20):
        assert program.run(*changed(chosen, f"run.rounds={rounds}"), "run.name=extended") == 0
    whole, extended = (program.run_folder.parent / name for name in ("whole", "extended"))
    ends = [run_record(folder)["early_stopping"] for folder in (whole, extended)]
    assert ends[0] == ends[1]
    assert ends[0]["stopped_early"]
    assert adapter_bytes(whole) == adapter_bytes(extended)
    assert "test/loss" in read_metrics(extended)[3], "round 4 was the last one"
    assert "test/loss" not in read_metrics(whole)[3]
