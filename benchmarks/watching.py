"""Runs of fedsim that are watched from outside: when each round's record is there, and what the processes hold."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fedsim.tracking.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
MEMORY = {"Rss:": "rss_mib", "Private_Dirty:": "own_mib"}
"""Lines of smaps_rollup: all that is mapped and present; what belongs to the process alone and was written to."""

Samples = dict[int, dict[int, list[dict[str, float]]]]
"""Rounds done -> process -> its memory in MiB, each time that it was looked at."""


def cpu_name() -> str:
    """Of this machine."""
    return str(describe_environment(1, [])["hardware"]["cpu"])


def watch(processes: int, keys: Sequence[str], metrics: Path, output: Path) -> tuple[Samples, list[float]]:
    """Start a run by torchrun and look at it: for records fifty times a second, at its memory five times.

    Ends this program with the run's output if the run fails.

    Args:
        processes: one thread each.
        keys: of the configuration.
        metrics: the run's metrics.jsonl.
        output: file for what the run prints.

    Returns:
        the samples; and when the record of each round was there, on the monotonic clock.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    samples: Samples = {}
    arrivals: list[float] = []
    with output.open("wb") as stream:
        run = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "fedsim.main", *keys],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        for look in itertools.count():
            if run.poll() is not None:
                break
            done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            arrivals += [time.monotonic()] * (done - len(arrivals))
            for process in _children(run.pid) if look % 10 == 0 else ():
                memory = _memory_of(process)
                if memory:
                    samples.setdefault(done, {}).setdefault(process, []).append(memory)
            time.sleep(0.02)
    if run.returncode != 0:
        sys.exit(f"the run failed:\n{output.read_text(encoding='utf-8', errors='replace')}")
    return samples, arrivals


def _children(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(child) for child in text.split()]


def _memory_of(process: int) -> dict[str, float]:
    """Empty where the process has just ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return {}
    found = (line.split() for line in text.splitlines()[1:])
    return {MEMORY[name]: int(value) / 1024 for name, value, *_ in found if name in MEMORY}
