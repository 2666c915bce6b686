"""A small model, corpora, and the program itself, for the tests of whole runs."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fedsim.main import main
from tests.helpers import random_texts, run_program, tiny_opt, word_tokenizer


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Program:
    """Calls fedsim on a small model and corpus.

    Attributes:
        folder: everything the run may touch, apart from the cache.
        settings: the configuration; a call may override it.
    """

    folder: Path
    settings: dict[str, object] = field(default_factory=dict)

    def arguments(self, extra: Sequence[str] = ()) -> list[str]:
        """Overrides for the command line: the settings, and `extra` in their place or in addition."""
        given = {argument.partition("=")[0] for argument in extra}
        return [f"{key}={value}" for key, value in self.settings.items() if key not in given] + list(extra)

    def run(self, *extra: str) -> int:
        """Run in this process."""
        return main(self.arguments(extra))

    def start_ranks(
        self,
        world_size: int,
        *extra: str,
        timeout_s: float = 60.0,
        meanwhile: Callable[[list[int]], None] | None = None,
    ) -> list[tuple[int | None, str]]:
        """Run in real processes; exit code and standard error of each rank."""
        return run_program(self.arguments(extra), world_size, self.folder, timeout_s, meanwhile)

    @property
    def run_folder(self) -> Path:
        """The folder of the run with the settings as they are."""
        return Path(str(self.settings["run.output_dir"])) / str(self.settings["run.name"])


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random OPT of two layers and a tokenizer of 64 words."""
    folder = tmp_path_factory.mktemp("model")
    tiny_opt().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 texts of 1 to 20 words, each with one of three labels."""
    rows = [{"text": text, "label": f"kind {index % 3}"} for index, text in enumerate(random_texts(200))]
    return write_rows(tmp_path_factory.mktemp("corpus") / "texts.jsonl", rows)


def small_program(folder: Path, model_folder: Path, corpus_file: Path) -> Program:
    """fedsim with settings that make a run of about a second."""
    return Program(
        folder,
        {
            "run.output_dir": folder / "runs",
            "run.name": "small",
            "run.rounds": 3,
            "data.source": corpus_file,
            "data.max_tokens": 24,
            "model.name_or_path": model_folder,
            "data.partition.num_clients": 6,
            "data.partition.num_length_classes": 3,
            "cohort.size": 3,
            "training.batch_size": 4,
            "tracking.wandb.mode": "disabled",
            "tracking.progress": "off",
        },
    )


@pytest.fixture
def program(tmp_path: Path, model_folder: Path, corpus_file: Path) -> Iterator[Program]:
    """A small program; threads are put back afterwards."""
    threads = torch.get_num_threads()
    yield small_program(tmp_path, model_folder, corpus_file)
    torch.set_num_threads(threads)


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes | None]]:
    """All files below a folder with their content (None for a folder), but lock files, which may come and go."""

    def take(folder: Path) -> dict[str, bytes | None]:
        return {
            str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix != ".lock"
        }

    return take
