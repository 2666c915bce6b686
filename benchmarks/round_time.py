"""Time of a round of the quick start on 1, 2 and 4 processes of this machine, one thread each.

    python benchmarks/round_time.py [--rounds 4] [--processes 1 2 4] [KEY=VALUE ...]

Starts each run by torchrun in a temporary folder and reads its metrics.jsonl. A table for people comes first, one JSON
object is the last line. The first round of each run warms up and is left out. What the columns mean:

    s/round    median wall time of a round
    tokens/s   label tokens trained in a round, divided by the time of the slowest process in local training
    outside    share of the round after the slowest process has finished its clients: exchange, aggregation, global test
    idle       mean share of the training time that processes spend waiting for the slowest
    load       of the machine before the run: with more than its cores in use by others, the times mean little

Local training includes the tests of each client before and after it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from watching import cpu_name

QUIET = ("tracking.wandb.mode=disabled", "tracking.progress=off", "checkpoint.keep_last=1")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each run, the first not counted")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("overrides", nargs="*", help="configuration of the runs, as for fedsim.main")
    options = parser.parse_intermixed_args()
    if options.rounds < 2 or min(options.processes) < 1:
        parser.error("at least 2 rounds and 1 process are needed")

    print(f"{cpu_name()}, {os.cpu_count()} cores\n")
    print("processes   s/round   tokens/s   outside     idle   load before")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in options.processes:
            name = f"processes-{processes}"
            keys = [f"run.output_dir={folder}", f"run.name={name}", f"run.rounds={options.rounds}", *QUIET]
            load = os.getloadavg()[0]
            _run(processes, [*keys, *options.overrides])
            row = {
                "processes": processes,
                "load_before": load,
                **_summary(Path(folder) / name / "metrics.jsonl"),
            }
            rows.append(row)
            print(
                f"{processes:9d} {row['round_s']:9.2f} {row['tokens_per_s']:10,.0f} "
                f"{row['outside_share']:9.1%} {row['idle_share']:8.1%} {load:13.1f}",
                flush=True,
            )
    losses = {row["test_loss"] for row in rows}
    print(
        "\nthe last test losses are equal" if len(losses) == 1 else f"\nTHE LAST TEST LOSSES DIFFER: {losses}"
    )
    record = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "rows": rows,
    }
    print(json.dumps({"benchmark": "round_time", "overrides": options.overrides, **record}))
    return 0 if len(losses) == 1 else 1


def _run(processes: int, keys: list[str]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "fedsim.main", *keys],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"the run on {processes} processes failed:\n{done.stderr}")


def _summary(path: Path) -> dict[str, Any]:
    rounds = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steady = rounds[1:]

    def median(values: list[float]) -> float:
        return statistics.median(values)

    return {
        "round_s": median([one["time/round_s"] for one in steady]),
        "tokens_per_s": median([one["train/tokens_per_s"] for one in steady]),
        "outside_share": median(
            [1.0 - (one["time/train_s"] + one["time/wait_s"]) / one["time/round_s"] for one in steady]
        ),
        "idle_share": median([one["ranks/idle_share"] for one in steady]),
        "test_loss": rounds[-1]["test/loss"],
    }


if __name__ == "__main__":
    sys.exit(main())
