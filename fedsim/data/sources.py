"""Where a corpus comes from: the embedded one, local files, or the Hugging Face hub, all as tables by split."""

import glob
import gzip
import itertools
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.cache import CacheError, cache_root
from fedsim.config.node import EMBEDDED
from fedsim.config.paths import is_there, local_path, note_lookalike
from fedsim.data.docstrings import split_docstrings
from fedsim.errors import DataError

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
GZIPPED = tuple(f"{ending}.gz" for ending in BUILDERS if ending != ".parquet")
KINDS = ", ".join((*BUILDERS, *GZIPPED))
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
MOST_FILES = 100_000
READ_ERRORS = (OSError, ValueError, EOFError, StopIteration, zlib.error)
"""What a file that is damaged, or not what its ending says, makes `datasets` and pyarrow raise beside their own.

`datasets` lets StopIteration out when a JSON file holds no row at all.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one split, read by column.

    Attributes:
        columns: names of the columns.
        num_rows: number of rows.
        read: the values of one column; None stands for a missing value.
    """

    columns: tuple[str, ...]
    num_rows: int
    read: Callable[[str], Sequence[Any]]


def read_splits(source: str, subset: str | None) -> dict[str, Table]:
    """The splits of a corpus.

    Args:
        source: "embedded", a local file or folder, or a Hugging Face dataset id (as `data.source`). An existing path
            goes before a dataset id.
        subset: configuration name of a hub dataset (`data.subset`).

    Raises:
        DataError: the source is not there, cannot be read, or holds no rows.
        CacheError: the cache, where `datasets` keeps its tables of local files, cannot be written.
    """
    path = local_path(source)
    is_local = source != EMBEDDED and (is_there(path) or _looks_like_path(source))
    if subset is not None and (is_local or source == EMBEDDED):
        raise DataError(
            f"data.subset names a configuration of a Hugging Face dataset, but data.source={source} is none; "
            f"leave it null, got '{subset}'"
        )
    if source == EMBEDDED:
        return {"train": _embedded_table()}
    splits = _load_local(source, path) if is_local else _load_hub(source, subset)
    return {str(name): _as_table(split, source) for name, split in splits.items()}


def _embedded_table() -> Table:
    _, docstrings = split_docstrings()
    columns = {
        "text": [docstring.text for docstring in docstrings],
        "module": [docstring.module for docstring in docstrings],
    }
    return Table(tuple(columns), len(docstrings), columns.__getitem__)


def _as_table(split: Any, source: str) -> Table:
    def read(column: str) -> Sequence[Any]:
        try:
            values: list[Any] = split[column][:]
        except UnicodeDecodeError as error:  # of JSON, whose texts are not decoded before they are used
            raise DataError(
                f"data.source={source}: column {column!r} cannot be read ({_reason(error)}); convert the file"
            ) from error
        names = getattr(split.features[column], "names", None)  # of a ClassLabel, which stores numbers
        if names is None:
            return values
        return [None if value is None or value < 0 else names[value] for value in values]

    return Table(tuple(split.column_names), split.num_rows, read)


def _looks_like_path(source: str) -> bool:
    return source.startswith(("./", "../", "/", "~")) or _kind(Path(source)) is not None


def _kind(path: Path) -> str | None:
    """The `datasets` builder for a file, by its ending; None where there is none."""
    name = path.name.lower()
    if name.endswith(GZIPPED):
        name = name.removesuffix(".gz")
    return BUILDERS.get(os.path.splitext(name)[1])  # noqa: PTH122 - Path("a.txt/").suffix means something else


def _load_local(source: str, path: Path) -> Mapping[Any, Any]:
    if not is_there(path):
        raise DataError(
            f"data.source={source} looks like a path, but there is no such file or folder; give an existing one, "
            "or a Hugging Face dataset id"
        )
    note_lookalike("data.source", source, path)
    files = _files_by_split(source, path)
    builders = sorted({_kind(file) or "" for paths in files.values() for file in paths})
    if len(builders) > 1:
        raise DataError(
            f"data.source={source} must hold files of one kind, got {', '.join(builders)}; "
            "move the others elsewhere or name one file"
        )
    builder = builders[0]
    readable = {split: [file for file in paths if _has_content(file)] for split, paths in files.items()}
    empty = [split for split, paths in readable.items() if not paths]
    if empty:
        raise DataError(
            f"data.source={source} must hold at least one example, but {_list(files[empty[0]])} is empty"
        )
    options: dict[str, Any] = {}
    if builder == "csv":
        options["keep_default_na"] = False  # the words "NA", "null" and "None" are texts, not missing values
    cache = _writable_cache()
    splits: dict[Any, Any] = {}
    for split, paths in readable.items():  # one by one, because splits need not have the same columns
        if builder == "csv":
            options["features"] = _text_columns(
                source, paths
            )  # 007 is no 7, 1.10 no 1.1, True no truth value
        try:
            splits |= _load(
                source,
                f"data.source={source} cannot be read as {builder}",
                path=builder,
                data_files={split: [_literal(file) for file in paths]},
                cache_dir=str(cache),
                **options,
            )
        except DataError as error:
            if isinstance(_innermost(error), OSError):  # a table that `datasets` made earlier may be cut off
                raise DataError(f"{error}; if the file is sound, delete the cache folder {cache}") from error
            raise
    return splits


