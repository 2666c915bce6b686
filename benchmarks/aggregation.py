"""FlexLoRA's server step against the published way: the same cohorts, both sides in one run.

    python benchmarks/aggregation.py [--models opt-125m opt-1.3b] [--targets qv all] [--cohorts 2 20 80 500 mixed] ...

What is compared, from a cohort's factors in float32 to what each client gets:

    published   as the authors' code does it: scaling B A of client after client, added up densely in float32;
                torch.linalg.svd of the dense sum in float32; U_r S_r / scaling and V_r^T made for each client. The
                authors do the last step for the whole federation, here it is done for the cohort alone.
    fedsim      `FlexLora.aggregate`, and `FlexLora.download` for each distinct LoRA rank

Two tables. The first is a round of a model: cohorts of 2, 20, 80 and 500 clients of rank 8, and `mixed`, 80 clients of
ranks 8, 30 and 200 in turn. One module of each distinct shape is measured, and its seconds are multiplied by the number
of such modules; `modules` gives both. The second is one 2048 x 2048 module at growing total ranks, cut to `cut`
components, with the relative Frobenius distance of each side's truncation to that of a dense float64 decomposition.

Factors are normally distributed. With --decay below 1, column j of each B is multiplied by decay^j: a spectrum with
gaps is easier to cut, a flat one is the harder case and the default.

Seconds are the best of the repeats: of the CPU with one thread, else on the wall. Memory is the most that was held
beyond the cohort's factors, in MiB, in a process of its own; `2 dense` is that of two float64 sums of the largest
module. Tables come first, one JSON object is the last line.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.aggregation.flexlora import FlexLora
from fedsim.aggregation.strategy import Federation
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.state import ServerState
from fedsim.lora.subspace import leading_eigenvectors
from fedsim.lora.svd import choose_route, sum_svd
from fedsim.lora.updates import ClientReport

MODELS = {"opt-125m": (12, 768, 3072), "opt-350m": (24, 1024, 4096), "opt-1.3b": (24, 2048, 8192)}
"""Model -> layers, width, width of the feed-forward layer."""
COHORTS: dict[str, list[int]] = {
    **{str(count): [8] * count for count in (2, 20, 80, 500)},
    "mixed": [(8, 30, 200)[k % 3] for k in range(80)],
}
SCALING = ScalingRule(16.0)
TABLE_SIZE = 2048
TABLE_RANKS = {32: [8] * 4, 128: [8] * 16, 512: [8] * 64, 1600: [200] * 8}
Cohort = tuple[LoraFactors, ...]


@dataclass(frozen=True)
class Measured:
    """Seconds and MiB of one module; None where it was not measured."""

    seconds: float
    memory: float | None


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    # both sides load their libraries before the clock runs: scipy alone takes 0.2 s
    leading_eigenvectors(torch.eye(64, dtype=torch.float64), 4)
    torch.linalg.svd(torch.eye(64))
    print(f"{cpu_name()}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    rounds = measure_rounds(options) if not options.only_table else []
    table = measure_table(options) if not options.only_rounds else []
    packages = ("torch", "numpy", "scipy")
    record = {
        "benchmark": "aggregation",
        "options": vars(options),
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
        "rounds": rounds,
        "table": table,
    }
    print(json.dumps(record))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["opt-125m", "opt-1.3b"])
    parser.add_argument("--targets", nargs="+", choices=["qv", "all"], default=["qv", "all"])
    parser.add_argument("--cohorts", nargs="+", choices=COHORTS, default=list(COHORTS))
    parser.add_argument("--total-ranks", nargs="+", type=int, choices=TABLE_RANKS, default=list(TABLE_RANKS))
    parser.add_argument("--cuts", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without-memory", action="store_true")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-table", action="store_true", help="only the 2048 x 2048 module")
    only.add_argument("--only-rounds", action="store_true", help="only the rounds of models")
    return parser.parse_args()


def measure_rounds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model, choice of modules and cohort; each distinct shape is measured once for a cohort."""
    print(
        f"\n{'model':9} {'targets':7} {'cohort':6} {'ranks':>5} {'modules':16} {'published s':>11} {'fedsim s':>9} "
        f"{'ratio':>7} {'published MiB':>13} {'fedsim MiB':>10} {'2 dense':>8}  routes"
    )
    rows = []
    for model in options.models:
        seen: dict[tuple[str, tuple[int, int]], dict[str, Measured]] = {}
        for targets in options.targets:
            shapes = shapes_of(model, targets)
            for name in options.cohorts:
                for shape in shapes:
                    if (name, shape) not in seen:
                        seen[name, shape] = measure_module(shape, COHORTS[name], options)
                row = summed(shapes, {shape: seen[name, shape] for shape in shapes}, COHORTS[name])
                rows.append({"model": model, "targets": targets, "cohort": name, **row})
                show_round(rows[-1])
    return rows


