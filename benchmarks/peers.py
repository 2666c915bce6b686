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
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
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
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument(
        "--venvs", type=Path, default=ROOT / "build" / "peers", help="folder of the environments"
    )
    options = parser.parse_args()
    if options.rounds < 1 or options.repeats < 1:
        parser.error("at least 1 round and 1 repeat are needed")

    pythons, failed = {}, {}
    for peer in options.peers:
        try:
            pythons[peer] = environment(peer, options.venvs)
        except subprocess.CalledProcessError as error:
            failed[peer] = f"cannot be installed: {_last_line(error.stderr)}"
            print(f"{peer}: {failed[peer]}")
    print(f"{_cpu()}, {os.cpu_count()} cores; {PROCESSES} processes of 1 thread\n")
    rows: list[dict[str, Any]] = []
    versions: dict[str, Any] = {"fedsim": _own_versions()}
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.workloads:
            folder = Path(temporary) / name
            keys = write_workload(folder, *WORKLOADS[name], rounds=WARM_UP + options.rounds)
            exact = folder / "float64"
            exact_keys = write_workload(exact, *WORKLOADS[name], rounds=1, extra=("model.dtype=float64",))
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("fedsim", *pythons)}
            exact_adapters: dict[str, dict[str, Any]] = {}
            for repeat in range(options.repeats + 1):
                last = repeat == options.repeats
                where, what = (exact, exact_keys) if last else (folder, keys)
                for side, done in runs.items():
                    out = where / f"{side}-{repeat}"
                    out.mkdir()
                    command = (
                        _fedsim_command(what, out)
                        if side == "fedsim"
                        else peer_command(pythons[side], side, where, out)
                    )
                    try:
                        run = measure(command, out / _rounds_file(side), 1 if last else WARM_UP + options.rounds)
                    except RuntimeError as error:
                        failed[f"{name}/{side}"] = str(error)
                        print(f"{name} {side}: failed: {error}", flush=True)
                        continue
                    if last:
                        exact_adapters[side] = _adapter(side, out)
                        continue
                    done.append({**run, "adapter": _adapter(side, out)})
                    if side != "fedsim":
                        versions[side] = json.loads((out / "versions.json").read_text(encoding="utf-8"))
            rows += _report(name, runs, exact_adapters)
    print(f"\nversions: {json.dumps(versions)}")
    record = {"cpu": _cpu(), "cores": os.cpu_count(), "rounds": options.rounds, "repeats": options.repeats}
    print(json.dumps({"benchmark": "peers", **record, "versions": versions, "failed": failed, "rows": rows}))
    return 0


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
    from fedsim.server.build import build_initial_adapter, build_local_training, build_tiers
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
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    from fedsim.models.embedded import embedded_tokenizer_folder

    torch.manual_seed(0)
    config = OPTConfig(dropout=0.0, attention_dropout=0.0)  # the defaults are OPT-125M's sizes
    OPTForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_tokenizer_folder()).save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]  # as many entries as OPT has rows, else fedsim refuses the pair
    taken = set(vocabulary.values()) | {token["id"] for token in tokenizer["added_tokens"]}
    vocabulary |= {f"<never {i}>": i for i in range(config.vocab_size) if i not in taken}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


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


def _report(
    workload: str, runs: dict[str, list[dict[str, Any]]], exact: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    print(f"{workload:14s}   wall s   CPU s   x fedsim   lowest   highest   difference: float32    float64")
    rows: list[dict[str, Any]] = []
    ours: dict[str, Any] | None = None
    for side, done in runs.items():
        if not done:
            continue
        walls = [statistics.median(run["wall_s"]) for run in done]
        row: dict[str, Any] = {
            "workload": workload,
            "side": side,
            "wall_s": statistics.median(walls),
            "cpu_s": statistics.median([statistics.median(run["cpu_s"]) for run in done]),
            "walls_s": walls,
        }
        if side == "fedsim":
            ours = done[0]["adapter"]
        if ours is not None:
            theirs = done[-1]["adapter"]
            row["ratio"] = row["wall_s"] / rows[0]["wall_s"] if rows else 1.0
            row["relative"] = difference(ours, theirs)
        if "fedsim" in exact and side in exact:
            row["relative_float64"] = difference(exact["fedsim"], exact[side])
        rows.append(row)
        print(
            f"  {side:12s} {row['wall_s']:8.3f} {row['cpu_s']:7.2f} {row.get('ratio', float('nan')):10.2f} "
            f"{min(walls):8.3f} {max(walls):9.3f} {row.get('relative', float('nan')):21.1e} "
            f"{row.get('relative_float64', float('nan')):10.1e}",
            flush=True,
        )
    print()
    return rows


def _own_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no output"])[-1].strip()[:300]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
