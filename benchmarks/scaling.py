"""Rounds a second, overhead and memory against processes, clients, cohort and LoRA rank, and what they say of more.

    python benchmarks/scaling.py [--sections ranks clients ...] [--quick] [--figures DIR]

Every row is a run of its own, started by torchrun in a temporary folder, one thread a process, on the base of the quick
start. Clients hold paragraphs of this Python's standard library; the number that a client holds is log-normal (sigma 1,
median 4, from 3 to 40), one local epoch, FedAvg. The section `sizes` has other medians, so that the fit can tell what a
token costs from what a client costs. While a run goes on, this process reads /proc/PID/smaps_rollup of the
others and watches metrics.jsonl grow. The first two rounds warm up; the last one alone is evaluated; none of them is
counted.

    setup s    from the start of torchrun to the start of the first round, with a tokenized corpus in no cache
    s/round    median wall time from one record to the next
    clients/s, tokens/s   of that time; tokens are label tokens
    outside    milliseconds for each client of a round that are neither local training nor waiting for the slowest
               process: sampling, packing, gather, aggregation, records, checkpoint
    idle       share of the processes' time in local training that they wait for the slowest, measured
    by tokens  the same if a token took equally long everywhere
    RSS, own   MiB a process, as in benchmarks/flexlora_scale.py; median over the counted rounds
    growth     of RSS from the first counted rounds to the last ones, of the process in which it grew most: medians of
               five rounds each, of fewer in a short run. Of the section `long`, over 50 rounds after the first ten, in
               which the C library finds out how much it needs; "early" is that from the third round to the tenth

With more processes than cores the processes share them: s/round then says nothing about as many cores, outside and
memory still do. `projection` asks `--estimate` with the data sheet of an H100 for a round of the shape of
OPT-125M on 8 nodes of 8 GPUs, and adds what was measured here on the host. Tables come first, one JSON object is the
last line.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from watching import ROOT, Samples, watch

from fedsim.tracking.environment import describe_environment

SECTIONS = ("ranks", "clients", "cohort", "sizes", "rank", "tiers", "long", "projection")
WARM_UP = 2
SETTLED = 10
"""Rounds after which memory is expected to stay as it is."""
WINDOW = 5
"""Rounds of whose memory the median is taken, at either end."""
MEDIAN_TEXTS, FEWEST_TEXTS, MOST_TEXTS, SIGMA = 4.0, 3, 40, 1.0
SETTINGS = (
    "data.partition.name=natural",
    "data.partition.min_examples=1",
    "data.test_fraction=0.02",
    "data.client_test_fraction=0",
    "data.client_field=client",
    "evaluation.client_test=off",
    "evaluation.every_rounds=100000",
    "evaluation.max_test_examples=100",
    "tracking.wandb.mode=disabled",
    "tracking.progress=off",
)
TIERS = "lora.tiers=[{share: 0.8, rank: 2}, {share: 0.2, rank: 64}]"
ALL_LINEAR = "lora.target_modules=[q_proj, k_proj, v_proj, out_proj, fc1, fc2]"
HEADER = (
    "          run  processes  clients  cohort  texts  rank  setup s  s/round  clients/s  tokens/s  outside    idle  "
    "by tokens  RSS MiB  own MiB   growth"
)


def main() -> int:
    options = _parse()
    environment = describe_environment(1, sys.argv)
    print(
        f"{environment['hardware']['cpu']}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n\n{HEADER}",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["FEDSIM_CACHE"] = str(folder / "cache")
        _warm_up(folder)
        for wanted in _runs(options):
            row = _measure(folder, **wanted)
            rows.append(row)
            print(_line(row), flush=True)
        fitted = _fit(rows)
        projected = (
            _project(folder, fitted, options.projected_clients) if "projection" in options.sections else None
        )
    for text in _conclusions(rows, fitted, projected):
        print(text)
    if options.figures is not None:
        _draw(rows, options.figures)
    print(
        json.dumps(
            {"benchmark": "scaling", **environment, "rows": rows, "fitted": fitted, "projected": projected}
        )
    )
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the clients, for a look at the program"
    )
    parser.add_argument("--processes", type=int, default=4, help="of all sections but ranks")
    parser.add_argument(
        "--rounds", type=int, default=6, help=f"of a run; the first {WARM_UP} and the last not counted"
    )
    parser.add_argument("--long-rounds", type=int, default=66)
    parser.add_argument("--projected-clients", type=int, default=100_000)
    parser.add_argument("--figures", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    if options.rounds < WARM_UP + 3:
        parser.error(f"--rounds must be at least {WARM_UP + 3}")
    return options


def _runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to measure; runs that two sections share are measured once, in the first."""
    less = 10 if options.quick else 1
    common = {"processes": options.processes, "lora_rank": 2, "rounds": options.rounds}
    common |= {"median": MEDIAN_TEXTS, "more": ()}
    seen = set()
    for section, settings in (
        *(("ranks", {"processes": count, "clients": 200, "cohort": 200}) for count in (1, 2, 4)),
        *(("clients", {"clients": count, "cohort": 100}) for count in (100, 1_000, 10_000)),
        *(("cohort", {"clients": 10_000, "cohort": count}) for count in (100, 300, 1_000)),
        *(("sizes", {"clients": 200, "cohort": 200, "median": median}) for median in (1.0, 16.0)),
        *(("rank", {"clients": 10_000, "cohort": 300, "lora_rank": rank}) for rank in (2, 8, 32)),
        ("tiers", {"clients": 200, "cohort": 200, "more": ("strategy.name=flexlora", TIERS, ALL_LINEAR)}),
        ("long", {"clients": 1_000, "cohort": 100, "rounds": options.long_rounds}),
    ):
        wanted = {"section": section, **common, **settings}
        wanted["clients"], wanted["cohort"] = wanted["clients"] // less, wanted["cohort"] // less
        key = tuple(value for name, value in wanted.items() if name != "section")
        if section in options.sections and key not in seen:
            seen.add(key)
            yield wanted