def _text_columns(source: str, files: Sequence[Path]) -> Any:
    """The columns of CSV files, all of them texts as they are written.

    Raises:
        DataError: the first file has no header that can be read.
    """
    import datasets
    import pandas

    try:
        header = pandas.read_csv(files[0], nrows=0, keep_default_na=False).columns
    except (OSError, ValueError) as error:
        raise DataError(f"data.source={source}: {files[0].name} cannot be read as csv ({error})") from error
    return datasets.Features({str(name): datasets.Value("string") for name in header})


def _files_by_split(source: str, path: Path) -> dict[str, list[Path]]:
    """The files of a source, by the split that the name of a file or of a folder above it says."""
    if path.is_file():
        if _kind(path) is None:
            raise DataError(f"data.source={source} must end in one of {KINDS}; rename it or convert it")
        return {"train": [path.resolve()]}
    try:
        below = list(itertools.islice(path.rglob("*"), MOST_FILES + 1))
    except OSError as error:
        raise DataError(
            f"data.source={source} is a folder that cannot be listed ({_reason(error)})"
        ) from error
    if len(below) > MOST_FILES:
        raise DataError(
            f"data.source={source} must be a folder with at most {MOST_FILES} files and folders below it; name the one "
            "that holds the corpus"
        )
    found = [
        file
        for file in sorted(below)
        if file.is_file()
        and _kind(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise DataError(f"data.source={source} is a folder without any file of a known kind ({KINDS})")
    named = {file: _split_name(file.relative_to(path)) for file in found}
    if not any(named.values()):
        return {"train": [file.resolve() for file in found]}
    unnamed = [file for file, split in named.items() if split is None]
    if unnamed:
        raise DataError(
            f"data.source={source} holds files named after splits and others that are not ({_list(unnamed)}); let "
            "each name, or a folder above it, begin with train, validation or test"
        )
    splits: dict[str, list[Path]] = {}
    for file, split in named.items():
        splits.setdefault(str(split), []).append(file.resolve())
    return splits


def _split_name(relative: Path) -> str | None:
    for part in relative.parts:
        word = re.split(r"[^a-z]", part.lower())[0]
        for split, names in SPLIT_NAMES.items():
            if word in names:
                return split
    return None


def _has_content(file: Path) -> bool:
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as stream:
            return bool(stream.read(1))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data.source: {file} cannot be read ({_reason(error)})") from error


def _literal(file: Path) -> str:
    """The path as `datasets` must be given it: it reads *, ? and [ in a path as a pattern."""
    if file.suffix == ".gz" and ("[" in str(file) or "]" in str(file)):
        # It turns the path of a compressed file into a URL, in which brackets stand for an IPv6 address.
        raise DataError(
            f"data.source: the path of a compressed file must be without [ and ], got {file}; rename it"
        )
    return glob.escape(str(file))


def _writable_cache() -> Path:
    folder = cache_root() / "datasets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"the cache folder {cache_root()} must be writable ({error.strerror or error}); set FEDSIM_CACHE to a "
            "folder that is"
        ) from error
    return folder


def _load_hub(source: str, subset: str | None) -> Mapping[Any, Any]:
    logger.info("loading the dataset %s from the Hugging Face hub or its cache", source)
    where = (
        "give data.source a local file or folder; or, where compute nodes have no network, load it once on the login "
        "node with HF_HOME on a shared disk and run with the same HF_HOME and HF_HUB_OFFLINE=1"
    )
    try:
        return _load(
            source, f"data.source={source} cannot be loaded as a Hugging Face dataset", source, name=subset
        )
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):  # not found, not reachable, or offline and not in the cache
            raise DataError(f"{error}; check the id, or {where}") from cause
        if isinstance(cause, ValueError) and "onfig" in str(cause):
            raise DataError(
                f"data.subset={subset} is no configuration of {source}: {_reason(cause)}"
            ) from cause
        raise


def _load(source: str, failure: str, path: str, **options: Any) -> Mapping[Any, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    with _quiet():
        try:
            splits: Mapping[Any, Any] = datasets.load_dataset(path, **options)
        except (*READ_ERRORS, DatasetsError) as error:
            raise DataError(f"{failure} ({_reason(error)})") from error
    if not any(split.num_rows for split in splits.values()):
        raise DataError(f"data.source={source} must hold at least one example, got none")
    return splits


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or log lines of `datasets` and the hub client: an error is one line, and it is ours."""
    import datasets

    bars = datasets.is_progress_bar_enabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [each.level for each in loggers]
    datasets.disable_progress_bars()
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """One line on why reading failed: the innermost cause, which names the fault in the file."""
    error = _innermost(error)
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text: {error}"
    if isinstance(error, StopIteration):
        return "it holds no rows"
    if "corresponds to no data" in str(error):
        return "it holds no rows"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words if len(words) <= 300 else words[:297] + '...'}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _list(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
