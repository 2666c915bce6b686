"""The record of a run in numbers.

`metrics.jsonl` has one object per round, `clients.parquet` one row per client and round.
"""

import collections
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fedsim.atomic import replacing_file, write_text_atomic
from fedsim.errors import RunFolderError

Scalar = float | int | str | None

logger = logging.getLogger(__name__)

ROUND = "round_index"

CLIENT_COLUMNS = {
    ROUND: pa.int64(),
    "client_id": pa.int64(),
    "num_examples": pa.int64(),
    "num_tokens": pa.int64(),  # label tokens of one pass over the client's training examples
    "lora_rank": pa.int64(),
    "steps": pa.int64(),
    "train_loss_first": pa.float64(),
    "train_loss_last": pa.float64(),
    "train_loss_mean": pa.float64(),
    "test_loss_before": pa.float64(),
    "test_loss_after": pa.float64(),
    "trained_parameters": pa.int64(),
    "uplink_bytes": pa.int64(),
    "downlink_bytes": pa.int64(),
    "pack": pa.int64(),
    "process_rank": pa.int64(),
    "seconds": pa.float64(),
    "simulated_s": pa.float64(),
}
GROUP_ROWS = 2**16
"""Rows of `clients.parquet` that are written and read at a time, 9 MiB in memory."""

