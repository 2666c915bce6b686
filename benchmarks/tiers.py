"""One client of each FlexLoRA resource type alone, and full fine-tuning of the base, side by side.

    python benchmarks/tiers.py [--model small] [--batch 4] [--steps 8] [--tokens 128] [--device cpu] [--repeats 3] ...

What tables 5 and 6 of arXiv 2402.11505 are about: types 1 to 4 (LoRA rank 8; 30; 30, and 200 on the feed-forward; 200),
on all six linear modules of a block. All arms train on the same random weights of the model's real shapes and the same
batches of texts without padding, with the same loop: one client after another (fedsim's reference trainer), AdamW, no
dropout, float32. Full fine-tuning is that loop with every parameter of the base in the optimizer, and no adapter. With
--trainer packed the types train with fedsim's packs, which compute logits only where there is a label; full
fine-tuning does not, so that ratio is between fedsim and a plain loop.

Every arm runs in a process of its own, --repeats times, the arms in turn, so that a busy minute meets all of them. A
first client warms up, a second is measured. Columns:

    trained    parameters that a client trains; share of all, its adapter included
    peak MiB   on a GPU torch's own count, base included; on a CPU the most resident memory of the process, Python,
               torch and base included, of which `before` stood before training
    s/round    seconds of one local run, median of the repeats: of the CPU with one thread of it, else on the wall
    speed-up   seconds of full fine-tuning over those of the arm
    loss       mean over the steps of the first run, in nats per label token

A table comes first, one JSON object is the last line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from benchmarks.packs import PAD, SHAPES, TARGETS, cpu_name, random_store
from fedsim.data.batches import collate
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import ClientPlan
from fedsim.models.adapted import AdaptedModel
from fedsim.models.losses import label_losses
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.server.engine import MAX_TOKENS
from fedsim.server.flexlora_tiers import ATTENTION, TYPES
from fedsim.server.tiers import scaled_ranks
from fedsim.training.memory import peak_memory_bytes
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import LocalSettings, OptimizerSettings, make_optimizer

MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 1024, "vocab_size": 4096,
    },
    **{name: shape for name, shape in SHAPES.items() if name.startswith("opt")},
}  # fmt: skip
FULL = "full"
ARMS = (FULL, *(f"type {number}" for number in range(1, len(TYPES) + 1)))


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.child is not None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["FEDSIM_CACHE"] = folder
            print(json.dumps(measure(options, options.child)))
        return 0
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    load = os.getloadavg()[0]
    print(f"{device}, {os.cpu_count()} cores, {options.threads} threads, load {load:.1f} before the start")
    print(
        f"{options.model}, {options.trainer} trainer, a local run of {options.steps} steps of {options.batch} texts of "
        f"{options.tokens} tokens, ranks times {options.rank_scale:g}\n"
    )
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for _ in range(options.repeats):
        for arm in ARMS:
            found[arm].append(in_a_process(options, arm))
    rows = [summary(arm, parts, found[FULL]) for arm, parts in found.items()]
    print_table(rows)
    record = {"device": device, "cores": os.cpu_count(), "load": load, "torch": torch.__version__}
    keys = {key: value for key, value in vars(options).items() if key != "child"}
    print(json.dumps({"benchmark": "tiers", "options": keys, **record, "rows": rows}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=4, help="texts of an optimizer step")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a local run")
    parser.add_argument("--tokens", type=int, default=128, help="of each text")
    parser.add_argument("--rank-scale", type=float, default=1.0, help="factor on the types' LoRA ranks")
    parser.add_argument("--trainer", choices=["sequential", "packed"], default="sequential")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.batch, options.steps, options.repeats) < 1 or options.tokens < 2:
        parser.error("--batch, --steps and --repeats must be at least 1, --tokens at least 2")
    most = max(max(scaled_ranks(kind._asdict(), options.rank_scale).values()) for kind in TYPES)
    if most > MODELS[options.model]["hidden_size"]:
        parser.error(f"--rank-scale: LoRA rank {most} is larger than the model is wide")
    return options


def in_a_process(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    """One arm, measured by this script in a process that has trained nothing else."""
    names = ("model", "batch", "steps", "tokens", "rank_scale", "trainer", "device", "threads")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    done = subprocess.run(
        [sys.executable, __file__, *given, "--child", arm], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"{arm} failed:\n{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    device = torch.device(options.device)
    base = build_base(options.model, device)
    num_base = sum(parameter.numel() for parameter in base.parameters())
    job = one_client(options, base.config.vocab_size)
    run = full_run(base, job) if arm == FULL else lora_run(options, base, job, arm)
    before = held_bytes(device)
    trained, loss = run()  # warms up
    began = clock(options)
    run()
    seconds = clock(options) - began
    return {
        "trained": trained,
        "share": trained / (num_base + (0 if arm == FULL else trained)),
        "peak_mib": peak_memory_bytes(device) / 2**20,
        "before_mib": before / 2**20,
        "seconds": seconds,
        "loss": loss,
    }


def build_base(model: str, device: torch.device) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"word_embed_proj_dim": MODELS[model]["hidden_size"], **MODELS[model]}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**shape, dropout=0.0, attention_dropout=0.0)).to(device).eval()


def one_client(options: argparse.Namespace, vocabulary: int) -> tuple[Any, ClientJob]:
    count = options.batch * options.steps
    store = random_store([options.tokens] * count, vocabulary)
    local = LocalSettings(
        batch_size=options.batch, accumulation=1, max_grad_norm=None, optimizer=OptimizerSettings(lr=1e-3),
        schedule="constant", warmup_steps=0, lora_dropout=0.0, base_dropout=False, seed=0,
    )  # fmt: skip
    tokens = int(store.num_label_tokens.sum())
    return store, ClientJob(0, np.arange(count), tokens, 1, None, tokens, local)


def full_run(base: Any, client: tuple[Any, ClientJob]) -> Any:
    """The reference trainer's loop over all parameters of the base; they start where the last run left them."""
    store, job = client
    device = next(base.parameters()).device

    def run() -> tuple[int, float]:
        parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(parameters, job.settings.optimizer)
        losses = []
        for (examples,) in job.batches(0):
            batch = collate(store, examples, PAD)
            optimizer.zero_grad(set_to_none=True)
            output = base(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
            loss = label_losses(output.logits, batch.targets.to(device)).sum() / batch.num_targets
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return sum(parameter.numel() for parameter in parameters), float(torch.stack(losses).mean())

    return run


def lora_run(options: argparse.Namespace, base: nn.Module, client: tuple[Any, ClientJob], arm: str) -> Any:
    """A local run of a client of a type, with fedsim's trainer."""
    store, job = client
    device = next(base.parameters()).device
    base.requires_grad_(False)
    targets = find_targets(base, TARGETS["all"])
    kind = TYPES[int(arm.removeprefix("type ")) - 1]
    published = {
        path: kind.attention if path.rpartition(".")[2] in ATTENTION else kind.feed_forward
        for path in targets
    }
    start = initial_adapter(targets, scaled_ranks(published, options.rank_scale), ScalingRule(16.0), seed=0)
    if options.trainer == "packed":
        stacked = StackedModel(base, targets, device)
        trainer: Any = PackedTrainer(stacked, store, 1, MAX_TOKENS[device.type], False, 0)
    else:
        trainer = SequentialTrainer(AdaptedModel(base, targets, device), store, PAD, False, 0)

    def run() -> tuple[int, float]:
        (update,) = trainer.train(Pack(0, (job,)), [ClientPlan(start)], 0)
        return update.report.trained_parameters, update.report.train_loss_mean

    return run


def clock(options: argparse.Namespace) -> float:
    if options.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if options.threads == 1 else time.perf_counter()


def held_bytes(device: torch.device) -> int:
    """What the process holds now, by the count of `peak_memory_bytes`; on a CPU what it has held at most so far."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else peak_memory_bytes(device)


def summary(arm: str, parts: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [part["seconds"] for part in parts]
    whole = statistics.median(part["seconds"] for part in full)
    return {
        "arm": arm,
        "trained": parts[0]["trained"],
        "share": parts[0]["share"],
        "peak_mib": max(part["peak_mib"] for part in parts),
        "before_mib": max(part["before_mib"] for part in parts),
        "seconds": seconds,
        "seconds_median": statistics.median(seconds),
        "speed_up": whole / statistics.median(seconds),
        "loss": parts[0]["loss"],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print("arm          trained    share   peak MiB   before   s/round   best ... worst   speed-up   loss")
    for row in rows:
        spread = f"{min(row['seconds']):.2f} ... {max(row['seconds']):.2f}"
        print(
            f"{row['arm']:7s} {row['trained']:12,} {row['share']:8.2%} {row['peak_mib']:10,.0f} "
            f"{row['before_mib']:8,.0f} {row['seconds_median']:9.2f} {spread:>16s} {row['speed_up']:10.2f} "
            f"{row['loss']:6.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
