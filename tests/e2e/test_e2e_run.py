"""Whole runs on a random two-layer OPT: the run folder, strategies, resuming, and any number of processes."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fedsim.config.loader import load_config, to_tree
from fedsim.data.batches import collate
from fedsim.data.build import build_data
from fedsim.models.tokenizer import build_tokenizer
from fedsim.server import checkpoint
from fedsim.simulation import export, records, rounds
from fedsim.tracking.metrics import CLIENT_COLUMNS
from tests.recorded import undocumented

Snapshot = Callable[[Path], dict[str, bytes | None]]

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "e2e_losses.json"

ROUND_KEYS = {
    "round_index",
    "test/loss",
    "test/perplexity",
    "fairness/test_loss_variance",
    "comm/uplink_bytes",
    "comm/downlink_bytes",
    "time/round_s",
    "time/train_s",
    "time/gather_s",
    "time/aggregate_s",
    "train/tokens_per_s",
    "train/clients_per_s",
}
"""What design.md section 7 promises for each round."""

LEARNING = ["training.optimizer.lr=0.05", "lora.dropout=0.1"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(folder: Path) -> list[dict[str, Any]]:
    """The metrics that two equal runs share."""
    timed = ("time/", "ranks/", "train/tokens_per_s", "train/clients_per_s")
    return [
        {key: value for key, value in record.items() if not key.startswith(timed)}
        for record in read_metrics(folder)
    ]


def client_columns(folder: Path) -> dict[str, list[Any]]:
    """The client table without what depends on the clock or on the number of processes."""
    columns: dict[str, list[Any]] = pq.read_table(folder / "clients.parquet").to_pydict()
    return {name: values for name, values in columns.items() if name not in ("seconds", "process_rank")}


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def run_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


def test_run_folder(program: Any, capsys: Any, snapshot: Snapshot) -> None:
    """Everything that section 7 of the design promises, file by file."""
    mirrored = ["tracking.wandb.mode=offline", "tracking.progress=plain"]
    assert program.run(*LEARNING, *mirrored, "data.client_test_fraction=0.2") == 0
    folder = program.run_folder
    names = {path.name for path in folder.iterdir()} - {"run.lock"}
    assert names == {
        "config.yaml", "run.json", "metrics.jsonl", "clients.parquet", "partition.json", "partition.parquet",
        "tiers.json", "checkpoints",
        "adapter", "wandb", "logs",
    }  # fmt: skip
    told = capsys.readouterr().err
    assert "test loss before training" in told
    assert "3/3" in told
    assert "it/s" not in told

    config = load_config(folder / "config.yaml")
    record = run_record(folder)
    assert record["config"] == to_tree(config)
    assert (record["status"], record["reason"], record["world_size"]) == ("finished", None, 1)
    assert record["start_time"] <= record["end_time"]
    assert record["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty"} == set(record["source"])
    assert record["hardware"]["cpu_cores"] > 0
    assert record["command_line"]

    metrics = read_metrics(folder)
    assert [row["round_index"] for row in metrics] == [0, 1, 2]
    assert all(set(row) >= ROUND_KEYS for row in metrics)
    assert undocumented(metrics) == set()
    assert undocumented([{"test/los": 1.0}]) == {"test/los"}
    assert ["test/loss_initial" in row for row in metrics] == [True, False, False]
    assert metrics[-1]["test/loss"] < metrics[0]["test/loss_initial"]
    assert metrics[0]["test/perplexity"] == pytest.approx(math.exp(metrics[0]["test/loss"]))
    one_way = (
        4 * 2 * (2 * 16 + 2 * 16) * 2
    )  # bytes of float32, A and B of rank 2, two modules in each of two layers
    assert metrics[0]["comm/uplink_bytes"] == metrics[0]["comm/downlink_bytes"] == 3 * one_way

    table = pq.read_table(folder / "clients.parquet")
    assert table.column_names == list(CLIENT_COLUMNS)
    assert table.num_rows == 9
    assert table["round_index"].to_pylist() == [0] * 3 + [1] * 3 + [2] * 3
    after = table["test_loss_after"].to_pylist()[-3:]
    assert metrics[-1]["fairness/test_loss_variance"] == pytest.approx(np.var(after))

    partition = json.loads((folder / "partition.json").read_text())
    held = pq.read_table(folder / "partition.parquet").to_pandas()
    sizes = held[held.use == "train"].groupby("client_id").size()
    assert sizes.tolist() == partition["sizes"]
    assert not held.example.duplicated().any()
    assert partition["num_clients"] == len(partition["sizes"]) == 6
    assert partition["mean_pairwise_overlap"] == 0
    assert len(partition["class_edges"]) == 2
    assert np.array(partition["client_class_counts"]).sum() == sum(partition["sizes"])

    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["round_000002", "round_000003"]
    assert metrics[-1]["test/loss"] == pytest.approx(
        loss_with_peft(program, config, folder / "adapter"), rel=1e-5
    )
    offline = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(offline) == 1
    assert offline[0].stat().st_size > 0

    before = snapshot(folder)
    capsys.readouterr()
    from fedsim.main import main

    assert main([str(folder / "config.yaml")]) == 0  # the saved configuration is the same run
    assert capsys.readouterr().err == ""
    assert snapshot(folder) == before


def loss_with_peft(program: Any, config: Any, adapter: Path) -> float:
    """Loss on the global test set in nats per label token, with plain transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(program.settings["model.name_or_path"])
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    test = build_data(config.data, build_tokenizer(config.model), config.run.seed).test
    total, count = 0.0, 0
    for index in range(len(test)):
        ids = collate(test, [index], 1).input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def test_dry_run_writes_nothing(program: Any, capsys: Any, snapshot: Snapshot) -> None:
    before = snapshot(program.folder)
    assert program.run("--dry-run") == 0
    printed = capsys.readouterr().out
    assert snapshot(program.folder) == before
    for fragment in (
        "dirichlet_alpha: 1.0",
        "256 trainable parameters",
        "6,560 parameters, 6,816 with the adapter",
        "6 clients with ",
        "3 length classes of ",
        "1,024 bytes a client and direction",
        "6,144 bytes a round",
    ):
        assert fragment in printed
    path = program.folder / "again.yaml"
    path.write_text(printed.partition("\nmodel  ")[0])
    assert load_config(path).run.name == "small"  # the printed configuration can be run


