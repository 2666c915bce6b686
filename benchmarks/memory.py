"""Peak memory of a training step of the packed engine, by what saves it: type, quantization, checkpointing, row size.

Each case runs in a process of its own on a random OPT of the given size; the figure is what torch has allocated, from
the profiler on a CPU and from the allocator on a GPU.

    python benchmarks/memory.py --layers 12 --width 768 --tokens 2048 [--device cuda]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.models.base import load_frozen
from fedsim.models.packing import PackedLayout, PackedTokens, layout_of
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_products
from fedsim.models.targets import find_targets

VOCABULARY = 8192
SEQUENCE = 128
LORA_RANK = 8
CLIENTS = 4

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, checkpointing": {"checkpoint": True},
    "float32, half the row": {"share": 2},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, checkpointing": {"dtype": "bfloat16", "checkpoint": True},
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "nf4, bfloat16, checkpointing": {"quantization": "nf4", "dtype": "bfloat16", "checkpoint": True},
}


def save_base(folder: Path, layers: int, width: int) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        num_hidden_layers=layers, num_attention_heads=max(1, width // 64), max_position_embeddings=SEQUENCE,
    )  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(folder)


def row(tokens: int, device: torch.device) -> PackedTokens:
    """Sequences of equal length, of as many clients each."""
    lengths = np.full(tokens // SEQUENCE, SEQUENCE)
    layout: PackedLayout = layout_of(lengths, device)
    position = torch.arange(SEQUENCE, device=device).repeat(len(lengths))
    owner = torch.arange(CLIENTS, device=device).repeat_interleave(tokens // CLIENTS)
    labels = torch.nonzero(position < SEQUENCE - 1).flatten()
    ids = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    ranges = tuple((k * tokens // CLIENTS, (k + 1) * tokens // CLIENTS) for k in range(CLIENTS))
    return PackedTokens(
        ids[None], position[None], layout, owner, ranges, labels, ids[labels + 1], owner[labels], labels // SEQUENCE
    )  # fmt: skip


def measure(folder: Path, tokens: int, device: torch.device, case: dict[str, Any]) -> dict[str, float]:
    """MiB of the base, MiB at the peak beyond it, and seconds of a step."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    model = load_frozen(
        folder, "base", dtype, allow_pickle=False, trust_remote_code=False,
        quantization=case.get("quantization", "none"), device=device,
    )  # fmt: skip
    base = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    targets = find_targets(model, ["q_proj", "v_proj"])
    stacked = StackedModel(model, targets, device, checkpoint_gradients=case.get("checkpoint", False))
    packed = row(tokens // case.get("share", 1), device)
    rows = RankRows(targets, [LORA_RANK] * CLIENTS, torch.float32, device)
    rows.values.normal_(std=0.01)
    stacked.attach(rows)
    weights = torch.full((len(packed.label_rows),), 1.0 / len(packed.label_rows), device=device)

    def step() -> None:
        products = plan_products(rows, packed, range(CLIENTS), dtype)
        with stacked.planned(StepPlan(products)):
            stacked.label_losses(packed, weights).sum().backward()  # type: ignore[no-untyped-call]

    step()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "base_mib": base / 2**20,
        "step_mib": peak_bytes(step, device) / 2**20,
        "step_s": seconds,
    }


def peak_bytes(work: Any, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--float32-only", action="store_true", help="many CPUs are slow in bfloat16")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        torch.set_num_threads(1)
        told = measure(
            Path(options.folder), options.tokens, torch.device(options.device), CASES[options.case]
        )
        print(json.dumps(told))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), options.layers, options.width)
        print(f"{'':32}{'base MiB':>10}{'step MiB':>10}{'seconds':>10}")
        for name, case in CASES.items():
            if options.float32_only and "dtype" in case:
                continue
            if "quantization" in case and find_spec("bitsandbytes") is None:
                print(f"{name:32}{'bitsandbytes is not installed':>30}")
                continue
            again = [sys.executable, __file__, *sys.argv[1:], "--case", name, "--folder", folder]
            output = subprocess.run(again, check=True, capture_output=True, text=True).stdout
            results[name] = told = json.loads(output.splitlines()[-1])
            print(f"{name:32}{told['base_mib']:10.0f}{told['step_mib']:10.0f}{told['step_s']:10.2f}")
    print(json.dumps({"options": vars(options), "torch": torch.__version__, "cases": results}))


if __name__ == "__main__":
    main()
