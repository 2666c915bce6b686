"""Fakes of Slurm's commands on PATH, which write down how they were called."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKES = {
    "sbatch": """\
if [[ $* == *--test-only* ]]; then
    cat >"$FAKES/tested.txt"
    echo "Job 1 to start at noon" >&2
    exit "${TEST_CODE:-0}"
fi
count=$(($(cat "$FAKES/count" 2>/dev/null || echo 100) + 1))
[[ $count -le ${LAST_JOB:-999} ]] || { echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; }
echo "$count" >"$FAKES/count"
echo "$count"
""",
    "squeue": '[[ -e $FAKES/queue.txt ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }\n'
    'cat "$FAKES/queue.txt"\n',
    "sacct": 'cat "$FAKES/accounts.txt" 2>/dev/null || { echo "Slurm accounting storage is disabled" >&2; exit 1; }\n',
    "scontrol": 'echo "MaxArraySize            = ${MAX_ARRAY:-1001}"\n',
    "scancel": "",
}


@dataclass
class Cluster:
    """A cluster that exists on PATH only.

    Attributes:
        fakes: folder of its commands and of what they were called with.
        runs: `run.output_dir` of its runs.
    """

    fakes: Path
    runs: Path

    def remove(self, *names: str) -> None:
        """Take commands away."""
        for name in names:
            (self.fakes / name).unlink()

    def calls(self, name: str) -> list[str]:
        """How a command was called: its arguments in brackets, one call a line."""
        path = self.fakes / f"{name}.calls"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def queue(self, *lines: str) -> None:
        """What squeue says."""
        (self.fakes / "queue.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def accounts(self, *lines: str) -> None:
        """What sacct says."""
        (self.fakes / "accounts.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Put the fakes first on PATH, and nothing of a real Slurm."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, body in FAKES.items():
        text = f'#!/usr/bin/env bash\n{{ printf \'[%s]\' "$@"; echo; }} >>"$FAKES/{name}.calls"\n{body}'
        (fakes / name).write_text(text, encoding="utf-8")
        (fakes / name).chmod(0o755)
    for tool in ("bash", "cat", "env", "git"):
        found = subprocess.run(
            ["bash", "-c", f"command -v {tool}"], capture_output=True, text=True, check=False
        )
        if found.stdout:
            (fakes / tool).symlink_to(found.stdout.strip())
    monkeypatch.setenv("PATH", str(fakes))
    monkeypatch.setenv("FAKES", str(fakes))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("FEDSIM_SITES", raising=False)
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_"))]:
        monkeypatch.delenv(name)
    return Cluster(fakes, tmp_path / "all runs")


def run_launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """`python -m launch ...` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
