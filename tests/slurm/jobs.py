"""What the tests of jobs need: a job to watch, its processes, and the result of a run without its clock."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.slurm.local_slurm import LocalSlurm

SECONDS = 150.0
"""How long a job may take to a state it is waited for; a job of these tests takes about a tenth on an idle machine."""

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


def await_true(
    what: str, is_true: Callable[[], Any], seconds: float = SECONDS, tell: Callable[[], str] = str
) -> Any:
    """Poll until `is_true` gives something true, and return that.

    Raises:
        AssertionError: it takes longer than `seconds`; the text ends with what `tell` returns.
    """
    deadline = time.monotonic() + seconds
    while not (value := is_true()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{tell()}"
        time.sleep(0.1)
    return value


@dataclass(frozen=True)
class Job:
    """A job, or an element of an array, and the folder of the run it works on.

    Attributes:
        name: its id, or ARRAY_ELEMENT.
    """

    cluster: LocalSlurm
    name: str
    run: Path

    def field(self, key: str) -> str:
        """What `scontrol show job` says of the job."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.name)
        found = re.search(rf"(?:^|\s){key}=(\S*)", text)
        assert found is not None, f"no {key} in {text}"
        return found[1]

    @property
    def state(self) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        """How often Slurm has started the job again."""
        return int(self.field("Restarts"))

    def wait(self, state: str = "COMPLETED", seconds: float = SECONDS) -> None:
        """Until the job is over for good, in `state`.

        Raises:
            AssertionError: it ends in another state or not in time; with the end of its log.
        """

        def is_over() -> bool:
            # a job that asks to be requeued is for a moment in the state it would end in
            return self.state in FINAL and self.field("Requeue") != "" and not self._is_pending()

        await_true(f"the end of job {self.name}", is_over, seconds, self.story)
        assert self.state == state, f"job {self.name} ended as {self.state}\n{self.story()}"

    def _is_pending(self) -> bool:
        return bool(self.cluster.run("squeue", "-h", "-o", "%T", "-j", self.name.partition("_")[0]).strip())

    def await_rounds(self, more_than: int = 1) -> None:
        """Until the run has recorded more than so many rounds."""
        await_true(
            f"round {more_than} of {self.run}", lambda: num_rounds(self.run) > more_than, SECONDS, self.story
        )

    def await_restart(self, restarts: int) -> None:
        """Until Slurm has started the job again for the given time, and it runs."""
        await_true(
            f"restart {restarts} of job {self.name}",
            lambda: self.restarts == restarts and self.state == "RUNNING",
            SECONDS,
            self.story,
        )

    def rank_pids(self, rank: int) -> list[int]:
        """Processes of fedsim with the given rank, whichever launcher gave it to them."""
        found = []
        for process in self.cluster.processes():
            env = process.environment
            if not process.is_job or env.get("SLURM_JOB_ID") != self.field("JobId"):
                continue
            if not _is_fedsim(process.pid):
                continue
            if env.get("RANK", env.get("SLURM_PROCID")) == str(rank):
                found.append(process.pid)
        return found

    def kill_rank(self, rank: int) -> None:
        """Wait until that rank runs, and end it as the kernel does when memory is short."""
        for pid in await_true(
            f"rank {rank} of job {self.name}", lambda: self.rank_pids(rank), SECONDS, self.story
        ):
            os.kill(pid, signal.SIGKILL)

    def story(self) -> str:
        """Everything that helps to see what went wrong: the job, the record of the run, the ends of its logs."""
        parts = [self.cluster.run("scontrol", "show", "job", self.name)]
        logs = (
            sorted(self.run.rglob("*.out"))
            + sorted(self.run.rglob("*.err"))
            + sorted(self.run.rglob("*.log"))
        )
        for path in [self.run / "run.json", *logs, Path(self.field("StdOut"))]:
            if path.is_file():
                parts.append(f"== {path}\n{path.read_text(encoding='utf-8', errors='replace')[-3000:]}")
        return "\n".join(parts)


def _is_fedsim(pid: int) -> bool:
    """Whether it is the program itself, not a shell, torchrun or srun that was told its name."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    if b"python" not in Path(os.fsdecode(words[0])).name.encode():
        return False
    first = words[1:4]  # torchrun has the same words, further behind
    return (b"-m", b"fedsim.main") in pairwise(first) or any(w.endswith(b"fedsim/main.py") for w in first)


def num_rounds(run: Path) -> int:
    """Rounds on record."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def status_of(run: Path) -> str:
    """The status in `run.json`."""
    record: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return str(record["status"])


@dataclass(frozen=True)
class Result:
    """What two runs of one configuration share, bit for bit.

    Attributes:
        adapter: the exported file.
        losses: every loss of every round.
    """

    adapter: bytes
    losses: tuple[dict[str, float], ...]


def result_of(run: Path) -> Result:
    """Read a finished run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Result(
        (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        tuple(
            {key: value for key, value in json.loads(line).items() if key == "round_index" or "loss" in key}
            for line in lines
        ),
    )
