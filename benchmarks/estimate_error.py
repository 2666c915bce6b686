"""How far `--estimate --probe` is from what runs then take: seconds of a round, of the whole run, and memory.

    python benchmarks/estimate_error.py [--cases quickstart llama opt-125m] [--processes 1] [--repeats 1]

For each case the estimate is made in a process of its own, then the run is made in another, one thread each, in a
temporary folder; nothing is downloaded. A table for people comes first, one JSON object is the last line. Columns:

    round s     mean wall time of a round: predicted, measured (median over rounds is shown in the JSON line), error
    run s       wall time of the program from start to end, the same way
    CPU s       seconds of a core for all rounds, start-up taken off: what neighbours on the machine change least; one
                process only
    memory MiB  largest resident size of a process: predicted by the model alone, measured, error
    work        label tokens of all rounds, which must agree exactly

The machine's load before and after each case is in the JSON line: with others at work, times mean little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsim.tracking.environment import describe_environment

QUIET = ("tracking.wandb.mode=disabled", "tracking.progress=off", "checkpoint.keep_last=1")
ROOT = Path(__file__).resolve().parents[1]
TIERS = "lora.tiers=[{share: 0.5, rank: 2}, {share: 0.5, rank: 8}]"
OPT_LINEAR = "lora.target_modules=[q_proj, k_proj, v_proj, out_proj, fc1, fc2]"
LLAMA_LINEAR = "lora.target_modules=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"


def llama_folder(folder: Path) -> Path:
    """A random Llama of 6 layers and width 256, grouped heads, with the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(
        folder,
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            bos_token_id=2,
            eos_token_id=2,
        ),
    )


def neox_folder(folder: Path) -> Path:
    """A random GPT-NeoX of 4 layers and width 256, with the embedded tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return _save(
        folder,
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=8,
            max_position_embeddings=256,
            bos_token_id=2,
            eos_token_id=2,
        ),
    )


def opt_folder(folder: Path) -> Path:
    """A random model of OPT-125M's shape, with the embedded tokenizer."""
    from transformers import OPTConfig, OPTForCausalLM

    return _save(folder, OPTForCausalLM, OPTConfig(vocab_size=50272, dropout=0.0, eos_token_id=2))


def _save(folder: Path, model: Any, config: Any) -> Path:
    import torch
    from transformers import AutoTokenizer

    from fedsim.models.embedded import embedded_tokenizer_folder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_tokenizer_folder()).save_pretrained(folder)
    return folder


