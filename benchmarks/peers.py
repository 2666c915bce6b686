"""The same federated rounds through fedsim and through what one would take instead of it.

    python benchmarks/peers.py [--peers plain_peft pfl ...] [--workloads tiny-8x64 ...] [--rounds 3] [--repeats 3]

Peers: a plain PEFT loop over torch.distributed, a Hugging Face Trainer for each client, Flower's simulation engine, and
pfl-research; their code is in benchmarks/peers/. Each gets a virtual environment of its own under build/peers/ (or
--venvs), made on first use with the torch, transformers and peft that fedsim runs on. A peer that cannot be installed
or run is reported as such. fedsim runs as a user starts it: torchrun -m fedsim.main.

What is the same for all: the weights of the base, the adapter of round 0, the token batches of every client and round
in fedsim's order, a fresh AdamW for each client with the same settings, no dropout, no clipping, no evaluation, equal
client weights, two processes of one thread; fedsim makes two packs, as its README advises for two processes. The time
of a round is from the end of one to the end of the next, taken by this script when rank 0 (or the server) writes its
line; CPU seconds are those of the whole process tree between the same two moments. The first round is warm-up for
everyone.

The adapters are compared with fedsim's twice: those of the timed runs, in float32, where AdamW turns rounding in
gradients near 0 into steps of either sign; and those of one round in float64, where what is left of that shows whether
all did the same. Difference and norm are over the whole adapter.

In the peers' favour: their batches are padded tensors made before the first round; clients are dealt longest first
where the peer has no way of its own (Flower: a queue); Flower's actors keep their base; nothing is logged. What could
not be made equal: fedsim writes its records of each round and evaluates one example after the last one.

Weights and texts are fedsim's embedded ones; OPT-125M is that shape with random weights. A table for people comes
first, one JSON object is the last line.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "benchmarks" / "peers"
PACKAGES = {"plain_peft": [], "hf_trainer": [], "flower": ["flwr[simulation]"], "pfl": ["pfl"]}
SCRIPTS = {
    "plain_peft": "plain_peft.py",
    "hf_trainer": "hf_trainer.py",
    "flower": "flower_app.py",
    "pfl": "pfl_app.py",
}
WORKLOADS = {"tiny-8x64": (8, 64, False), "tiny-64x8": (64, 8, False), "opt-125m-4x16": (4, 16, True)}
PROCESSES = 2
WARM_UP = 1
TIMEOUT_S = 900.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", nargs="*", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds of a run")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="timed runs of each side, in turns; 0 for the comparison of adapters alone",
    )
    parser.add_argument(
        "--venvs", type=Path, default=ROOT / "build" / "peers", help="folder of the environments"
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.repeats < 0:
        parser.error("at least 1 round is needed, and repeats must not be negative")

    from fedsim.tracking.environment import describe_environment

    machine = describe_environment(PROCESSES, sys.argv)
    print(f"{machine['hardware']['cpu']}, {os.cpu_count()} cores; {PROCESSES} processes of 1 thread\n")
    pythons, failed = {}, {}
    for peer in options.peers:
        try:
            pythons[peer] = environment(peer, options.venvs)
        except subprocess.CalledProcessError as error:
            failed[peer] = f"cannot be installed: {_last_line(error.stderr)}"
            print(f"{peer}: {failed[peer]}")
    rows: list[dict[str, Any]] = []
    versions: dict[str, Any] = {"fedsim": _own_versions()}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.workloads:
            sides = [Side(side, pythons.get(side)) for side in ("fedsim", *pythons)]
            run_workload(Path(temporary) / name, name, sides, options.rounds, options.repeats)
            for side in sides:
                versions |= {side.name: side.versions} if side.versions else {}
                failed |= {f"{name}/{side.name}": side.failure} if side.failure else {}
            rows += _report(name, sides)
    print(f"versions: {json.dumps(versions)}")
    record = {**machine, "rounds": options.rounds, "repeats": options.repeats, "peers": versions}
    print(json.dumps({"benchmark": "peers", **record, "failed": failed, "rows": rows}))
    return 0


@dataclass
class Side:
    """fedsim or a peer, and what was found out about it on one workload.

    Attributes:
        name: "fedsim" or that of the peer.
        python: of its environment; None for fedsim.
        timed: wall and CPU seconds of the rounds of each timed run.
        adapter: at the end of the latest timed run.
        exact: after one round in float64.
        versions: of its packages.
        failure: why it has not all of these.
    """

    name: str
    python: Path | None
    timed: list[dict[str, Any]] = field(default_factory=list)
    adapter: dict[str, Any] | None = None
    exact: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    failure: str | None = None


def run_workload(folder: Path, name: str, sides: list[Side], rounds: int, repeats: int) -> None:
    """Fill in the sides: timed runs in turns, then one round in float64."""
    timed, exact = folder / "timed", folder / "exact"
    keys = write_workload(timed, *WORKLOADS[name], rounds=WARM_UP + rounds)
    exact_keys = write_workload(exact, *WORKLOADS[name], rounds=1, extra=("model.dtype=float64",))
    for repeat in range(repeats):
        for side in sides:
            run = _run_side(side, timed, keys, timed / f"{side.name}-{repeat}", WARM_UP + rounds)
            if run is not None:
                side.adapter = run.pop("adapter")
                side.timed.append(run)
    for side in sides:
        run = _run_side(side, exact, exact_keys, exact / side.name, 1)
        side.exact = run["adapter"] if run is not None else None


def _run_side(side: Side, workload: Path, keys: list[str], out: Path, rounds: int) -> dict[str, Any] | None:
    """One run of a side: what `measure` says, and the adapter. None, and a line, if it fails."""
    out.mkdir()
    command = (
        _fedsim_command(keys, out)
        if side.python is None
        else peer_command(side.python, side.name, workload, out)
    )
    try:
        run = measure(command, out / _rounds_file(side.name), rounds)
    except RuntimeError as error:
        side.failure = str(error)
        print(f"{workload.parent.name} {side.name}: failed: {error}", flush=True)
        return None
    if side.python is not None:
        side.versions = json.loads((out / "versions.json").read_text(encoding="utf-8"))
    return {**run, "adapter": _adapter(side.name, out)}


def environment(peer: str, venvs: Path) -> Path:
    """Python of a peer's virtual environment, made if it is not there.

    Raises:
        subprocess.CalledProcessError: it cannot be made.
    """
    folder = venvs.resolve() / peer
    python = folder / "bin" / "python"
    done = folder / "complete"
    if done.exists():
        return python
    own = _own_versions()
    torch = f"torch=={own['torch'].partition('+')[0]}"
    rest = [f"{name}=={own[name]}" for name in ("transformers", "peft", "accelerate")]
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-q", torch],  # first, so that nothing else chooses its build
        [str(python), "-m", "pip", "install", "-q", torch, *rest, "numpy", *PACKAGES[peer]],
    ):
        subprocess.run(command, check=True, capture_output=True, text=True)
    done.touch()
    return python


def write_workload(
    folder: Path, num_clients: int, texts: int, opt_125m: bool, *, rounds: int, extra: tuple[str, ...] = ()
) -> list[str]:
    """Write a workload for the peers; returns the configuration with which fedsim trains on the same.

    Args:
        folder: to be made.
        num_clients: clients, all of which are in each round.
        texts: of each client.
        opt_125m: the base has the shape of OPT-125M and random weights, else it is the embedded one.
        rounds: of a run.
        extra: more keys of the configuration.
    """
    from fedsim.config.loader import load_config
    from fedsim.data.build import build_data
    from fedsim.lora.peft_format import save_peft_adapter
    from fedsim.models.base import build_base
    from fedsim.models.targets import find_targets
    from fedsim.server.build import build_initial_adapter, build_local_training
    from fedsim.server.build_clients import build_tiers
    from fedsim.server.cohort import client_jobs

    folder.mkdir(parents=True)
    keys = [
        f"run.rounds={rounds}",
        f"data.partition.num_clients={num_clients}",
        f"data.partition.examples_per_client={texts}",
        "data.client_test_fraction=0",
        f"cohort.size={num_clients}",
        "lora.rank=8",
        "lora.dropout=0",
        f"training.pack.num_packs={PROCESSES}",
        "training.batch_size=4",
        "training.max_grad_norm=null",
        "training.optimizer.lr=0.001",
        "training.schedule.name=constant",
        "evaluation.client_test=off",
        "evaluation.every_rounds=1000000",
        "evaluation.max_test_examples=1",
        "checkpoint.every_rounds=1000000",
        "tracking.wandb.mode=disabled",
        "tracking.progress=off",
        *extra,
    ]
    if opt_125m:
        _write_opt_125m(folder / "model")
        keys.append(f"model.name_or_path={folder / 'model'}")
    config = load_config(None, keys)
    base = build_base(config.model, "cpu")
    if not opt_125m:
        base.model.save_pretrained(folder / "model")
    data = build_data(config.data, base.tokenizer, config.run.seed)
    targets = find_targets(base.model, config.lora.target_modules)
    tiers = build_tiers(config, targets, num_clients, data.partition.sizes)
    start = folder / "start"
    start.mkdir()
    save_peft_adapter(
        build_initial_adapter(config, targets, tiers),
        start,
        str(folder / "model"),
        config.lora.target_modules,
    )
    budget, local = build_local_training(config)
    jobs = client_jobs(range(num_clients), data, budget, local)

    def tokens(examples: Any) -> list[list[int]]:
        return [data.train.flat_tokens(examples[i : i + 1]).tolist() for i in range(len(examples))]

    batches = [
        [[tokens(step[0]) for step in job.batches(round_index)] for job in jobs]
        for round_index in range(rounds)
    ]
    (folder / "batches.json").write_text(json.dumps(batches), encoding="utf-8")
    counts = [len(job.examples) for job in jobs]
    optimizer = config.training.optimizer
    settings = {
        "pad_id": base.pad_id,
        "dtype": str(base.dtype).removeprefix("torch."),
        "batch_size": config.training.batch_size,
        "client_examples": counts,
        "client_weights": [count / sum(counts) for count in counts],
        **{key: getattr(optimizer, key) for key in ("lr", "beta1", "beta2", "eps", "weight_decay")},
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return keys


def _write_opt_125m(folder: Path) -> None:
    import torch
    from opt_shape import write_tokenizer
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(dropout=0.0, attention_dropout=0.0)  # the defaults are OPT-125M's sizes
    OPTForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)


def peer_command(python: Path, peer: str, workload: Path, out: Path) -> list[str]:
    script = [str(PROGRAMS / SCRIPTS[peer]), str(workload), str(out)]
    if peer == "flower":  # starts its own processes
        return [str(python), *script]
    return [str(python), *_torchrun(), *script]


def _torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]


def _fedsim_command(keys: list[str], out: Path) -> list[str]:
    return [
        sys.executable,
        *_torchrun(),
        "-m",
        "fedsim.main",
        f"run.output_dir={out}",
        "run.name=run",
        *keys,
    ]


def _rounds_file(side: str) -> str:
    return "run/metrics.jsonl" if side == "fedsim" else "rounds.txt"


def measure(command: list[str], rounds_file: Path, num_rounds: int) -> dict[str, Any]:
    """Run a side to its end; wall and CPU seconds of each round after the warm-up.

    Raises:
        RuntimeError: it failed, or took too long.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
        )
        marks: list[tuple[float, float]] = []
        began = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - began < TIMEOUT_S:
                _mark(rounds_file, marks, process.pid)
                time.sleep(0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode != 0 or len(marks) != num_rounds:
            log.seek(0)
            raise RuntimeError(
                f"exit code {process.returncode}, {len(marks)} of {num_rounds} rounds: {_last_line(log.read())}"
            )
    after = marks[WARM_UP - 1 :]
    pairs = list(pairwise(after))
    return {
        "wall_s": [end[0] - start[0] for start, end in pairs],
        "cpu_s": [end[1] - start[1] for start, end in pairs],
    }


def _mark(rounds_file: Path, marks: list[tuple[float, float]], pid: int) -> None:
    try:
        lines = rounds_file.read_bytes().count(b"\n")
    except OSError:
        return
    if lines > len(marks):
        now = time.perf_counter()
        marks += [(now, _tree_cpu_s(pid))] * (lines - len(marks))


def _tree_cpu_s(root: int) -> float:
    """CPU seconds of a process and all below it, those that have ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(field) for field in fields[11:15])

    def is_below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    return sum(ticks[pid] for pid in ticks if is_below(pid)) / os.sysconf("SC_CLK_TCK")


def _adapter(side: str, out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    file = out / "run/adapter/adapter_model.safetensors" if side == "fedsim" else out / "adapter.safetensors"
    return dict(load_file(str(file)))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Norm of the difference of two adapters, relative to the norm of the first."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the adapters have other parts: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    squares = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    whole = sum(float(value.double().square().sum()) for value in ours.values())
    return float((squares / whole) ** 0.5)


def _report(workload: str, sides: list[Side]) -> list[dict[str, Any]]:
    print(f"{workload:14s}   wall s   CPU s   x fedsim   lowest   highest   difference: float32    float64")
    rows: list[dict[str, Any]] = []
    ours = sides[0]
    for side in sides:
        row: dict[str, Any] = {"workload": workload, "side": side.name}
        if side.timed:
            walls = [statistics.median(run["wall_s"]) for run in side.timed]
            row |= {"wall_s": statistics.median(walls), "walls_s": walls}
            row |= {"cpu_s": statistics.median([statistics.median(run["cpu_s"]) for run in side.timed])}
            row |= {"lowest": min(walls), "highest": max(walls)}
            if ours.timed:
                row["ratio"] = row["wall_s"] / (rows[0] if rows else row)["wall_s"]
        for key, mine, theirs in (
            ("relative", ours.adapter, side.adapter),
            ("relative_float64", ours.exact, side.exact),
        ):
            if mine is not None and theirs is not None:
                row[key] = difference(mine, theirs)
        rows.append(row)
        print(
            f"  {side.name:12s} {_cell(row, 'wall_s', '8.3f')} {_cell(row, 'cpu_s', '7.2f')} "
            f"{_cell(row, 'ratio', '10.2f')} {_cell(row, 'lowest', '8.3f')} {_cell(row, 'highest', '9.3f')} "
            f"{_cell(row, 'relative', '21.1e')} {_cell(row, 'relative_float64', '10.1e')}",
            flush=True,
        )
    print()
    return rows


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    """A figure, or a dash where there is none."""
    return format(row[key], form) if key in row else "-".rjust(int(form.partition(".")[0]))


def _own_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no output"])[-1].strip()[:300]


if __name__ == "__main__":
    sys.exit(main())