ARMS: dict[str, list[str]] = {
    "fedavg": [],
    "iid": ["data.partition.name=iid", "aggregation.client_weights=uniform"],
    "quantity_skew": ["data.partition.name=quantity_skew", "aggregation.client_weights=tokens"],
    "own_split": ["evaluation.client_test=own_split", "data.client_test_fraction=0.2"],
    "no_client_test": ["evaluation.client_test=off", "evaluation.every_rounds=2"],
    "local": ["strategy.name=local"],
    "centralized": ["strategy.name=centralized"],
    "two_packs": ["training.pack.num_packs=2", "training.gradient_accumulation_steps=2"],
    "sgd_steps": ["training.optimizer.name=sgd", "training.optimizer.momentum=0.9", "training.local_steps=5"],
    "float64_rslora": ["model.dtype=float64", "lora.use_rslora=true", "lora.target_modules=[fc1, out_proj]"],
}  # fmt: skip


@pytest.mark.parametrize("arm", ARMS)
def test_losses_are_those_of_the_golden_file(arm: str, program: Any, refresh_golden: bool) -> None:
    assert program.run(*LEARNING, *ARMS[arm]) == 0
    metrics = read_metrics(program.run_folder)
    keys = ("test/loss_initial", "test/loss", "train/loss", "fairness/test_loss_variance")
    losses = {key: [row[key] for row in metrics if key in row] for key in keys}
    if refresh_golden:
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps(known | {arm: losses}, indent=1, sort_keys=True) + "\n")
    assert GOLDEN.exists(), "tests/golden/e2e_losses.json is missing; make it with pytest --refresh-golden"
    expected = json.loads(GOLDEN.read_text())[arm]
    assert set(losses) == set(expected)
    for key, values in losses.items():
        # a variance of nearly equal losses loses digits of theirs
        assert values == pytest.approx(expected[key], rel=1e-5, abs=1e-7 if "variance" in key else 0), key
    check_shape_of(arm, program.run_folder, metrics)


