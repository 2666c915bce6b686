"""Run folders as a report reads them: files only, each checked when it is opened."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedsim.config.keys import all_keys, flatten
from fedsim.config.yaml_text import read_yaml
from fedsim.errors import ConfigError, RunFolderError

ROUND = "round_index"
ENERGY = "/energy"
"""What follows a module's name in `spectra.jsonl` where its squared norm stands."""

DEEPEST = 4
"""Levels of folders below a given one in which runs are looked for."""

CLIENT_COLUMNS = (
    ROUND,
    "client_id",
    "num_examples",
    "lora_rank",
    "steps",
    "trained_parameters",
    "uplink_bytes",
    "seconds",
    "test_loss_before",
    "test_loss_after",
)
"""Columns of `clients.parquet` that a report needs."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        path: the run folder as it was given.
        status: `running`, `finished`, `preempted` or `failed`.
        reason: why it ended, unless it is finished.
        config: dotted key -> value; a key that the folder does not have is at its default.
        info: `run.json` without the configuration.
        metrics: one record per round, oldest first; what was not finite is None.
        spectra: round -> module -> singular values, largest first.
        energies: round -> module -> squared norm of the average update, what was cut off included; a module is missing
            where the run did not record it.
        partition: `partition.json`; empty if there is none.
        clients: column -> values, a row per client and round; a loss that was not measured is NaN. Empty
            columns if there is no file.
        tiers: of `tiers.json`, name, number of clients and LoRA ranks of each; empty if there is no file.
        tier_of: tier of each client, by client_id; empty if there is no file.
        warnings: what was odd about the files.
    """

    path: Path
    status: str
    reason: str
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    spectra: Mapping[int, Mapping[str, Sequence[float]]]
    energies: Mapping[int, Mapping[str, float]]
    partition: Mapping[str, Any]
    clients: Mapping[str, NDArray[Any]]
    tiers: Sequence[Mapping[str, Any]]
    tier_of: NDArray[np.int64]
    warnings: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def seed(self) -> int:
        """`run.seed`."""
        return int(self.config["run.seed"])

    @property
    def is_finished(self) -> bool:
        """Whether all rounds were run."""
        return self.status == "finished"

    def values(self, key: str) -> dict[int, float]:
        """Round -> value of a metric, where it was recorded and finite."""
        found = {record[ROUND]: _number(record.get(key)) for record in self.metrics}
        return {index: value for index, value in found.items() if math.isfinite(value)}

    def last(self, key: str) -> float | None:
        """Value of a metric in the last round that measured it, NaN where it was not finite; None if no round did."""
        for record in reversed(self.metrics):
            if key in record:
                return _number(record[key])
        return None

    def at_end(self, key: str) -> float | None:
        """The same of the state that the run exported: with early stopping that may be an earlier round's."""
        stopping = self.info.get("early_stopping")
        rounds = stopping.get("exported_after_rounds") if isinstance(stopping, dict) else None
        if not isinstance(rounds, int):
            return self.last(key)
        if rounds == 0:
            return self.values(f"{key}_initial").get(0)
        found = [record[key] for record in self.metrics if record[ROUND] == rounds - 1 and key in record]
        return _number(found[0]) if found else None


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders among `paths` and below those that are none, in order of name, each once.

    Raises:
        RunFolderError: a path is no folder, or there is no run in it.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise RunFolderError(
                f"{path} must be a run folder, or a folder of run folders; there is no such folder"
            )
        try:
            below = list(_runs_below(path, DEEPEST))
        except OSError as error:
            raise _damaged(path, "readable with all folders in it", error) from error
        if not below:
            raise RunFolderError(
                f"{path} must be a run folder (with config.yaml and run.json), or hold run folders; found none in it"
            )
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def read_run(path: Path) -> RunRecord:
    """Read one run folder.

    Raises:
        RunFolderError: a file is missing that every run has, or a file is damaged; the message names it.
    """
    info = _read_json(path / "run.json", required=True)
    warnings: list[str] = []
    metrics = _read_rounds(path / "metrics.jsonl", warnings)
    spectra, energies = _read_spectra(path / "spectra.jsonl", warnings)
    tiers, tier_of = _read_tiers(path / "tiers.json")
    return RunRecord(
        path=path,
        status=str(info.get("status", "running")),
        reason=str(info.get("reason") or ""),
        config=_read_config(path / "config.yaml"),
        info={name: value for name, value in info.items() if name != "config"},
        metrics=metrics,
        spectra=spectra,
        energies=energies,
        partition=_read_partition(path / "partition.json"),
        clients=_read_clients(path / "clients.parquet"),
        tiers=tiers,
        tier_of=tier_of,
        warnings=tuple(warnings),
    )


