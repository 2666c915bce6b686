"""Kill runs at random moments, start them again, and compare them with runs that nobody touched.

    python benchmarks/soak.py --kills 100 --seed 0

A run of four rounds on a random two-layer OPT is started on one, two or three processes and hurt one to three times,
each time as drawn: SIGKILL of one process, SIGTERM or SIGUSR1 to all, SIGKILL of the server within a checkpoint,
SIGKILL of a process within the file of a client's own state, a process that leaves without a word. The moment is drawn
over the whole life of the processes, start-up and export included. Then the same command is given again, with another
number of processes, until it says that it is finished, and everything that the run leaves is compared with its twin:
adapters, metrics, client table, server's and clients' state. At last a process that does nothing but write checkpoints
is killed again and again.

Processes are forked from a server that has imported fedsim and run nothing, which makes a start cheap; they then do
what `python -m fedsim.main` does. W&B is off. Not covered: GPUs, and power cuts, which take what a disk has not
written.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedsim.comm.meeting import PATIENCE_S, SHORT_S
from fedsim.server.checkpoint import load_newest_checkpoint
from tests.faults.harness import Injection, Started, differences, kill_while_writing, outcome, start
from tests.helpers import random_texts, tiny_opt, word_tokenizer

ROUNDS = 4
TIMEOUT_S = 60.0
"""`comm.timeout_s` of the runs: no launcher ends the others here, so it may be what does."""

HANG_S = TIMEOUT_S + PATIENCE_S + 2 * SHORT_S + 5.0
"""Processes that have not ended by then hang: the time limit, what they themselves allow beyond it, and their end."""

METHODS: dict[str, list[str]] = {
    "FedAvg": ["strategy.name=fedavg"],
    "FlexLoRA": [
        "strategy.name=flexlora",
        "lora.tiers=[{rank: 2}, {rank: 4}, {rank: 8}]",
    ],
    "FedSA-LoRA": ["strategy.name=fedsa"],
    "FedAdam": ["strategy.name=fedavg", "aggregation.server_optimizer.name=fedadam"],
}

CHECKPOINT = "SIGKILL of rank 0 in a checkpoint"
CLIENT_STATE = "SIGKILL of one rank in a client's state"
ONE = "SIGKILL of one rank"
LEAVES = "one rank leaves without a word"
FAULTS = (ONE, ONE, "SIGTERM to all", "SIGUSR1 to all", CHECKPOINT, CHECKPOINT, LEAVES)
SIGNALS = {"SIGTERM to all": signal.SIGTERM, "SIGUSR1 to all": signal.SIGUSR1}


@dataclass
class Tally:
    """What became of one kind of fault.

    Attributes:
        tried: times that it met a process that was alive.
        hung: times that some process did not end by itself.
        stale: times that the newest readable checkpoint was older than one interval.
        unequal: runs that did not end as their twin did.
        half_written: times that half a checkpoint was left lying.
        codes: exit codes of all processes.
        longest_s: longest time from the fault to the end of the last process.
    """

    tried: int = 0
    hung: int = 0
    stale: int = 0
    unequal: int = 0
    half_written: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="faults that meet a live process")
    parser.add_argument(
        "--writes", type=int, default=50, help="kills of a process that only writes checkpoints"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no further run after so many"
    )
    parser.add_argument("--folder", type=Path, default=None, help="for the runs; default: a temporary one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["FEDSIM_CACHE"] = str(folder / "cache")
        tallies, starts, runs = soak(
            folder, options.kills, 60 * options.minutes, np.random.default_rng(options.seed)
        )
        tallies["SIGKILL of a process that only writes checkpoints"] = write(
            folder, options.writes, np.random.default_rng([options.seed, 1])
        )
    show(tallies)
    bad = sum(tally.hung + tally.stale + tally.unequal for tally in tallies.values())
    minutes = (time.monotonic() - began) / 60
    where = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    print(
        f"\n{runs} runs, {starts} starts of 1 to 3 processes, {minutes:.0f} minutes on {where}; seed {options.seed}"
    )
    print(f"{bad} bad ends" if bad else "every run ended as its twin")
    figures = {name: {**vars(tally), "codes": dict(tally.codes)} for name, tally in tallies.items()}
    print(json.dumps({"benchmark": "soak", "runs": runs, "starts": starts, "bad": bad, "faults": figures}))
    return 1 if bad else 0


def soak(
    folder: Path, kills: int, most_s: float, draw: np.random.Generator
) -> tuple[dict[str, Tally], int, int]:
    """Hurt runs until `kills` faults have met a live process; tallies by fault, number of starts and of runs."""
    began = time.monotonic()
    settings = prepare(folder)
    twins, lives_s = {}, {}
    for method, arguments in METHODS.items():
        command = [*settings, *arguments, "run.name=twin-" + method]
        started = start(command, 1, folder)
        (ended,) = started.wait(600.0)
        assert ended.code == 0, ended.errors
        lives_s[method] = time.monotonic() - started.began_s
        twins[method] = outcome(folder / "runs" / f"twin-{method}")
    tallies: dict[str, Tally] = defaultdict(Tally)
    starts = runs = 0
    while sum(tally.tried for tally in tallies.values()) < kills and time.monotonic() - began < most_s:
        method = list(METHODS)[runs % len(METHODS)]
        name = f"{method}-{runs}"
        command = [*settings, *METHODS[method], f"run.name={name}"]
        run_folder = folder / "runs" / name
        suffered = []
        for _ in range(int(draw.integers(1, 4))):
            starts += 1
            fault = hurt(command, folder, run_folder, method, lives_s[method], tallies, draw)
            if fault is not None:
                suffered.append(fault)
        for _ in range(3):
            starts += 1
            ranks = start(command, int(draw.integers(1, 4)), folder).wait(600.0)
            if all(ended.code == 0 for ended in ranks):
                break
        different = ["the exit code"]
        if all(ended.code == 0 for ended in ranks):
            different = differences(outcome(run_folder), twins[method])
        if different:
            print(f"{name}: {suffered}: {different}\n{ranks[0].errors}", file=sys.stderr, flush=True)
            for fault in set(suffered):
                tallies[fault].unequal += 1
        runs += 1
        done = sum(tally.tried for tally in tallies.values())
        print(f"{done} of {kills} faults, {runs} runs", file=sys.stderr, flush=True)
        shutil.rmtree(run_folder, ignore_errors=True)
    return dict(tallies), starts, runs


def prepare(folder: Path) -> list[str]:
    """Write a model and a corpus; the arguments of a run on them."""
    tiny_opt().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [{"text": text} for text in random_texts(200)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run.output_dir": folder / "runs",
        "run.rounds": ROUNDS,
        "data.source": folder / "texts.jsonl",
        "data.max_tokens": 24,
        "model.name_or_path": folder / "model",
        "data.partition.num_clients": 6,
        "data.partition.num_length_classes": 3,
        "cohort.size": 3,
        "lora.dropout": 0.1,
        "training.batch_size": 4,
        "training.optimizer.lr": 0.05,
        "training.pack.num_packs": 3,
        "comm.timeout_s": TIMEOUT_S,
        "tracking.wandb.mode": "disabled",
        "tracking.progress": "off",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def hurt(
    command: Sequence[str],
    folder: Path,
    run_folder: Path,
    method: str,
    life_s: float,
    tallies: dict[str, Tally],
    draw: np.random.Generator,
) -> str | None:
    """Start a run, hurt it, and wait for its end; the fault, or None if it came too late."""
    fault = FAULTS[int(draw.integers(len(FAULTS)))]
    if method == "FedSA-LoRA" and draw.random() < 0.3:
        fault = CLIENT_STATE
    world_size = int(draw.integers(1, 4))
    victim = int(draw.integers(world_size))
    moment_s = float(draw.uniform(0.0, life_s))
    call = int(draw.integers(1, ROUNDS + 1))
    injections = {
        CHECKPOINT: Injection(
            "fedsim.server.checkpoint:save_checkpoint",
            "kill_later",
            0,
            call,
            value=float(draw.uniform(0.0, 0.03)),
        ),
        CLIENT_STATE: Injection(
            "fedsim.server.client_store:replace_file",
            "kill_later",
            victim,
            call,
            value=float(draw.uniform(0.0, 0.005)),
        ),
        LEAVES: Injection("fedsim.comm.exchange:_start_module", "exit", victim, 4 * call),
    }
    started = start(command, world_size, folder, [injections[fault]] if fault in injections else [])
    if fault in injections:
        started.wait_first(HANG_S)
    else:
        time.sleep(moment_s)
        if not all(process.is_alive() for process in started.processes):
            started.wait(HANG_S)
            return None
        started.signal(SIGNALS.get(fault, signal.SIGKILL), None if fault in SIGNALS else [victim])
    return judge(fault, started, run_folder, tallies[fault])


def judge(fault: str, started: Started, run_folder: Path, tally: Tally) -> str | None:
    """Wait for the end and add up what came of a fault; None if the run was over before it."""
    hurt_s = time.monotonic()
    ranks = started.wait(HANG_S)
    if all(ended.code == 0 for ended in ranks):
        return None
    tally.tried += 1
    tally.longest_s = max(tally.longest_s, time.monotonic() - hurt_s)
    tally.codes.update(str(ended.code) for ended in ranks)
    if any(ended.code is None for ended in ranks):
        tally.hung += 1
        print(f"{fault}: hung\n{[ended.errors for ended in ranks]}", file=sys.stderr, flush=True)
    checkpoints = run_folder / "checkpoints"
    if checkpoints.is_dir():
        tally.half_written += any(path.name.startswith(".") for path in checkpoints.iterdir())
        state = load_newest_checkpoint(checkpoints)
        newest = 0 if state is None else state.round_index
        recorded = (run_folder / "metrics.jsonl").read_bytes().count(b"\n")
        if newest < recorded - 1:
            tally.stale += 1
            print(f"{fault}: {recorded} rounds recorded, checkpoint of {newest}", file=sys.stderr, flush=True)
    return fault


def write(folder: Path, times: int, draw: np.random.Generator) -> Tally:
    """Kill a process that writes one checkpoint after another."""
    tally = Tally()
    for trial in range(times):
        left = kill_while_writing(folder / "writes" / f"{trial}", draw)
        tally.tried += 1
        tally.half_written += left.half_written
        tally.codes["-9"] += 1
        if left.problem is not None:
            tally.stale += 1
            print(left, file=sys.stderr, flush=True)
    return tally


def show(tallies: dict[str, Tally]) -> None:
    print(
        "| fault | times | half a checkpoint left | all ended within | hung | checkpoint too old | not equal |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, tally in sorted(tallies.items()):
        counts = (f"{tally.longest_s:.1f} s", tally.hung, tally.stale, tally.unequal)
        print(f"| {name} | {tally.tried} | {tally.half_written} | {' | '.join(map(str, counts))} |")


if __name__ == "__main__":
    sys.exit(main())
