"""Reading run folders: what is found, what is forgiven, what is refused and how."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.errors import RunFolderError
from fedsim.report.build import make_report
from fedsim.report.folders import find_runs, read_run
from tests.report.synthetic_runs import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs", rounds=2, spectra=True)


def test_a_run_is_read_as_it_was_written(run):
    record = read_run(run)
    assert record.name == "run-0"
    assert (record.status, record.reason, record.seed) == ("finished", "", 0)
    assert [one["round_index"] for one in record.metrics] == [0, 1]
    assert record.spectra[1]["layer.q"] == [1.0, 0.5, 0.0]
    assert record.partition["sizes"].sum() == 40
    assert record.partition["client_class_counts"].shape == (6, 3)
    assert record.clients["client_id"].tolist() == [0, 1, 2, 1, 2, 3]
    assert record.config["cohort.size"] == 3
    assert "config" not in record.info


def test_losses_that_were_not_measured_are_nan(tmp_path):
    record = read_run(write_run(tmp_path, rounds=1, client_tests=False))
    assert np.isnan(record.clients["test_loss_after"]).all()


def test_runs_are_found_below_folders_and_each_once(tmp_path):
    one = write_run(tmp_path / "sweep" / "deep", name="one", rounds=1)
    two = write_run(tmp_path / "sweep", name="two", rounds=1)
    (tmp_path / "sweep" / ".hidden").mkdir()
    found = find_runs([tmp_path / "sweep", two, tmp_path / "sweep" / ".." / "sweep" / "two"])
    assert found == [one, two]


def test_a_folder_whose_name_looks_like_a_partition_of_a_data_set_is_read(tmp_path):
    assert read_run(write_run(tmp_path / "alpha=0.1", rounds=1)).clients["client_id"].size == 3


@pytest.mark.parametrize("content", [None, "empty"])
def test_no_run_is_an_error(tmp_path, content):
    path = tmp_path / "there"
    if content:
        path.mkdir()
    with pytest.raises(RunFolderError, match=r"there must be a run folder"):
        find_runs([path])


def test_a_last_line_that_was_cut_off_is_forgiven_and_told(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round_index": 2, "test/lo')
    record = read_run(run)
    assert len(record.metrics) == 2
    assert record.warnings == ("the last line of metrics.jsonl was cut off and is left out",)
    assert any("run-0: the last line of metrics.jsonl" in note for note in make_report([run]).notes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "run: ["),
        ("config.yaml", "- 1"),
        ("config.yaml", "run: {seed: many}"),
        ("run.json", "{"),
        ("run.json", "[]"),
        ("metrics.jsonl", '{"round_index": 0}\nnonsense\n{"round_index": 1}\n'),
        ("metrics.jsonl", '{"round_index": 1}\n{"round_index": 1}\n{"round_index": 2}\n'),
        ("spectra.jsonl", '{}\n{"round_index": 1}\n'),
        ("partition.json", "{"),
        ("partition.json", "{}x"),
        ("partition.json", '{"sizes": [1, 2], "class_edges": [3], "client_class_counts": [[1, 0]]}'),
        ("partition.json", '{"sizes": []}'),
        ("partition.json", '{"sizes": "many"}'),
        ("partition.json", '{"num_clients": 3}'),
        ("clients.parquet", "PAR1"),
        ("metrics.jsonl", b"\xff\xfe"),
    ],
)
def test_a_damaged_file_is_named(run, name, content):
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunFolderError, match=name) as caught:
        read_run(run)
    assert "\n" not in str(caught.value)
    assert "repair the file, or leave this run out" in str(caught.value)


def test_a_table_without_the_columns_is_named(run):
    pq.write_table(pa.table({"round_index": [0]}), run / "clients.parquet")
    with pytest.raises(RunFolderError, match=r"clients\.parquet must be .* .no columns client_id"):
        read_run(run)


def test_files_that_a_run_need_not_have_may_be_missing(run):
    for name in ("partition.json", "clients.parquet", "spectra.jsonl"):
        (run / name).unlink()
    report = make_report([run])
    assert {"global_test_loss", "fairness"} <= {picture.name for picture in report.pictures}
    assert any("partition.json" in note for note in report.notes)
    assert any("no client was tested" in note for note in report.notes)


def test_sampled_lists_of_a_large_partition_keep_their_ids(run):
    partition = json.loads((run / "partition.json").read_text())
    partition |= {
        "num_clients": 900,
        "listed_clients": [0, 300, 600],
        "sizes": [5, 6, 7],
        "client_class_counts": [[5, 0, 0], [0, 6, 0], [3, 3, 1]],
    }
    (run / "partition.json").write_text(json.dumps(partition))
    pictures = {picture.name: picture for picture in make_report([run]).pictures}
    (axes,) = pictures["dirichlet_scatter"].figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "300", "600"]
    assert axes.get_xlabel() == "3 of 900 clients at equal distances"


def test_what_was_not_finite_is_a_gap(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = json.loads(lines[1]) | {"test/loss": None, "test/loss/not_finite": "nan"}
    (run / "metrics.jsonl").write_text(f"{lines[0]}\n{json.dumps(broken)}\n")
    record = read_run(run)
    assert list(record.values("test/loss")) == [0]
    report = make_report([run])
    assert any("the test loss was not finite after round 2" in note for note in report.notes)
    (results,) = (table for table in report.tables if table.name == "results")
    assert "not finite" in results.rows[0]