def _runs_below(path: Path, levels: int) -> Iterator[Path]:
    if (path / "config.yaml").is_file() and (path / "run.json").is_file():
        yield path
    elif levels > 0:
        for entry in sorted(path.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _runs_below(entry, levels - 1)


def _number(value: Any) -> float:
    """A finite number, else NaN: metrics.jsonl has null for what was not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def _damaged(path: Path, rule: str, error: object) -> RunFolderError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(reason.split())
    return RunFolderError(f"{path} must be {rule} ({text}); repair the file, or leave this run out")


def _read_text(path: Path) -> str | None:
    """The file's text; None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, "a readable UTF-8 text", error) from error


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    text = _read_text(path)
    if text is None:
        if required:
            raise _damaged(path, "there", "no such file")
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _damaged(path, "JSON", error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "a JSON object", f"got {type(content).__name__}")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(_read_text(path) or "", "it")
    except ConfigError as error:
        raise _damaged(path, "YAML", error) from error
    if not isinstance(tree, dict):
        raise _damaged(path, "a YAML mapping", f"got {type(tree).__name__}")
    config = {name: key.default for name, key in all_keys().items()} | flatten(tree)
    seed = config["run.seed"]
    if not isinstance(seed, int):
        raise _damaged(path, "a configuration with an integer run.seed", f"got {seed!r}")
    return config


def _read_rounds(path: Path, warnings: list[str]) -> list[dict[str, Any]]:
    """Records of a file with one JSON object per round; a last line that was cut off is left out."""
    text = _read_text(path)
    lines = [] if text is None else text.split("\n")
    torn = bool(lines) and lines.pop() != ""
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None and number == len(lines) and not torn:
            torn = True
        elif record is None or (records and record[ROUND] <= records[-1][ROUND]):
            raise _damaged(path, f"one JSON object per line with rising {ROUND}", f"line {number} is not")
        else:
            records.append(record)
    if torn:
        warnings.append(f"the last line of {path.name} was cut off and is left out")
    return records


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get(ROUND), int) else None


def _read_spectra(
    path: Path, warnings: list[str]
) -> tuple[dict[int, dict[str, list[float]]], dict[int, dict[str, float]]]:
    """Singular values and squared norms, by round and module."""
    spectra: dict[int, dict[str, list[float]]] = {}
    energies: dict[int, dict[str, float]] = {}
    for record in _read_rounds(path, warnings):
        lists = {name: values for name, values in record.items() if isinstance(values, list) and values}
        at = record[ROUND]
        spectra[at] = {name: values for name, values in lists.items() if not name.endswith(ENERGY)}
        energies[at] = {
            name.removesuffix(ENERGY): float(values[0])
            for name, values in lists.items()
            if name.endswith(ENERGY)
        }
    return spectra, energies


def _read_tiers(path: Path) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    content = _read_json(path, required=False)
    rule = "resource tiers, and the tier of each client"
    try:
        tiers = [dict(tier) for tier in content.get("tiers", [])]
        tier_of = np.asarray(content.get("tier_of", []), dtype=np.int64)
        tiers = [
            {**tier, "name": str(tier["name"]), "lora_ranks": dict(tier["lora_ranks"])} for tier in tiers
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, rule, error) from error
    if tier_of.size and not (tier_of.ndim == 1 and tier_of.min() >= 0 and tier_of.max() < len(tiers)):
        raise _damaged(path, rule, f"a client of a tier that is none of the {len(tiers)}")
    return tiers, tier_of


def _read_partition(path: Path) -> dict[str, Any]:
    """The file, with its lists by client as arrays; `listed_clients` holds the ids of the clients in them."""
    partition = _read_json(path, required=False)
    if not partition:
        return {}
    rule = "a partition with sizes and, for each client, counts of every length class and label"
    try:
        sizes = np.asarray(partition["sizes"], dtype=np.int64)
        listed = partition.get("listed_clients")
        clients = np.arange(sizes.size) if listed is None else np.asarray(listed, dtype=np.int64)
        lengths = np.asarray(partition.get("client_class_counts", []), dtype=np.int64)
        labels = np.asarray(partition.get("client_label_counts", []), dtype=np.int64)
        edges = np.asarray(partition.get("class_edges", []), dtype=np.float64)
        label_names = [str(name) for name in partition.get("label_names", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, rule, error) from error
    if sizes.ndim != 1 or sizes.size == 0 or clients.shape != sizes.shape:
        raise _damaged(path, rule, f"sizes {sizes.shape} of clients {clients.shape}")
    for counts, columns in ((lengths, edges.size + 1), (labels, len(label_names))):
        if counts.size and counts.shape != (sizes.size, columns):
            raise _damaged(
                path, rule, f"counts {counts.shape} for {sizes.size} clients and {columns} classes"
            )
    return {
        **partition,
        "sizes": sizes,
        "listed_clients": clients,
        "client_class_counts": lengths,
        "client_label_counts": labels,
        "label_names": label_names,
        "num_clients": int(partition.get("num_clients", sizes.size)),
    }


def _read_clients(path: Path) -> dict[str, NDArray[Any]]:
    try:
        # Not pq.read_table: that takes a folder named alpha=0.1 above the file for a column.
        with pq.ParquetFile(path) as file:
            missing = [name for name in CLIENT_COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise _damaged(path, "a table of clients and rounds", f"no columns {', '.join(missing)}")
            table = file.read(columns=list(CLIENT_COLUMNS))
    except FileNotFoundError:
        return {name: np.empty(0, dtype=_type_of(name)) for name in CLIENT_COLUMNS}
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, "a readable parquet file", error) from error
    # a null becomes NaN
    return {
        name: table[name].to_numpy(zero_copy_only=False).astype(_type_of(name)) for name in CLIENT_COLUMNS
    }


def _type_of(column: str) -> type:
    return np.float64 if column.startswith("test_loss") or column == "seconds" else np.int64
