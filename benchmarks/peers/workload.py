"""What every peer trains on, read from the folder that benchmarks/peers.py writes. Knows nothing of fedsim.

A workload folder holds `model/` (the base and its tokenizer), `start/` (the adapter of round 0, in PEFT's format),
`batches.json` (round -> client -> step -> token sequences, in fedsim's order) and `settings.json`.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100

Step = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """One workload; all tensors are made before the first round."""

    folder: Path
    settings: dict[str, Any]
    rounds: list[list[list[Step]]]

    @property
    def num_clients(self) -> int:
        return len(self.rounds[0])

    def costs(self, round_index: int) -> list[int]:
        """Padded tokens of each client's round."""
        return [sum(step["input_ids"].numel() for step in steps) for steps in self.rounds[round_index]]


def read_workload(folder: Path) -> Workload:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    rounds = json.loads((folder / "batches.json").read_text(encoding="utf-8"))
    pad_id = settings["pad_id"]
    return Workload(
        folder,
        settings,
        [[[_padded(step, pad_id) for step in client] for client in one] for one in rounds],
    )


def _padded(sequences: list[list[int]], pad_id: int) -> Step:
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence)
        input_ids[row, : len(sequence)] = tokens
        attention_mask[row, : len(sequence)] = 1
        labels[row, 1 : len(sequence)] = tokens[1:]  # the first token is nobody's target
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def build_model(workload: Workload) -> Any:
    """The base with the adapter of round 0; only the adapter has gradients."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dtype = getattr(torch, workload.settings["dtype"])
    base = AutoModelForCausalLM.from_pretrained(workload.folder / "model", dtype=dtype)
    base.config.use_cache = False
    if dtype == torch.float64:
        base.loss_function = _exact_loss
    return (
        PeftModel.from_pretrained(base, str(workload.folder / "start"), is_trainable=True).to(dtype).train()
    )


def _exact_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The mean over targets in float64; transformers' own rounds the logits to float32."""
    targets = labels[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, vocab_size), targets, ignore_index=IGNORED
    )


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def make_optimizer(parameters: Any, settings: dict[str, Any]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=settings["lr"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )


def train_client(model: Any, steps: list[Step], settings: dict[str, Any]) -> None:
    """The local run of one client, as anyone would write it."""
    optimizer = make_optimizer(trained(model).values(), settings)
    for step in steps:
        optimizer.zero_grad()
        model(**step).loss.backward()
        optimizer.step()


def deal(costs: list[int], processes: int) -> list[list[int]]:
    """Clients of each process: the longest first, to the process with the least so far."""
    loads = [0] * processes
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for client in sorted(range(len(costs)), key=lambda client: -costs[client]):
        process = loads.index(min(loads))
        dealt[process].append(client)
        loads[process] += costs[client]
    return dealt


def end_of_round(out: Path) -> None:
    """Tell the driver, which takes the time."""
    with (out / "rounds.txt").open("a", encoding="utf-8") as file:
        file.write("round\n")


def save_result(out: Path, adapter: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    clean = {
        name.replace(".default.", "."): value.detach().clone().contiguous() for name, value in adapter.items()
    }
    save_file(clean, str(out / "adapter.safetensors"))


def write_versions(out: Path, *packages: str) -> None:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers", "peft", *packages)}
    (out / "versions.json").write_text(json.dumps(found), encoding="utf-8")


def arguments() -> tuple[Workload, Path]:
    """The workload and the output folder of the command line; one thread from here on."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return read_workload(Path(sys.argv[1])), Path(sys.argv[2])
