"""A report of runs that the program itself has made, so that neither side can drift from the other."""

import json

import pytest

from fedsim.main import main
from fedsim.report.__main__ import main as report_main
from fedsim.report.build import make_report
from tests.helpers import random_texts, tiny_opt, word_tokenizer
from tests.report.test_report_figures import EVERY_FIGURE, RECORDED_ON_DEMAND, check


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """FlexLoRA with two tiers and two seeds, two rounds each."""
    folder = tmp_path_factory.mktemp("real")
    tiny_opt().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [
        json.dumps({"text": text, "kind": f"k{index % 3}"}) for index, text in enumerate(random_texts(120))
    ]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {
        "run.output_dir": folder / "runs",
        "run.rounds": 2,
        "data.source": folder / "texts.jsonl",
        "data.max_tokens": 24,
        "data.partition.num_clients": 6,
        "data.partition.num_length_classes": 3,
        "model.name_or_path": folder / "model",
        "cohort.size": 3,
        "strategy.name": "flexlora",
        "lora.tiers": "[{share: 0.5, rank: 2}, {share: 0.5, rank: 4}]",
        "training.batch_size": 4,
        "tracking.wandb.mode": "disabled",
        "tracking.progress": "off",
    }
    for seed in (0, 1):
        arguments = [f"{key}={value}" for key, value in settings.items()]
        assert main([*arguments, f"run.name=s{seed}", f"run.seed={seed}"]) == 0
    return folder / "runs"


def test_a_real_run_has_every_figure(runs):
    report = make_report([runs])
    assert report.notes == ()
    assert {picture.name for picture in report.pictures} == EVERY_FIGURE - RECORDED_ON_DEMAND - {
        "final_test_loss"
    } | {"energy_kept"}
    for picture in report.pictures:
        check(picture)


def test_a_real_run_fills_the_tables(runs):
    tables = {table.name: table for table in make_report([runs]).tables}
    results, parameters, all_runs = (tables[name] for name in ("results", "parameters", "runs"))
    assert results.rows[0][:3] == ("all runs", "0, 1", "2")
    assert "not measured" not in results.rows[0]
    # 2 layers x 2 modules x rank 2 or 4 x (16 in + 16 out)
    assert parameters.rows[0][3] == "256 to 512"
    assert [row[3:5] for row in all_runs.rows] == [("finished", "2 of 2")] * 2


def test_a_real_run_alone_is_reported_from_the_command_line(runs, tmp_path):
    assert report_main([str(runs / "s0"), "--out", str(tmp_path / "out"), "--clients", "0,1"]) == 0
    assert "<h1>fedsim report: 1 run of 1 configuration</h1>" in (tmp_path / "out" / "index.html").read_text()


def test_a_real_run_has_the_tables_of_resource_tiers(runs):
    tables = {table.name: table for table in make_report([runs], target_loss=100.0).tables}
    assert {"loss_by_method", "rounds_to_target", "tiers", "truncation"} <= set(tables)
    lines = tables["tiers"].rows
    assert [line[2] for line in lines] == ["2 everywhere", "4 everywhere"]
    assert sum(int(line[4]) for line in lines) == 2 * 2 * 3  # seeds, rounds, clients of a round
    assert [line[5] for line in lines] == ["256", "512"]
    for line in lines:
        assert float(line[8].split(" ")[0]) > 0
        assert line[10].endswith("MiB")
    assert "too small" not in tables["truncation"].note  # the program records the squared norms