MAY_BE_MISSING = frozenset({"test_loss_before", "test_loss_after", "simulated_s"})


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line and round, on the disk when `append` returns.

    JSON has no NaN and no infinity: such a value is written as null, with `nan`, `inf` or `-inf` under
    `<key>/not_finite` beside it.

    A last line that was cut off by a crash does not count, and is gone from the file after the next change.

    Raises:
        RunFolderError: the file cannot be read or written, or a line before the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        records, self._torn = self._load()
        if self._torn:
            logger.warning("%s: its last line is dropped, which a crash had cut off", path)
        self._last_round: int = records[-1][ROUND] if records else -1

    def append(self, record: Mapping[str, Scalar | tuple[float, ...]]) -> None:
        """Add a round, whose `round_index` must be larger than that of every round before.

        Values may also be lists of finite numbers.
        """
        round_index = record[ROUND]
        if not isinstance(round_index, int) or round_index <= self._last_round:
            raise RunFolderError(
                f"{self._path}: {ROUND} must be larger than that of the last record, {self._last_round}, "
                f"got {round_index}"
            )
        line = _to_line(record).encode("utf-8")
        self._drop_torn_line()
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _cannot("written", self._path, error) from error
        self._last_round = round_index

    def truncate(self, before_round: int) -> None:
        """Forget the rounds from `before_round` on, because they will be run again."""
        if self._last_round < before_round:
            self._drop_torn_line()
            return
        kept = [record for record in self.read() if record[ROUND] < before_round]
        self._rewrite(kept)
        self._last_round = kept[-1][ROUND] if kept else -1

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return self._load()[0]

    def _drop_torn_line(self) -> None:
        if self._torn:
            self._rewrite(self.read())

    def _rewrite(self, records: Sequence[Mapping[str, Scalar]]) -> None:
        write_text_atomic(self._path, "".join(_to_line(record) for record in records))
        self._torn = False

    def _load(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole records, and whether a torn line follows them."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], False
        except OSError as error:
            raise _cannot("read", self._path, error) from error
        torn = lines.pop() != b""  # what stands behind the last newline: nothing, unless a write was cut off
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            record = _from_line(line)
            if record is None and number == len(lines) and not torn:
                torn = True  # a file system may keep the length of a write and lose its content
            elif record is None or (records and record[ROUND] <= records[-1][ROUND]):
                raise RunFolderError(
                    f"{self._path} line {number} must be a JSON object with a larger {ROUND} than "
                    "the line before; repair or delete the line"
                )
            else:
                records.append(record)
        return records, torn


class ClientTable:
    """`clients.parquet`: a row for each client and round, columns as in `CLIENT_COLUMNS`.

    New rows are kept in columns, 144 bytes each, until `flush` puts them on the disk or there are `GROUP_ROWS` of them.
    That writes the whole file anew, and holds as many of its rows at a time, so memory does not grow with the rounds.

    Raises:
        RunFolderError: the file cannot be read or written, or its columns are not those of this version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._exists = path.exists()
        self._new: list[pa.Table] = []
        self._rounds: set[int] = set()
        self._num_rows = 0
        for table in self._on_disk():
            self._count(table)

    @property
    def num_rows(self) -> int:
        """Rows of all rounds, flushed or not."""
        return self._num_rows

    def append_rows(self, rows: Sequence[Mapping[str, Scalar]]) -> None:
        """Add clients of a round; each row has every column; those in `MAY_BE_MISSING` may be None."""
        if not rows:
            return
        for row in rows:
            missing = [
                name for name in CLIENT_COLUMNS if name not in MAY_BE_MISSING and row.get(name) is None
            ]
            unknown = sorted(set(row) - set(CLIENT_COLUMNS))
            if missing or unknown:
                raise ValueError(
                    f"a row of {self._path.name} lacks {missing} or has unknown columns {unknown}"
                )
        table = pa.Table.from_pylist(list(rows), schema=client_schema())
        self._new.append(table)
        self._count(table)
        if sum(one.num_rows for one in self._new) >= GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the file, if rows were added since the last time or it is not there yet."""
        if self._new or not self._exists:
            self._write(itertools.chain(self._on_disk(), self._new))

    def truncate(self, before_round: int) -> None:
        """Forget the rounds from `before_round` on, also on the disk."""
        if max(self._rounds, default=-1) < before_round:
            return
        whole = itertools.chain(self._on_disk(), self._new)
        self._write(table.filter(pc.less(table[ROUND], before_round)) for table in whole)

    def rounds(self) -> set[int]:
        """The rounds that have rows, flushed or not."""
        return set(self._rounds)

    def newest(self, num_rows: int) -> pa.Table:
        """The last `num_rows` rows, oldest first."""
        found = collections.deque([client_schema().empty_table()])
        held = 0
        for table in itertools.chain(reversed(self._new), self._on_disk(backwards=True)):
            if held >= num_rows:
                break
            found.appendleft(table)
            held += table.num_rows
        return pa.concat_tables(found).slice(max(0, held - num_rows))

    def _count(self, table: pa.Table) -> None:
        self._rounds |= _rounds_of(table)
        self._num_rows += table.num_rows

    def _write(self, tables: Iterable[pa.Table]) -> None:
        """Put the rows of `tables` into the file; what was held in memory is dropped once they are there."""
        rounds: set[int] = set()
        num_rows = 0
        with (
            replacing_file(self._path) as file,
            pq.ParquetWriter(file, client_schema(), compression="zstd", write_page_checksum=True) as writer,
        ):
            for table in _in_groups(tables):
                writer.write_table(table)
                rounds |= _rounds_of(table)
                num_rows += table.num_rows
        self._rounds, self._num_rows = rounds, num_rows
        self._new, self._exists = [], True
        pa.default_memory_pool().release_unused()

    def _on_disk(self, backwards: bool = False) -> Iterator[pa.Table]:
        """The file's rows, a row group at a time."""
        if not self._exists:
            return
        try:
            # Not pq.read_table: that takes a folder named alpha=0.1 above the file for a column.
            with (
                self._path.open("rb") as stream,
                pq.ParquetFile(stream, page_checksum_verification=True) as file,
            ):
                if file.schema_arrow != client_schema():
                    raise RunFolderError(
                        f"{self._path} must have the columns {', '.join(CLIENT_COLUMNS)}, "
                        f"got {', '.join(file.schema_arrow.names)}; choose another run.name, or delete the run folder"
                    )
                groups = range(file.num_row_groups)
                for group in reversed(groups) if backwards else groups:
                    yield file.read_row_group(group)
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise _cannot("read", self._path, error) from error


def _rounds_of(table: pa.Table) -> set[int]:
    return set(pc.unique(table[ROUND]).to_pylist())


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in the same order, in tables of at least `GROUP_ROWS`, but for the last."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(one.num_rows for one in held) >= GROUP_ROWS:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def client_schema() -> pa.Schema:
    """Names and types of the columns of `clients.parquet`."""
    return pa.schema(
        [pa.field(name, kind, nullable=name in MAY_BE_MISSING) for name, kind in CLIENT_COLUMNS.items()]
    )


def _to_line(record: Mapping[str, Scalar | tuple[float, ...]]) -> str:
    written: dict[str, Scalar | tuple[float, ...]] = {}
    for name, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            written[name] = None
            written[f"{name}/not_finite"] = str(float(value))
        else:
            written[name] = value
    return json.dumps(written, allow_nan=False) + "\n"


def whole_rounds(log: MetricsLog, table: ClientTable) -> int:
    """Rounds, from the first on, that the record has without a gap: in `log`, and those with clients in `table`."""
    with_rows = table.rounds()
    whole = 0
    for record in log.read():
        if record[ROUND] != whole or (record.get("cohort/num_clients") and whole not in with_rows):
            break
        whole += 1
    return whole


def _from_line(line: bytes) -> dict[str, Any] | None:
    """The record, or None if the line does not hold one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and type(record.get(ROUND)) is int
    return record if is_record else None


def _cannot(what: str, path: Path, error: Exception) -> RunFolderError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return RunFolderError(f"{path} cannot be {what} ({reason}); free space, or choose another run.name")