def check_shape_of(arm: str, folder: Path, metrics: list[dict[str, Any]]) -> None:
    """What differs between the arms apart from the numbers."""
    table = client_columns(folder)
    assert run_record(folder)["status"] == "finished"
    if arm == "no_client_test":
        assert ["test/loss" in row for row in metrics] == [False, True, True]
        assert set(table["test_loss_after"]) == {None}
    else:
        assert None not in table["test_loss_after"]
    if arm == "local":
        trained = {f"client_{client_id:06d}" for client_id in table["client_id"]}
        assert {path.name for path in (folder / "adapters").iterdir()} == trained
        assert not (folder / "adapter").exists()
    else:
        assert (folder / "adapter" / "adapter_config.json").is_file()
    if arm == "centralized":
        assert table["client_id"] == [-1, -1, -1]
        # as many examples as the cohort of fedavg would see
        assert table["num_examples"] == [3 * 27] * 3
    if arm == "own_split":
        assert len(set(table["test_loss_before"][:3])) == 3  # one adapter, three test sets
    if arm == "sgd_steps":
        assert set(table["steps"]) == {5}


class Killed(BaseException):
    """Stands for a process that dies: nothing in fedsim catches it on purpose."""


def die(*arguments: object, **named: object) -> None:
    raise Killed


def during_the_record(patch: pytest.MonkeyPatch) -> None:
    """Die when round 2 is in metrics.jsonl, and in nothing else."""
    append = records.MetricsLog.append

    def append_and_die(log: Any, record: Any) -> None:
        append(log, record)
        if record["round_index"] == 1:
            raise Killed

    patch.setattr(records.MetricsLog, "append", append_and_die)


def during_the_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """Die with the checkpoint of round 2 half written, leaving its files behind as a killed process does."""
    replace = checkpoint.replace_folder

    def replace_or_die(path: Path, build: Callable[[Path], None]) -> None:
        if path.name == "round_000002":
            unfinished = path.with_name(f".{path.name}-0123abcd")
            unfinished.mkdir()
            (unfinished / checkpoint.TENSORS_FILE).write_bytes(b"half")
            raise Killed
        replace(path, build)

    patch.setattr(checkpoint, "replace_folder", replace_or_die)


def before_the_adapter(patch: pytest.MonkeyPatch) -> None:
    """Die when all rounds are done and the adapter is not there."""
    patch.setattr(export, "save_peft_adapter", die)


def after_the_adapter(patch: pytest.MonkeyPatch) -> None:
    """Die when only the word `finished` is missing."""
    patch.setattr(records.RunFolder, "finish", die)