def shapes_of(model: str, targets: str) -> dict[tuple[int, int], int]:
    """(out, in features) -> number of modules."""
    layers, width, hidden = MODELS[model]
    square = (width, width)
    shapes = [square] * 2 if targets == "qv" else [*[square] * 4, (hidden, width), (width, hidden)]
    return {shape: layers * count for shape, count in Counter(shapes).items()}


def summed(
    shapes: Mapping[tuple[int, int], int],
    measured: Mapping[tuple[int, int], Mapping[str, Measured]],
    ranks: Sequence[int],
) -> dict[str, Any]:
    seconds = {
        side: sum(count * measured[shape][side].seconds for shape, count in shapes.items())
        for side in ("published", "fedsim")
    }
    memory = {
        side: max(
            (found for shape in shapes if (found := measured[shape][side].memory) is not None), default=None
        )
        for side in ("published", "fedsim")
    }
    return {
        "clients": len(ranks),
        "total_rank": sum(ranks),
        "modules": {f"{o}x{i}": count for (o, i), count in shapes.items()},
        "measured_modules_of_each_shape": 1,
        "seconds": seconds,
        "ratio": seconds["published"] / seconds["fedsim"],
        "ratio_by_shape": {
            f"{o}x{i}": measured[o, i]["published"].seconds / measured[o, i]["fedsim"].seconds
            for o, i in shapes
        },
        "memory_mib": memory,
        "two_dense_float64_mib": max(2 * o * i * 8 / 2**20 for o, i in shapes),
        "gathered_stack_float32_mib": max(sum(ranks) * (o + i) * 4 / 2**20 for o, i in shapes),
        "routes": {f"{o}x{i}": choose_route(o, i, sum(ranks), max(ranks)) for o, i in shapes},
    }


def show_round(row: Mapping[str, Any]) -> None:
    modules = " ".join(f"{count}/1" for count in row["modules"].values())
    print(
        f"{row['model']:9} {row['targets']:7} {row['cohort']:6} {row['total_rank']:5} {modules:16} "
        f"{row['seconds']['published']:11.2f} {row['seconds']['fedsim']:9.3f} {row['ratio']:7.1f} "
        f"{mib(row['memory_mib']['published']):>13} {mib(row['memory_mib']['fedsim']):>10} "
        f"{row['two_dense_float64_mib']:8.0f}  {' '.join(row['routes'].values())}",
        flush=True,
    )


def mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def measure_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each total rank and cut of a square module."""
    print(
        f"\n{TABLE_SIZE} x {TABLE_SIZE}, decay {options.decay}\n{'ranks':>5} {'cut':>4} {'published s':>11} "
        f"{'fedsim s':>9} {'ratio':>7} {'published error':>15} {'fedsim error':>12}  route"
    )
    rows = []
    shape = (TABLE_SIZE, TABLE_SIZE)
    for total_rank in options.total_ranks:
        ranks = TABLE_RANKS[total_rank]
        cohort = make_cohort(shape, ranks, options.decay)
        weights = [1 / len(cohort)] * len(cohort)
        exact = torch.linalg.svd(WeightedSum(cohort, weights).dense(), full_matrices=False)
        rough = torch.linalg.svd(published_mean(cohort, weights), full_matrices=False)
        old = best_of(lambda cohort=cohort: published(cohort), options)
        for cut in [cut for cut in options.cuts if cut <= total_rank]:
            new = best_of(lambda cohort=cohort, cut=cut: fedsim_step(cohort, cut), options)
            svd = sum_svd(WeightedSum(cohort, weights), cut)
            rows.append(
                {
                    "total_rank": total_rank,
                    "cut": cut,
                    "seconds": {"published": old, "fedsim": new},
                    "ratio": old / new,
                    "error": {
                        "published": distance(rough, exact, cut),
                        "fedsim": distance((svd.U, svd.S, svd.Vh), exact, cut),
                    },
                    "route": choose_route(*shape, total_rank, cut),
                }
            )
            row = rows[-1]
            print(
                f"{total_rank:5} {cut:4} {old:11.3f} {new:9.4f} {row['ratio']:7.1f} "
                f"{row['error']['published']:15.1e} {row['error']['fedsim']:12.1e}  {row['route']}",
                flush=True,
            )
    return rows


def distance(found: Sequence[Tensor], exact: Sequence[Tensor], cut: int) -> float:
    """Of two truncations, relative to the exact one."""
    mine, theirs = (U[:, :cut].double() * S[:cut] @ Vh[:cut].double() for U, S, Vh in (found, exact))
    return float((mine - theirs).norm() / theirs.norm())


def measure_module(
    shape: tuple[int, int], ranks: Sequence[int], options: argparse.Namespace
) -> dict[str, Measured]:
    cohort = make_cohort(shape, ranks, options.decay)
    runs: dict[str, Callable[[], Any]] = {
        "published": lambda: published(cohort),
        "fedsim": lambda: fedsim_step(cohort, max(ranks)),
    }
    return {
        side: Measured(best_of(run, options), None if options.without_memory else most_memory(run))
        for side, run in runs.items()
    }


def make_cohort(shape: tuple[int, int], ranks: Sequence[int], decay: float) -> Cohort:
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    cohort = []
    for rank in ranks:
        A = torch.randn(rank, in_features, generator=generator)
        B = torch.randn(out_features, rank, generator=generator) * decay ** torch.arange(rank)
        cohort.append(LoraFactors(A, B, SCALING(rank)))
    return tuple(cohort)


def published_mean(cohort: Cohort, weights: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    for factors, weight in zip(cohort, weights, strict=True):
        part = (factors.B @ factors.A) * factors.scaling * weight
        total = part if total is None else total + part
    assert total is not None
    return total


def published(cohort: Cohort) -> list[LoraFactors]:
    total = published_mean(cohort, [1 / len(cohort)] * len(cohort))
    U, S, Vh = torch.linalg.svd(total, full_matrices=False)
    return [
        LoraFactors(
            Vh[: factors.rank], U[:, : factors.rank] @ torch.diag(S[: factors.rank]) / factors.scaling,
            factors.scaling,
        )
        for factors in cohort
    ]  # fmt: skip


def fedsim_step(cohort: Cohort, cut: int) -> list[AdapterState]:
    """The server's step for one module, and the adapters of all distinct ranks."""
    first = cohort[0]
    out_features, in_features = first.B.shape[0], first.A.shape[1]
    federation = Federation(
        num_clients=len(cohort), cohort_size=len(cohort), weighting="examples", scaling=SCALING,
        targets={"module": (in_features, out_features)}, max_ranks={"module": cut}, seed=0,
    )  # fmt: skip
    strategy = FlexLora(federation)
    state = ServerState(0, AdapterState({"module": first}))
    reports = [report(client_id) for client_id in range(len(cohort))]
    after = strategy.aggregate(state, reports, iter([("module", cohort)])).state
    ranks = {factors.rank for factors in cohort}
    return [strategy.download(after, {"module": min(rank, cut)}) for rank in sorted(ranks)]


def report(client_id: int) -> ClientReport:
    return ClientReport(
        client_id=client_id, num_examples=1, num_tokens=1, lora_rank=1, steps=1, train_loss_first=1.0,
        train_loss_last=1.0, train_loss_mean=1.0, trained_tokens=1, trained_parameters=1, lr_sum=0.0, uplink_bytes=0,
        downlink_bytes=0, pack=0, process_rank=0, seconds=0.0,
    )  # fmt: skip


def best_of(run: Callable[[], Any], options: argparse.Namespace) -> float:
    clock = time.process_time if options.threads == 1 else time.perf_counter
    seconds = []
    for _ in range(options.repeats):
        began = clock()
        run()
        seconds.append(clock() - began)
    return min(seconds)


def most_memory(run: Callable[[], Any]) -> float | None:
    """Most MiB that a run held beyond what stood before it; None where the system does not tell.

    In a forked process, so that neither side runs in memory that the other one has left behind.
    """
    if torch.get_num_threads() > 1:  # threads do not survive a fork
        return None
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(grown(run)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def grown(run: Callable[[], Any]) -> float | None:
    gc.collect()
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: what is freed goes back at once
        run()  # a forked process has yet to touch the libraries' own pages
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return None
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    raise OSError(field)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
