"""Time and memory of every partitioner, from lengths to partition.json, each in a process of its own.

    python benchmarks/partitions.py [--clients 100000] [--examples 10000000] [--labels 50] [--only NAME ...]

The corpus is made up: log-normal lengths (median 60 tokens, sigma 0.9), labels and natural clients of unequal size.
Columns:

    build s    length classes or labels, deal, each client's own test split
    json s     partition.json: hash, histograms, overlap
    peak MiB   most memory of the process
    corpus     of that, what stood before: Python, numpy, torch and the made-up corpus, whose texts are not in it
    MiB file   size of partition.json
    unique     share of the examples that some client holds
    overlap    mean pairwise overlap of clients

With more memory or time than the limits (--limit-s, --limit-mib) the exit status is 1. A table comes first, one JSON
object is the last line.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedsim.config.data_section import DataConfig
from fedsim.data.build import build_partition

BY_LENGTH = (
    "length_skew",
    "quantity_skew",
    "length_and_quantity",
    "pathological",
    "plato_label",
    "plato_quantity",
)
CASES: dict[str, dict[str, Any]] = {
    "iid": {"name": "iid"},
    **{name: {"name": name} for name in BY_LENGTH},
    "length_skew, 0.1": {"name": "length_skew", "dirichlet_alpha": 0.1},
    "length_skew, 100": {"name": "length_skew", "dirichlet_alpha": 100.0},
    "label_skew": {"name": "label_skew"},
    "length_and_quantity, 0.1": {"name": "length_and_quantity", "dirichlet_alpha": 0.1},
    "pathological, labels": {"name": "pathological", "class_by": "label"},
    "plato_label, labels": {"name": "plato_label", "class_by": "label"},
    "natural": {"name": "natural"},
}


def main() -> int:
    options = parse()
    if options.child is not None:
        print(json.dumps(measure(options, options.child)))
        return 0
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(
        f"{options.clients:,} clients, {options.examples:,} examples, {options.labels} labels, one thread\n"
    )
    print(f"{'partitioner':26s} build s  json s  peak MiB   corpus  MiB file   unique   overlap")
    rows = []
    for case in options.only or CASES:
        row = in_a_process(options, case)
        rows.append(row)
        print(
            f"{case:26s} {row['build_s']:7.1f} {row['json_s']:7.1f} {row['peak_mib']:9.0f} {row['corpus_mib']:8.0f} "
            f"{row['file_mib']:9.2f} {row['unique_share']:8.1%} {row['overlap']:9.2e}",
            flush=True,
        )
    slow = [row["case"] for row in rows if row["build_s"] + row["json_s"] > options.limit_s]
    large = [row["case"] for row in rows if row["peak_mib"] > options.limit_mib]
    print(
        f"\nslower than {options.limit_s:g} s: {slow or 'none'}; above {options.limit_mib:g} MiB: {large or 'none'}"
    )
    keys = {key: value for key, value in vars(options).items() if key not in ("only", "child")}
    record = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "numpy": np.__version__,
    }
    print(json.dumps({"benchmark": "partitions", "options": keys, **record, "rows": rows}))
    return 1 if slow or large else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--examples", type=int, default=10_000_000)
    parser.add_argument("--labels", type=int, default=50, help="values of the label column")
    parser.add_argument("--limit-s", type=float, default=60.0, help="for build and json together")
    parser.add_argument("--limit-mib", type=float, default=4096.0)
    parser.add_argument("--only", nargs="+", choices=CASES, help="these partitioners")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examples < 4 * options.clients:
        parser.error("--examples must be at least 4 for each client")
    return options


def in_a_process(options: argparse.Namespace, case: str) -> dict[str, Any]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("clients", "examples", "labels")]
    done = subprocess.run(
        [sys.executable, __file__, *sizes, "--child", case],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{case} failed:\n{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(options: argparse.Namespace, case: str) -> dict[str, Any]:
    store = made_up_store(options)
    share = options.examples // options.clients
    rules: dict[str, Any] = {"num_clients": options.clients, **CASES[case]}
    if rules["name"] == "plato_label":
        rules["examples_per_client"] = share
    config = DataConfig(source="made up", label_field="label", client_field="client", partition=rules)
    before = peak_mib()
    began = time.perf_counter()
    partition = build_partition(config, store, seed=1)
    built = time.perf_counter()
    described = partition.to_json()
    text = json.dumps(described)
    ended = time.perf_counter()
    return {
        "case": case,
        "build_s": built - began,
        "json_s": ended - built,
        "peak_mib": peak_mib(),
        "corpus_mib": before,
        "file_mib": len(text) / 2**20,
        "unique_share": described["unique_examples"] / options.examples,
        "overlap": described["mean_pairwise_overlap"],
        "size_summary": described["size_summary"],
        "hash": described["hash"],
    }


def made_up_store(options: argparse.Namespace) -> Any:
    """What a partitioner reads of a token store; equal labels and clients are one text object each."""
    rng = np.random.default_rng(0)
    count = options.examples
    lengths = np.maximum(rng.lognormal(np.log(60.0), 0.9, count), 2).astype(np.int64)
    label_names = [f"label {label}" for label in range(options.labels)]
    shares = rng.dirichlet(np.full(options.labels, 2.0))
    labels = rng.choice(options.labels, count, p=shares)
    labels[: options.labels] = np.arange(options.labels)
    num_values = options.clients + options.clients // 10
    client_names = [f"author {value:07d}" for value in range(num_values)]
    values = rng.integers(0, num_values, count)
    values[: 2 * num_values] = np.repeat(np.arange(num_values), 2)

    class Store(SimpleNamespace):
        def __len__(self) -> int:
            return count

    return Store(
        num_tokens=np.minimum(lengths, 128),
        untruncated_tokens=lengths,
        words=lengths,
        characters=lengths,
        labels=[label_names[label] for label in labels.tolist()],
        clients=[client_names[value] for value in values.tolist()],
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
