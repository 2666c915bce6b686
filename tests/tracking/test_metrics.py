import errno
import json
import logging
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsim.errors import RunFolderError
from fedsim.tracking.metrics import ClientTable, MetricsLog, whole_rounds


def record(round_index, **more):
    return {"round_index": round_index, "test/loss": 4.5 - round_index / 10, **more}


def row(round_index, client_id, **more):
    return {
        "round_index": round_index,
        "client_id": client_id,
        "num_examples": 40,
        "num_tokens": 900,
        "lora_rank": 2,
        "steps": 5,
        "train_loss_first": 5.0,
        "train_loss_last": 4.0,
        "train_loss_mean": 4.5,
        "test_loss_before": 4.9,
        "test_loss_after": 4.8,
        "trained_parameters": 96,
        "uplink_bytes": 384,
        "downlink_bytes": 384,
        "pack": 0,
        "process_rank": 0,
        "seconds": 1.5,
        "simulated_s": 30.0,
        **more,
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_each_record_is_one_line_and_comes_back(path):
    log = MetricsLog(path)
    log.append(record(0, **{"fairness/test_loss_variance": None, "note": "ä\n"}))
    log.append(record(1))
    assert [json.loads(line)["round_index"] for line in path.read_text().splitlines()] == [0, 1]
    assert log.read() == [record(0, **{"fairness/test_loss_variance": None, "note": "ä\n"}), record(1)]


def test_values_that_json_lacks_are_null_with_a_word_beside_them(path):
    log = MetricsLog(path)
    log.append({"round_index": 0, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {
        "round_index": 0,
        "a": None,
        "a/not_finite": "nan",
        "b": None,
        "b/not_finite": "inf",
        "c": None,
        "c/not_finite": "-inf",
        "d": 1.0,
    }


@pytest.mark.parametrize("round_index", [0, 3, -1])
def test_round_index_must_grow_also_after_reopening(path, round_index):
    MetricsLog(path).append(record(3))
    with pytest.raises(RunFolderError, match=f"larger than that of the last record, 3, got {round_index}"):
        MetricsLog(path).append(record(round_index))


@pytest.mark.parametrize(
    "tail", [b'{"round_index": 2, "test/lo', b'{"round_index": 2}', b"\x00\x00\x00", b"\x00\n"]
)
def test_torn_last_line_is_dropped_and_said(path, caplog, tail):
    log = MetricsLog(path)
    log.append(record(0))
    log.append(record(1))
    with path.open("ab") as file:
        file.write(tail)
    with caplog.at_level(logging.WARNING):
        log = MetricsLog(path)
    assert "its last line is dropped" in caplog.text
    log.append(record(2))
    assert log.read() == [record(0), record(1), record(2)]


@pytest.mark.parametrize("line", ["{", "[]", '{"a": 1}', '{"round_index": 0}', '{"round_index": "1"}'])
def test_damage_before_the_last_line_is_refused(path, line):
    path.write_text(f'{{"round_index": 0}}\n{line}\n{{"round_index": 2}}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl line 2 must be a JSON object"):
        MetricsLog(path)


@pytest.mark.parametrize(("before_round", "kept"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 1, 2])])
def test_truncate_forgets_the_rounds_to_be_repeated(path, before_round, kept):
    log = MetricsLog(path)
    for round_index in range(3):
        log.append(record(round_index))
    log.truncate(before_round)
    assert [read["round_index"] for read in MetricsLog(path).read()] == kept
    if before_round < 3:
        log.append(record(before_round))
        assert [read["round_index"] for read in log.read()] == [*kept, before_round]


def test_empty_log_has_no_records_and_no_file(path):
    log = MetricsLog(path)
    log.truncate(0)
    assert log.read() == []
    assert not path.exists()


def test_log_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"cannot be read \(Is a directory\)"):
        MetricsLog(tmp_path)
    with pytest.raises(RunFolderError, match=r"cannot be written \(No such file or directory\)"):
        MetricsLog(tmp_path / "none" / "metrics.jsonl").append(record(0))


@pytest.fixture
def table_path(tmp_path):
    # A name that pyarrow's dataset reader would take for a column.
    folder = tmp_path / "dirichlet_alpha=0.1"
    folder.mkdir()
    return folder / "clients.parquet"


def test_client_table_has_the_agreed_columns(table_path):
    table = ClientTable(table_path)
    table.flush()
    schema = pq.read_schema(table_path)
    floats = [
        "train_loss_first",
        "train_loss_last",
        "train_loss_mean",
        "test_loss_before",
        "test_loss_after",
        "seconds",
        "simulated_s",
    ]
    assert schema.names == list(row(0, 0))
    assert [field.name for field in schema if field.type == pa.float64()] == floats
    assert all(field.type in (pa.int64(), pa.float64()) for field in schema)
    assert [field.name for field in schema if field.nullable] == [
        "test_loss_before",
        "test_loss_after",
        "simulated_s",
    ]


def test_client_table_grows_over_restarts(table_path):
    table = ClientTable(table_path)
    table.append_rows([row(0, 3), row(0, 7, test_loss_before=None, train_loss_last=math.nan)])
    table.append_rows([])
    assert not table_path.exists()
    table.flush()
    table = ClientTable(table_path)
    table.append_rows([row(1, 3)])
    table.flush()
    read = pq.ParquetFile(table_path).read().to_pylist()
    assert [(one["round_index"], one["client_id"]) for one in read] == [(0, 3), (0, 7), (1, 3)]
    assert read[1]["test_loss_before"] is None
    assert math.isnan(read[1]["train_loss_last"])
    assert table.num_rows == 3
    assert table.newest(2)["client_id"].to_pylist() == [7, 3]
    assert table.newest(9).num_rows == 3


def test_client_table_truncates_on_the_disk_too(table_path):
    table = ClientTable(table_path)
    table.append_rows([row(round_index, client_id) for round_index in range(3) for client_id in range(2)])
    table.flush()
    table.truncate(1)
    assert ClientTable(table_path).newest(10)["round_index"].to_pylist() == [0, 0]
    table.append_rows([row(1, 0)])
    assert table.num_rows == 3


def pairs(table):
    return list(zip(table["round_index"].to_pylist(), table["client_id"].to_pylist(), strict=True))


def test_client_table_in_many_groups(table_path, monkeypatch):
    """Rows that are on the disk are read from there in groups; order, truncation and the newest rows do not show it."""
    monkeypatch.setattr("fedsim.tracking.metrics.GROUP_ROWS", 4)
    table, written = ClientTable(table_path), []
    for round_index in range(9):
        clients = range(round_index % 4)
        table.append_rows([row(round_index, client_id) for client_id in clients])
        written += [(round_index, client_id) for client_id in clients]
        if round_index % 2:
            table.flush()
    assert table.num_rows == len(written) == 12
    assert table.rounds() == {1, 2, 3, 5, 6, 7}
    for num_rows in (0, 1, 3, 5, 11, 12, 20):
        assert pairs(table.newest(num_rows)) == written[max(0, 12 - num_rows) :], num_rows
    with pq.ParquetFile(table_path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert min(sizes[:-1]) >= 4
        assert sum(sizes) == 12
    table.append_rows([row(9, 0)])
    table.truncate(6)
    assert pairs(table.newest(99)) == [pair for pair in written if pair[0] < 6]
    assert pairs(ClientTable(table_path).newest(99)) == [pair for pair in written if pair[0] < 6]
    assert table.rounds() == {1, 2, 3, 5}
    table.truncate(0)
    assert table.num_rows == ClientTable(table_path).num_rows == 0


def test_client_table_holds_no_row_that_is_on_the_disk(table_path):
    """Its memory would grow with the rounds else: 144 bytes a row here, 14 MB."""
    table = ClientTable(table_path)
    for round_index in range(10):
        table.append_rows([row(round_index, client_id) for client_id in range(10_000)])
        table.flush()
    pool = pa.default_memory_pool()
    assert table.num_rows == 100_000
    assert pool.bytes_allocated() < 2_000_000
    held = table.newest(100_000)
    assert pool.bytes_allocated() > 10_000_000  # what would be seen if they were held
    assert pairs(held)[-1] == (9, 9_999)


def test_many_new_rows_do_not_wait_for_a_flush(table_path, monkeypatch):
    """Checkpoints may be far apart."""
    monkeypatch.setattr("fedsim.tracking.metrics.GROUP_ROWS", 4)
    table = ClientTable(table_path)
    table.append_rows([row(0, 0), row(0, 1), row(0, 2)])
    assert not table_path.exists()
    table.append_rows([row(1, 0)])
    assert pairs(ClientTable(table_path).newest(9)) == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_rows_are_kept_when_they_cannot_be_written(table_path, monkeypatch):
    table = ClientTable(table_path)
    table.append_rows([row(0, 0), row(0, 1)])
    table.flush()
    table.append_rows([row(1, 0)])
    whole = table_path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedsim.atomic.os.fsync", full)
        with pytest.raises(
            RunFolderError, match=r"clients\.parquet must be writable \(No space left on device\)"
        ):
            table.flush()
    assert table_path.read_bytes() == whole
    assert table.num_rows == 3
    table.flush()
    assert pairs(ClientTable(table_path).newest(9)) == [(0, 0), (0, 1), (1, 0)]


def test_a_table_that_vanished_is_missed(table_path):
    """Nothing could put its rows back, so the run must not go on as if there had been none."""
    table = ClientTable(table_path)
    table.append_rows([row(0, 0)])
    table.flush()
    table_path.unlink()
    table.append_rows([row(1, 0)])
    with pytest.raises(RunFolderError, match=r"clients\.parquet cannot be read \(No such file"):
        table.flush()
    assert not table_path.exists()


def test_rows_with_wrong_columns_are_refused(table_path):
    table = ClientTable(table_path)
    short = row(0, 0)
    del short["steps"]
    with pytest.raises(ValueError, match=r"lacks \['steps'\]"):
        table.append_rows([short])
    with pytest.raises(ValueError, match=r"unknown columns \['speed'\]"):
        table.append_rows([row(0, 0, speed=1)])
    assert table.num_rows == 0


def test_damaged_or_foreign_table_is_one_line(table_path):
    table_path.write_bytes(b"not parquet")
    with pytest.raises(RunFolderError, match=r"clients\.parquet cannot be read") as caught:
        ClientTable(table_path)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"a": [1]}), table_path)
    with pytest.raises(RunFolderError, match=r"must have the columns round_index.*got a; "):
        ClientTable(table_path)


