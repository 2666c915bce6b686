"""Damaged run folders: resumed to the same bits, or refused in one line with the results as they were."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.main import main
from tests.faults.damage import DAMAGES, swap
from tests.faults.harness import differences, outcome

Snapshot = Callable[[Path], dict[str, bytes | None]]

CASES = 24
"""Of each run; another --fault-seed tries others."""

DERIVED = {"config.yaml", "run.json", "partition.json", "partition.parquet", "tiers.json", "logs"}
"""Files that a start writes again before it comes to what is damaged."""

COMMAND = ["strategy.name=fedsa", "aggregation.server_optimizer.name=fedadam", "training.optimizer.lr=0.05"]


def files_of(folder: Path) -> list[Path]:
    """All files of a run folder but the lock."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def damage(folder: Path, draw: np.random.Generator) -> tuple[str, str]:
    """Hurt one file, or exchange two; which, and how."""
    files = files_of(folder)
    file = files[int(draw.integers(len(files)))]
    name = str(file.relative_to(folder))
    if draw.random() < 0.15:
        return name, swap(file, files[int(draw.integers(len(files)))])
    return name, DAMAGES[int(draw.integers(len(DAMAGES)))](file, draw)


def test_a_damaged_run_folder(
    program: Any, twin: Any, draw: np.random.Generator, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = twin(*COMMAND)
    assert program.run(*COMMAND, "run.rounds=2") == 0
    found = {"resumed": 0, "refused": 0}
    for trial in range(CASES):
        folder = program.run_folder.with_name(f"trial-{trial}") / "small"
        shutil.copytree(program.run_folder, folder)
        name, how = damage(folder, draw)
        before = snapshot(folder)
        capsys.readouterr()
        code = main(program.arguments([*COMMAND, f"run.output_dir={folder.parent}"]))
        errors = capsys.readouterr().err
        what = f"{name}: {how}; exit code {code}, {errors}"
        if code == 0:
            found["resumed"] += 1
            check_resumed(folder, expected, name, what)
        else:
            found["refused"] += 1
            assert code == 2, what
            assert len(errors.splitlines()) == 1, what
            assert "Traceback" not in errors, what
            after = snapshot(folder)
            changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
            assert {path.partition("/")[0] for path in changed} <= DERIVED, what
        shutil.rmtree(folder.parent)
    assert min(found.values()) > 0, found


def check_resumed(folder: Path, expected: dict[str, Any], damaged: str, what: str) -> None:
    """Equal to the uninterrupted run; a value in a line of the record may be other than it was, a line may not miss."""
    result = outcome(folder)
    different = differences(result, expected)
    if damaged == "metrics.jsonl":
        assert [record["round_index"] for record in result["metrics"]] == [0, 1, 2], what
        different = [name for name in different if name != "metrics"]
    assert different == [], what


def test_a_config_of_an_older_version_lacks_keys(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that came later counts as being at its default; with another value it is another run."""
    assert program.run("run.rounds=2") == 0
    path = program.run_folder / "config.yaml"
    lines = [
        line
        for line in path.read_text().splitlines()
        if "proximal_mu" not in line and "cpu_linear" not in line
    ]
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    capsys.readouterr()
    assert program.run("training.proximal_mu=0.5") == 2
    assert "training.proximal_mu: 0.0 -> 0.5" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert program.run() == 0
    assert "proximal_mu" in path.read_text()


def test_a_key_that_is_gone_is_another_configuration(
    program: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run("run.rounds=2") == 0
    path = program.run_folder / "config.yaml"
    path.write_text(path.read_text() + "sorcery:\n  level: 9\n")
    capsys.readouterr()
    assert program.run() == 2
    assert "sorcery.level: 9 -> not set" in capsys.readouterr().err


def test_a_bomb_in_the_configuration_of_a_run(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty aliases of twenty aliases of ...: a kilobyte that stands for 20**9 values."""
    assert program.run("run.rounds=2") == 0
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]" for i in range(1, 9)]
    (program.run_folder / "config.yaml").write_text("\n".join(lines))
    capsys.readouterr()
    assert program.run() == 2
    assert "must hold at most 10000 values" in capsys.readouterr().err


def test_a_record_without_its_last_round_is_run_again(
    program: Any, twin: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint is of two rounds, the record of one: the round before is gone back to, and said."""
    assert program.run("run.rounds=2") == 0
    path = program.run_folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert program.run() == 0
    assert "round_000002 cannot be used (the record of the run" in caplog.text
    assert differences(outcome(program.run_folder), twin()) == []


def test_checkpoints_that_are_gone_do_not_cost_the_record(
    program: Any, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run("run.rounds=2") == 0
    shutil.rmtree(program.run_folder / "checkpoints")
    before = snapshot(program.folder)
    capsys.readouterr()
    assert program.run() == 2
    assert "must hold a checkpoint of this run, of which 2 rounds are recorded" in capsys.readouterr().err
    assert snapshot(program.folder) == before
