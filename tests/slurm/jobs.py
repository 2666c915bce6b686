"""What the tests of jobs need: a job to watch, its processes, and the result of a run without its clock."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.slurm.local_slurm import LocalSlurm, signal_all

ROOT = Path(__file__).resolve().parents[2]

SECONDS = 400.0
"""How long a job may take to a state it is waited for; on two idle cores it takes a tenth of that."""

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
        time.sleep(0.2)  # a look starts a program or two
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
        text = self._shown()
        found = re.search(rf"(?:^|\s){key}=(\S*)", text)
        assert found is not None, f"no {key} in {text}"
        return found[1]

    def _shown(self) -> str:
        return self.cluster.run("scontrol", "--oneliner", "show", "job", self.name)

    @property
    def was_preempted(self) -> bool:
        """Whether it had to make room; of a job that has been queued again for it Slurm shows no PreemptTime."""
        return re.search(r"\s(PreemptTime=(?!None)|Restarts=[1-9])", self._shown()) is not None

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
        await_true(f"the end of job {self.name}", self._is_over, seconds, self.story)
        assert self.state == state, f"job {self.name} ended as {self.state}\n{self.story()}"

    def _is_over(self) -> bool:
        return self.state in FINAL and not self.cluster.run("squeue", "-h", "-j", self.name).strip()

    def await_rounds(self, more_than: int = 1) -> None:
        """Until the run has recorded more than so many rounds."""

        def is_there() -> bool:
            if num_rounds(self.run) > more_than:
                return True
            assert not self._is_over(), f"job {self.name} ended as {self.state}\n{self.story()}"
            return False

        await_true(f"round {more_than} of {self.run}", is_there, SECONDS, self.story)

    def await_restart(self, restarts: int) -> None:
        """Until Slurm has started the job again so many times, or more, and it runs."""

        def is_back() -> bool:
            assert not self._is_over(), f"job {self.name} ended as {self.state}\n{self.story()}"
            return self.restarts >= restarts and self.state == "RUNNING"

        await_true(f"restart {restarts} of job {self.name}", is_back, SECONDS, self.story)

    def rank_pids(self, rank: int) -> list[int]:
        """Processes of fedsim with the given rank, whichever launcher gave it to them."""
        job_id = self.field("JobId")
        found = []
        for process in self.cluster.processes():
            env = process.environment
            is_ours = process.is_job and env.get("SLURM_JOB_ID") == job_id
            if is_ours and env.get("RANK", env.get("SLURM_PROCID")) == str(rank) and _is_fedsim(process.pid):
                found.append(process.pid)
        return found

    def await_rank(self, rank: int) -> list[int]:
        """See `rank_pids`, once there are some."""
        found: list[int] = await_true(
            f"rank {rank} of job {self.name}", lambda: self.rank_pids(rank), SECONDS, self.story
        )
        return found

    def kill_rank(self, rank: int) -> None:
        """Wait until that rank runs, and end it as the kernel does when memory is short."""
        signal_all(self.await_rank(rank), signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block the run gets no further: however fast this machine is, there is time to interrupt it."""
        pids = [pid for rank in range(2) for pid in self.await_rank(rank)]
        signal_all(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            signal_all(pids, signal.SIGCONT)

    def log(self) -> str:
        """What the batch script has written."""
        path = Path(self.field("StdOut"))
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def story(self) -> str:
        """Everything that helps to see what went wrong: the job, the record of the run, the ends of its logs."""
        parts = [self.cluster.run("scontrol", "show", "job", self.name)]
        logs = sorted(path for path in self.run.rglob("*") if path.suffix in (".out", ".err", ".log"))
        for path in dict.fromkeys([self.run / "run.json", *logs, Path(self.field("StdOut"))]):
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


@dataclass(frozen=True)
class Work:
    """A run whose rounds take some tenths of a second each.

    Attributes:
        config: the configuration file; its run folders go to `runs`.
        runs: a folder of this test alone.
        alone: the result of so many rounds, with any overrides, in one process and without Slurm.
    """

    config: Path
    runs: Path
    alone: Callable[..., Result]

    def arguments(self, name: str, rounds: int, *more: str) -> list[str]:
        """What fedsim.main gets."""
        return [
            str(self.config),
            f"run.name={name}",
            f"run.output_dir={self.runs}",
            f"run.rounds={rounds}",
            *more,
        ]


class Sbatch:
    """Submits the templates of slurm/ as a user would, from the root of the repository."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __call__(
        self,
        cluster: LocalSlurm,
        name: str,
        rounds: int,
        *options: str,
        template: str = "multi_node",
        settings: Mapping[str, str] | None = None,
        overrides: Sequence[str] = (),
    ) -> Job:
        """Two nodes with a process on each, unless `options` say otherwise.

        Args:
            options: of sbatch.
            settings: environment variables of slurm/lib.sh.
            overrides: KEY=VALUE for fedsim.main.
        """
        logs = self._work.runs / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        given = [
            "--parsable",
            "--gpus-per-node=1",
            "--cpus-per-task=1",
            "--time=10",
            f"--output={logs}/%j.out",
        ]
        job = cluster.run(
            "sbatch",
            *given,
            *options,
            f"slurm/{template}.sbatch",
            *self._work.arguments(name, rounds, *overrides),
            extra={"FEDSIM_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **(settings or {})},
            cwd=ROOT,
        )
        return Job(cluster, job.strip(), self._work.runs / name)