CASES: dict[str, tuple[Callable[[Path], Path] | None, list[str]]] = {
    "quickstart": (None, ["run.rounds=3"]),
    "llama": (
        llama_folder,
        [
            "run.rounds=3",
            "strategy.name=flexlora",
            TIERS,
            LLAMA_LINEAR,
            "data.max_examples=1200",
            "training.pack.num_packs=2",
            "evaluation.max_test_examples=100",
            "evaluation.max_client_test_examples=30",
        ],
    ),
    "neox": (
        neox_folder,
        [
            "run.rounds=3",
            "lora.target_modules=[query_key_value, dense]",
            "data.max_examples=1200",
            "evaluation.max_test_examples=100",
            "evaluation.max_client_test_examples=30",
        ],
    ),
    "opt-125m": (
        opt_folder,
        [
            "run.rounds=2",
            "lora.rank=8",
            OPT_LINEAR,
            "data.max_examples=200",
            "data.partition.num_clients=8",
            "cohort.size=4",
            "training.pack.num_packs=2",
            "evaluation.max_test_examples=30",
            "evaluation.client_test=off",
        ],
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--processes", type=int, default=1, help="of each run, and of each probe")
    parser.add_argument("--repeats", type=int, default=1, help="estimates and runs of each case, in turn")
    options = parser.parse_args()

    hardware = describe_environment(options.processes, sys.argv)["hardware"]
    print(
        f"{hardware['cpu']}, {hardware['cpu_cores']} cores; processes: {options.processes}, of one thread\n"
    )
    print(f"{'case':<12}{'round s':>26}{'run s':>26}{'CPU s':>26}{'memory MiB':>28}  work")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            make, keys = CASES[case]
            model = [] if make is None else [f"model.name_or_path={make(Path(folder) / case)}"]
            for repeat in range(options.repeats):
                row = _measure(f"{case}-{repeat}", [*keys, *model], Path(folder), options.processes)
                rows.append({"case": case, **row})
                print(_line(case, row), flush=True)
    print(json.dumps({"benchmark": "estimate_error", "hardware": hardware, "rows": rows}))
    return 0 if all(row["tokens"][0] == row["tokens"][1] for row in rows) else 1


def _measure(name: str, keys: Sequence[str], folder: Path, processes: int) -> dict[str, Any]:
    given = [f"run.output_dir={folder}", f"run.name={name}", *QUIET, *keys]
    before = os.getloadavg()[0]
    written = folder / f"{name}.json"
    _run(processes, [*given, "--estimate", "--probe", "--json", str(written)])
    told = json.loads(written.read_text(encoding="utf-8"))
    between = os.getloadavg()[0]
    seconds, cpu_s, peak_bytes = _run(processes, given)
    text = (folder / name / "metrics.jsonl").read_text(encoding="utf-8")
    rounds = [json.loads(line) for line in text.splitlines()]
    round_s = [one["time/round_s"] for one in rounds]
    return {
        "load": [before, between, os.getloadavg()[0]],
        "round_s": [told["time"]["round_mean_s"], statistics.fmean(round_s)],
        "round_median_s": statistics.median(round_s),
        "run_s": [told["time"]["total_s"], seconds],
        "cpu_s": [_cpu_seconds(told["time"], len(rounds)), cpu_s - told["time"]["loaded_cpu_s"]],
        "memory_bytes": [told["memory"]["peak_bytes"], peak_bytes],
        "probe_bytes": told["memory"]["measured_bytes"],
        "train_s": [
            told["time"]["train_s"],
            statistics.fmean(one["time/train_s"] + one["time/wait_s"] for one in rounds),
        ],
        "server_s": [
            told["time"]["server_s"],
            statistics.fmean(one["time/gather_s"] + one["time/aggregate_s"] for one in rounds),
        ],
        "test_s": [told["time"]["test_s"], statistics.fmean(one["time/evaluate_s"] for one in rounds)],
        "tokens": [
            round(told["round"]["label_tokens"] * len(rounds)),
            sum(one["train/tokens"] for one in rounds),
        ],
    }


def _cpu_seconds(told: dict[str, Any], num_rounds: int) -> float:
    """Seconds of a core for the rounds and the test before them, as predicted."""
    wall_s: float = told["round_mean_s"] * num_rounds + told["test_s"]
    share: float = told["cpu_share"]
    return wall_s * share


def _run(processes: int, arguments: Sequence[str]) -> tuple[float, float, int]:
    """Seconds, seconds of a core, and largest resident size of the program, of any of its processes."""
    start = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        "-m",
        "fedsim.main",
    ]
    alone = ["-m", "fedsim.main"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *(alone if processes == 1 else start), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{errors}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _line(case: str, row: dict[str, Any]) -> str:
    def pair(values: Sequence[float], digits: int) -> str:
        predicted, measured = values
        return f"{predicted:.{digits}f} / {measured:.{digits}f} {predicted / measured - 1:+.0%}"

    mib = [number / 2**20 for number in row["memory_bytes"]]
    work = "equal" if row["tokens"][0] == row["tokens"][1] else "DIFFERS: {} and {}".format(*row["tokens"])
    texts = [pair(row["round_s"], 2), pair(row["run_s"], 1), pair(row["cpu_s"], 1)]
    return f"{case:<12}{''.join(f'{text:>26}' for text in texts)}{pair(mib, 0):>28}  {work}"


if __name__ == "__main__":
    sys.exit(main())