def test_whole_rounds_are_those_without_a_gap(tmp_path):
    """The client table says nothing about rounds without clients, and everything about the others."""
    log, table = MetricsLog(tmp_path / "metrics.jsonl"), ClientTable(tmp_path / "clients.parquet")
    for round_index, num_clients in enumerate((1, 0, 2, 2, 1)):
        log.append(record(round_index) | {"cohort/num_clients": num_clients})
        if round_index not in (1, 3):
            table.append_rows([row(round_index, 7)])
    assert whole_rounds(log, table) == 3
    table.append_rows([row(3, 7)])
    assert whole_rounds(log, table) == 5
    lines = log._path.read_text().splitlines(keepends=True)
    log._path.write_text("".join(lines[:2] + lines[3:]))
    assert whole_rounds(MetricsLog(log._path), table) == 2
    log._path.write_text("".join(lines[1:]))
    assert whole_rounds(MetricsLog(log._path), table) == 0


def test_no_flipped_bit_changes_the_table_unnoticed(tmp_path):
    path = tmp_path / "clients.parquet"
    table = ClientTable(path)
    table.append_rows([row(round_index, client_id) for round_index in range(3) for client_id in range(4)])
    table.flush()
    whole, rows = path.read_bytes(), pq.ParquetFile(path).read()
    refused = 0
    for index in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(bytes(damaged))
        try:
            assert ClientTable(path).newest(99).equals(rows), index
        except RunFolderError:
            refused += 1
    assert refused > len(whole) / 44