def _measure(
    folder: Path,
    section: str,
    processes: int,
    clients: int,
    cohort: int,
    lora_rank: int,
    median: float,
    rounds: int,
    more: Sequence[str],
) -> dict[str, Any]:
    name = f"{section}-{processes}-{clients}-{cohort}-{lora_rank}-{median:g}"
    corpus = folder / f"clients-{clients}-{median:g}.jsonl"
    if not corpus.exists():
        _write_corpus(corpus, clients, median)
    keys = [
        f"data.source={corpus}",
        f"data.partition.num_clients={clients}",
        f"cohort.size={cohort}",
        f"lora.rank={lora_rank}",
        f"run.rounds={rounds}",
        f"run.output_dir={folder}",
        f"run.name={name}",
        "training.pack.num_packs=16",
        *SETTINGS,
        *more,
    ]
    load, began = os.getloadavg()[0], time.monotonic()
    samples, arrivals = watch(processes, keys, folder / name / "metrics.jsonl", folder / "output.txt")
    records = [
        json.loads(line)
        for line in (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    counted = range(WARM_UP, rounds - 1)
    walls = [arrivals[index] - arrivals[index - 1] for index in counted]
    wall = statistics.median(walls)
    inside = [records[index]["time/train_s"] + records[index]["time/wait_s"] for index in counted]
    return {
        "section": section,
        "processes": processes,
        "clients": clients,
        "cohort": cohort,
        "lora_rank": lora_rank,
        "median_texts": median,
        "rounds": rounds,
        "load_before": load,
        "setup_s": arrivals[0] - records[0]["time/round_s"] - began,
        "round_s": wall,
        "clients_per_s": cohort / wall,
        "tokens_per_s": statistics.median(records[index]["train/tokens"] for index in counted) / wall,
        "tokens": statistics.median(records[index]["train/tokens"] for index in counted),
        "train_s": statistics.median(records[index]["time/train_s"] for index in counted),
        "outside_ms": 1e3 * statistics.median(w - i for w, i in zip(walls, inside, strict=True)) / cohort,
        "idle": statistics.median(records[index]["ranks/idle_share"] for index in counted),
        "idle_by_tokens": _idle_by_tokens(folder / name / "clients.parquet", processes, counted),
        **_memory(samples, counted),
    }


def _idle_by_tokens(path: Path, processes: int, rounds: range) -> float:
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pydict()
    shares = []
    for round_index in rounds:
        loads = np.zeros(processes)
        for index, rank, tokens in zip(
            table["round_index"], table["process_rank"], table["num_tokens"], strict=True
        ):
            if index == round_index:
                loads[rank] += tokens  # one epoch: what is held is what is trained on
        shares.append(1.0 - loads.mean() / loads.max())
    return float(np.median(shares))


def _memory(samples: Samples, counted: range) -> dict[str, float]:
    """Medians in MiB over the counted rounds, and growth over them; a record is there once its round is done."""
    rounds = [done for done in sorted(samples) if done in counted]
    processes = set.intersection(*(set(samples[done]) for done in rounds))

    def median(done: int, process: int, kind: str) -> float:
        return statistics.median(one[kind] for one in samples[done][process])

    def middle(kind: str) -> float:
        return statistics.fmean(statistics.median(median(d, p, kind) for d in rounds) for p in processes)

    def growth(rounds: Sequence[int]) -> float:
        window = min(WINDOW, len(rounds) // 2)
        return max(
            statistics.median(median(done, process, "rss_mib") for done in rounds[-window:])
            / statistics.median(median(done, process, "rss_mib") for done in rounds[:window])
            - 1.0
            for process in processes
        )

    early = [done for done in rounds if done < SETTLED]
    settled = [done for done in rounds if done >= SETTLED]
    found = {"rss_mib": middle("rss_mib"), "own_mib": middle("own_mib")}
    if len(settled) < 2 * WINDOW:
        return found | {"growth": growth(rounds)}
    return found | {"growth": growth(settled), "early_growth": growth(early)}


def _warm_up(folder: Path) -> None:
    """The embedded base, which is trained once, and what the operating system reads from the disk."""
    corpus = folder / "warm-up.jsonl"
    _write_corpus(corpus, 10, MEDIAN_TEXTS)
    keys = [f"data.source={corpus}", "data.partition.num_clients=10", "run.rounds=1", "run.name=warm-up"]
    watch(2, [*keys, f"run.output_dir={folder}", *SETTINGS], folder / "none", folder / "output.txt")


def _write_corpus(path: Path, clients: int, median: float) -> None:
    """A text file with a column `client`; sizes are log-normal, the texts go round."""
    texts = _paragraphs()
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        place = 0
        for client in range(clients):
            size = min(MOST_TEXTS, max(FEWEST_TEXTS, round(median * rng.lognormvariate(0.0, SIGMA))))
            for _ in range(size):
                text = texts[place % len(texts)]
                file.write(json.dumps({"client": f"client {client:06d}", "text": text}) + "\n")
                place += 1


def _paragraphs() -> list[str]:
    """Paragraphs of 40 to 400 characters in the sources of the standard library."""
    found: list[str] = []
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        found += [text for part in source.split("\n\n") if 40 < len(text := part.strip()) < 400]
        if len(found) > 50_000:
            break
    return found


def _fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rates of the host, by least squares over runs of LoRA rank 2: seconds = fixed + per client * clients.

    Of local training: processor seconds = per token * tokens + per client * clients, where the processes have a core
    each; with more processes than cores, the cores' time.
    """
    plain = [row for row in rows if row["lora_rank"] == 2 and row["section"] not in ("tiers", "long")]
    if len({row["cohort"] for row in plain}) < 2:
        return {}
    clients = np.array([row["cohort"] for row in plain], dtype=float)
    outside = np.array([row["outside_ms"] * row["cohort"] / 1e3 for row in plain])
    (fixed, serial), *_ = np.linalg.lstsq(np.stack([np.ones_like(clients), clients], 1), outside, rcond=None)
    cores = os.cpu_count() or 1
    training = np.array([row["train_s"] * min(row["processes"], cores) for row in plain])
    tokens = np.array([row["tokens"] for row in plain], dtype=float)
    # Rates cannot be negative. Without the section sizes the two tell the same, and one of them takes it all.
    (by_token, by_client), _ = nnls(np.stack([tokens, clients], 1), training)
    return {
        "outside_fixed_s": float(fixed),
        "outside_s_per_client": float(serial),
        "training_s_per_token": float(by_token),
        "training_s_per_client": float(by_client),
        "largest_error_outside_s": float(np.abs(fixed + serial * clients - outside).max()),
        "largest_relative_error_training": float(
            np.abs((by_token * tokens + by_client * clients) / training - 1).max()
        ),
    }


def _project(folder: Path, fitted: dict[str, float], clients: int) -> dict[str, Any]:
    """A round of OPT-125M's shape on 64 H100s, 5 % of the clients: the estimate's data sheet, and the host's share."""
    corpus = folder / "projection.jsonl"
    _write_corpus(corpus, clients + clients // 500 + 10, 1.0)  # of some clients the test set takes everything
    cohort, world_size = clients // 20, 64
    result = folder / "estimate.json"
    keys = [
        f"data.source={corpus}",
        f"data.partition.num_clients={clients}",
        f"cohort.size={cohort}",
        f"model.name_or_path={_opt_shape(folder / 'opt-125m')}",
        "lora.rank=8",
        "training.pack.num_packs=256",
        "training.pack.max_slots=32",
        "run.rounds=3",
        *SETTINGS,
    ]
    began = time.monotonic()
    command = [sys.executable, "-m", "fedsim.main", "--estimate", "--gpu", "h100"]
    command += ["--processes", str(world_size), "--json", str(result), *keys]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the estimate failed:\n{done.stderr}")
    estimate = json.loads(result.read_text(encoding="utf-8"))
    host = {}
    if fitted:
        host = {
            "outside_s": fitted["outside_fixed_s"] + fitted["outside_s_per_client"] * cohort,
            "host_training_s": max(0.0, fitted["training_s_per_client"]) * cohort / world_size,
        }
    return {
        "clients": clients,
        "cohort": cohort,
        "processes": world_size,
        "estimate_took_s": time.monotonic() - began,
        "tokens": estimate["round"]["tokens"],
        "idle_by_tokens": estimate["round"]["idle_share"],
        "gathered_mib": estimate["round"]["gathered_bytes"] / 2**20,
        "memory_gib": estimate["memory"]["peak_bytes"] / 2**30,
        "train_s": estimate["time"]["train_s"],
        "server_s": estimate["time"]["server_s"],
        **host,
        "round_s": estimate["time"]["train_s"] + estimate["time"]["server_s"] + sum(host.values()),
    }


def _opt_shape(folder: Path) -> Path:
    """The configuration of OPT-125M without weights, which an estimate does not need, and a tokenizer."""
    from opt_shape import write_tokenizer
    from transformers import OPTConfig

    config = OPTConfig(dropout=0.0)  # the defaults are OPT-125M's sizes
    config.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    return folder


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['section']:>13s} {row['processes']:10d} {row['clients']:8,d} {row['cohort']:7,d} "
        f"{row['median_texts']:6.0f} {row['lora_rank']:5d} "
        f"{row['setup_s']:8.1f} {row['round_s']:8.2f} {row['clients_per_s']:10.1f} {row['tokens_per_s']:9,.0f} "
        f"{row['outside_ms']:5.2f} ms {row['idle']:7.1%} {row['idle_by_tokens']:10.1%} {row['rss_mib']:8.1f} "
        f"{row['own_mib']:8.1f} {row['growth']:8.2%}"
    )


def _conclusions(
    rows: Sequence[dict[str, Any]], fitted: dict[str, float], projected: dict[str, Any] | None
) -> Iterator[str]:
    yield ""
    for row in rows:
        if "early_growth" in row:
            yield (
                f"over {row['rounds']} rounds RSS grew by {row['early_growth']:.1%} to the {SETTLED}th and by "
                f"{row['growth']:.1%} after it"
            )
    federations = {row["clients"]: row for row in rows if row["section"] == "clients"}
    if len(federations) > 1:
        few, many = min(federations), max(federations)
        ratio = federations[many]["rss_mib"] / federations[few]["rss_mib"]
        yield f"memory of a process with {many:,d} clients is {ratio:.3f} times that with {few:,d}"
    if fitted:
        yield (
            f"outside training: {fitted['outside_fixed_s']:.3f} s a round and "
            f"{1e3 * fitted['outside_s_per_client']:.2f} ms a client "
            f"(largest error {fitted['largest_error_outside_s']:.3f} s)"
        )
        yield (
            f"local training: {1e6 * fitted['training_s_per_token']:.1f} us a label token and "
            f"{1e3 * fitted['training_s_per_client']:.2f} ms a client, of one core "
            f"(largest error {fitted['largest_relative_error_training']:.0%})"
        )
    if projected is not None:
        p = projected
        yield (
            f"projection, not measured: {p['clients']:,d} clients, {p['cohort']:,d} a round, OPT-125M's shape, LoRA "
            f"rank 8, {p['processes']} H100: {p['round_s']:.2f} s a round = {p['train_s']:.2f} s training by the data "
            f"sheet + {p['server_s']:.2f} s exchange and aggregation + {p.get('outside_s', 0):.2f} s records and "
            f"packing + {p.get('host_training_s', 0):.2f} s handling of clients, at this machine's rates"
        )


def _draw(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Three panels: rounds a second against processes; overhead against cohort; memory against clients."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fedsim.report.style import DPI, house_style, look

    with house_style():
        figure = Figure(figsize=(10.0, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3)
        for axes, section, x, y, labels in (
            (panels[0], "ranks", "processes", "clients_per_s", ("processes", "clients a second")),
            (
                panels[1],
                "cohort",
                "cohort",
                "outside_ms",
                ("clients a round", "ms a client outside training"),
            ),
            (panels[2], "clients", "clients", "rss_mib", ("clients of the federation", "MiB a process")),
        ):
            largest = max(row["clients"] for row in rows)
            sections = ("cohort", "clients") if section == "cohort" else (section,)
            chosen = [row for row in rows if row["section"] in sections]
            if section == "cohort":
                chosen = [row for row in chosen if row["clients"] == largest]
            shown = sorted(chosen, key=lambda row: row[x])
            axes.plot([row[x] for row in shown], [row[y] for row in shown], **look(0))
            highest = max(row[y] for row in shown)
            axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1.1 * highest))
            if section == "clients":
                axes.set_xscale("log")
            else:
                axes.set_xticks([row[x] for row in shown])
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "scaling.png", dpi=DPI)


if __name__ == "__main__":
    sys.exit(main())