def on_an_interrupt(patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while round 2 trains."""
    train = rounds.run_round

    def interrupt(state: Any, run: Any) -> Any:
        if state.round_index == 1:
            raise KeyboardInterrupt
        return train(state, run)

    patch.setattr(rounds, "run_round", interrupt)


@pytest.mark.parametrize(
    ("death", "strategy"),
    [
        (during_the_record, "fedavg"),
        (during_the_record, "local"),
        (during_the_checkpoint, "fedavg"),
        (before_the_adapter, "local"),
        (after_the_adapter, "fedavg"),
        (on_an_interrupt, "centralized"),
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(
    death: Callable[[pytest.MonkeyPatch], None], strategy: str, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*LEARNING, f"strategy.name={strategy}"]
    assert program.run(*command, "run.name=whole") == 0
    with monkeypatch.context() as patch:
        death(patch)
        if death is on_an_interrupt:
            assert program.run(*command) == 130
        else:
            with pytest.raises(Killed):
                program.run(*command)
    folder = program.run_folder
    assert run_record(folder)["status"] != "finished"
    assert program.run(*command) == 0
    whole = folder.with_name("whole")
    assert without_clock(folder) == without_clock(whole)
    assert client_columns(folder) == client_columns(whole)
    adapters = {
        path.relative_to(whole): path.read_bytes() for path in whole.glob("adapter*/**/*.safetensors")
    }
    assert adapters
    assert {
        path.relative_to(folder): path.read_bytes() for path in folder.glob("adapter*/**/*.safetensors")
    } == adapters
    assert run_record(folder)["status"] == "finished"
    assert len(run_record(folder)["history"]) == 1
    assert not [path for path in folder.rglob(".*") if path.is_dir()], "a half-written folder stays for ever"


def test_finished_run_can_be_extended(program: Any, snapshot: Snapshot, capsys: Any) -> None:
    assert program.run(*LEARNING, "run.name=whole", "run.rounds=4") == 0
    assert program.run(*LEARNING, "run.rounds=2") == 0
    folder = program.run_folder
    before = snapshot(folder)
    assert program.run(*LEARNING, "run.rounds=2") == 0
    assert program.run(*LEARNING, "run.rounds=1") == 0
    assert snapshot(folder) == before

    assert program.run(*LEARNING, "run.rounds=4") == 0
    assert without_clock(folder) == without_clock(folder.with_name("whole"))
    assert adapter_bytes(folder) == adapter_bytes(folder.with_name("whole"))

    capsys.readouterr()
    before = snapshot(folder)
    assert program.run(*LEARNING, "run.rounds=4", "lora.rank=3") == 2
    assert "lora.rank: 2 -> 3" in capsys.readouterr().err
    assert snapshot(folder) == before


def test_damaged_newest_checkpoint_costs_one_round(program: Any) -> None:
    assert program.run(*LEARNING, "run.name=whole") == 0
    assert program.run(*LEARNING, "run.rounds=2") == 0
    (program.run_folder / "checkpoints" / "round_000002" / "state.safetensors").write_bytes(b"damaged")
    assert program.run(*LEARNING) == 0
    whole = program.run_folder.with_name("whole")
    assert adapter_bytes(program.run_folder) == adapter_bytes(whole)
    assert without_clock(program.run_folder) == without_clock(whole)


def test_a_damaged_checkpoint_does_not_outlive_those_written_after_going_back(
    program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would count as the newest, and each one written after it would be deleted as older."""
    chosen = [*LEARNING, "checkpoint.keep_last=1"]
    assert program.run(*LEARNING, "run.rounds=3", "checkpoint.keep_last=3") == 0
    checkpoints = program.run_folder / "checkpoints"
    for name in ("round_000002", "round_000003"):
        (checkpoints / name / "state.safetensors").write_bytes(b"damaged")
    save = checkpoint.CheckpointWriter.save
    there: list[tuple[int, list[str]]] = []

    def watched(self: Any, state: Any, keep_last: int) -> None:
        save(self, state, keep_last)
        self.wait()
        there.append((state.round_index, [path.name for path in checkpoint.list_checkpoints(checkpoints)]))

    monkeypatch.setattr(checkpoint.CheckpointWriter, "save", watched)
    assert program.run(*chosen, "run.rounds=4") == 0
    assert there == [(rounds, [f"round_{rounds:06d}"]) for rounds in (2, 3, 4)]


def test_any_number_of_processes(program: Any) -> None:
    """One, two and three processes write the same bits, with dropout on; three are more than there are packs."""
    command = [
        "lora.dropout=0.2",
        "run.rounds=2",
        "training.pack.num_packs=2",
        "data.client_test_fraction=0.2",
    ]
    assert program.run(*command) == 0
    alone = program.run_folder
    for world_size in (2, 3):
        name = f"with-{world_size}"
        for code, errors in program.start_ranks(world_size, *command, f"run.name={name}"):
            assert code == 0, errors
        together = alone.with_name(name)
        assert run_record(together)["world_size"] == world_size
        assert (
            hashlib.sha256(adapter_bytes(together)).digest() == hashlib.sha256(adapter_bytes(alone)).digest()
        )
        assert without_clock(together) == without_clock(alone)
        assert client_columns(together) == client_columns(alone)
        assert (together / "partition.json").read_bytes() == (alone / "partition.json").read_bytes()


def test_resume_with_another_number_of_processes(program: Any) -> None:
    assert program.run(*LEARNING, "run.name=whole") == 0
    assert program.run(*LEARNING, "run.rounds=1") == 0
    for code, errors in program.start_ranks(2, *LEARNING):
        assert code == 0, errors
    assert adapter_bytes(program.run_folder) == adapter_bytes(program.run_folder.with_name("whole"))
    assert without_clock(program.run_folder) == without_clock(program.run_folder.with_name("whole"))


def test_a_dry_run_refuses_the_folder_of_another_run(
    program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run(*LEARNING, "run.rounds=1") == 0
    assert program.run(*LEARNING, "run.rounds=1", "--dry-run") == 0
    assert program.run(*LEARNING, "run.rounds=1", "lora.rank=1", "--dry-run") == 2
    assert "belongs to a run with another configuration (lora.rank: 2 -> 1)" in capsys.readouterr().err


def test_a_finished_run_says_how_many_rounds_it_has(program: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert program.run(*LEARNING, "run.rounds=3") == 0
    assert program.run(*LEARNING, "run.rounds=1") == 0
    assert "is finished (3 rounds); nothing to do" in caplog.text
