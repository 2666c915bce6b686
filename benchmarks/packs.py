"""Client packs against training one client after another: the same clients and batches, in one run.

    python benchmarks/packs.py [--model tiny] [--batch 4] [--clients 8] [--slots 1 2 4 8] [--device cpu] ...

What is compared, each from the clients' starting adapters to their trained ones:

    peft        plain peft and a torch loop, client by client: batches padded to their longest text, logits of all
                positions, the model's own loss, torch.optim.AdamW
    trainer     the same with a fresh Hugging Face Trainer for each client
    sequential  fedsim's reference trainer
    packs k     fedsim's packs with k slots

All run on the same frozen weights (random, of the model's real shapes) with equal adapters, batches, optimizer, number
of threads, and no dropout. Texts have log-normal lengths (median 40, sigma 0.6) cut to 8 ... 128 tokens. Other cases:

    --short     64 clients of 8 short texts (8 ... 24 tokens): what a client costs that has next to nothing to compute
    --full      batches of 16 texts of 128 tokens: nothing is padded and one client fills the device
    --host      a model of width 16 with 12 layers, 10 steps of one short text: arithmetic vanishes, what the host does
                for a client's step is left, which is what bounds a GPU with little work

Columns: tokens/s of real tokens; ratio to peft; share of the matrix rate measured in the same run, with the useful
work (frozen weights, real tokens: forward and input gradient, logits of label tokens); most memory beyond what stood
before, in MiB; operations (torch operations that are not views, optimizer included) and milliseconds for one client's
step. Times are medians; on a CPU with one thread they are CPU seconds, else wall seconds. A table comes first, one JSON
object is the last line.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.data.batches import collate
from fedsim.data.corpus import TextSet
from fedsim.data.tokens import TokenStore, build_token_store
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import ClientPlan
from fedsim.models.adapted import AdaptedModel
from fedsim.models.cpu_linear import PackedMatrix, prepack_frozen_linears
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.server.engine import MAX_TOKENS
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import LocalSettings, OptimizerSettings

SHAPES: dict[str, dict[str, Any]] = {
    "host": {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 64},
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 512, "vocab_size": 2048,
    },
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072},
    "opt-350m": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    },
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192},
}  # fmt: skip
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
}
PAD = 1
LR = 1e-3
VIEWS = {
    *("view", "t", "transpose", "_unsafe_view", "expand", "slice", "as_strided", "detach", "alias", "split"),
    *("unsqueeze", "squeeze", "select", "permute", "reshape", "unbind", "_reshape_alias", "split_with_sizes"),
    *(
        "lift_fresh",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "_local_scalar_dense",
        "set_",
        "unfold",
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all contenders share."""

    base: torch.nn.Module
    store: TokenStore
    jobs: tuple[ClientJob, ...]
    starts: list[AdapterState]
    target_modules: tuple[str, ...]
    device: torch.device
    threads: int

    @property
    def num_steps(self) -> int:
        return sum(len(job.batches(0)) for job in self.jobs)

    @property
    def num_tokens(self) -> int:
        return int(sum(self.store.num_tokens[job.examples].sum() for job in self.jobs))

    @property
    def num_label_tokens(self) -> int:
        return sum(job.num_tokens for job in self.jobs)


Losses = list[float]
"""Mean loss over each client's steps."""

Contender = Callable[[], Losses]


class CountOperations(TorchDispatchMode):
    """Counts torch operations that are not views: launches, to first order."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func.__name__.split(".")[0] not in VIEWS
        return func(*args, **(kwargs or {}))


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    # transformers warns of matters of taste; a benchmark's output is its table
    warnings.filterwarnings("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDSIM_CACHE"] = folder
        bench = build(options)
        rates = matrix_rates(bench, options)
        describe(options, bench, rates)
        rows = measure(contenders(options, bench, Path(folder)), bench, options.repeats, max(rates.values()))
    print(json.dumps({"benchmark": "packs", **record(options, bench, rates), "rows": rows}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[name for name in SHAPES if name != "host"], default="tiny")
    parser.add_argument("--batch", type=int, default=4, help="texts of a client's batch")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of each client")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rank", type=int, default=2, help="LoRA rank")
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the base; adapters are fp32"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, help="of a packed row; by default what fedsim takes there")
    parser.add_argument(
        "--cpu-linear", choices=["torch", "onednn"], default="torch", help="for fedsim's trainers"
    )
    parser.add_argument("--without", nargs="+", choices=["peft", "trainer", "sequential"], default=[])
    parser.add_argument("--repeats", type=int, default=5, help="at least 3; one more warms up")
    parser.add_argument("--quick", action="store_true", help="3 repeats of 2 steps, without the Trainer")
    case = parser.add_mutually_exclusive_group()
    for name in ("short", "full", "host"):
        case.add_argument(f"--{name}", action="store_const", const=name, dest="case")
    parser.set_defaults(case="mixed")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps = 3, 2
        options.without = [*options.without, "trainer"]
    if options.case == "short":
        options.clients, options.batch, options.steps = 64, 4, 2
    if options.case == "full":
        options.batch, options.slots = 16, [1, 2, 4]
    if options.case == "host":
        options.model, options.batch, options.clients, options.steps = "host", 1, 32, 10
    if options.repeats < 3:
        parser.error("--repeats must be at least 3")
    options.slots = [slots for slots in options.slots if slots <= options.clients]
    options.max_tokens = options.max_tokens or MAX_TOKENS[options.device]
    return options


def build(options: argparse.Namespace) -> Bench:
    from transformers import OPTConfig, OPTForCausalLM

    device = torch.device(options.device)
    shape = {"word_embed_proj_dim": SHAPES[options.model]["hidden_size"], **SHAPES[options.model]}
    torch.manual_seed(0)
    config = OPTConfig(**shape, dropout=0.0, attention_dropout=0.0)
    base = OPTForCausalLM(config).to(device, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    base.requires_grad_(False).eval()
    lengths = draw_lengths(options.case, options.clients * options.steps * options.batch)
    store = random_store(lengths, base.config.vocab_size)
    local = LocalSettings(
        batch_size=options.batch, accumulation=1, max_grad_norm=None, optimizer=OptimizerSettings(lr=LR),
        schedule="constant", warmup_steps=0, lora_dropout=0.0, base_dropout=False, seed=0,
    )  # fmt: skip
    jobs = []
    for client_id, examples in enumerate(np.split(np.arange(len(lengths)), options.clients)):
        tokens = int(store.num_label_tokens[examples].sum())
        jobs.append(ClientJob(client_id, examples, tokens, 1, None, tokens, local))
    targets = find_targets(base, TARGETS[options.targets])
    starts = [
        initial_adapter(
            targets,
            dict.fromkeys(targets, options.rank),
            ScalingRule(2.0 * options.rank),
            seed=job.client_id,
        )
        for job in jobs
    ]
    return Bench(base, store, tuple(jobs), starts, TARGETS[options.targets], device, options.threads)


def draw_lengths(case: str, count: int) -> list[int]:
    generator = np.random.default_rng(5)
    if case == "full":
        return [128] * count
    if case == "host":
        return [int(length) for length in generator.integers(4, 9, count)]
    if case == "short":
        return [int(length) for length in generator.integers(8, 25, count)]
    return [int(length) for length in np.clip(generator.lognormal(np.log(40.0), 0.6, count), 8, 128)]


def random_store(lengths: Sequence[int], vocabulary: int) -> TokenStore:
    """Texts of random tokens; one word is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    generator = np.random.default_rng(7)
    texts = [" ".join(f"w{word}" for word in generator.integers(3, vocabulary, length)) for length in lengths]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    return build_token_store(TextSet(texts, None, None), fast, max(lengths), "error", "benchmark")


def share(model: torch.nn.Module) -> Any:
    """A copy of the modules on the same tensors, for contenders that change modules."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def contenders(options: argparse.Namespace, bench: Bench, folder: Path) -> dict[str, Contender]:
    made: dict[str, Contender] = {}
    if "peft" not in options.without:
        made["peft"] = with_peft(bench, options)
        if options.case == "host":  # on a GPU torch takes foreach by itself
            made["peft, foreach"] = with_peft(bench, options, foreach=True)
            made["peft, fused"] = with_peft(bench, options, fused=True)
    if "trainer" not in options.without:
        made["trainer"] = with_trainer(bench, options, folder)

    def frozen() -> Any:
        model = share(bench.base)
        if options.cpu_linear == "onednn":
            prepack_frozen_linears(model)
        return model

    if "sequential" not in options.without:
        adapted_base = frozen()
        adapted = AdaptedModel(adapted_base, find_targets(adapted_base, bench.target_modules), bench.device)
        made["sequential"] = with_fedsim(SequentialTrainer(adapted, bench.store, PAD, False, 0), bench)
    stacked_base = frozen()
    stacked = StackedModel(stacked_base, find_targets(stacked_base, bench.target_modules), bench.device)
    for slots in options.slots:
        trainer = PackedTrainer(stacked, bench.store, slots, options.max_tokens, False, 0)
        made[f"packs {slots}"] = with_fedsim(trainer, bench)
    return made


def with_fedsim(trainer: Any, bench: Bench) -> Contender:
    def run() -> Losses:
        updates = trainer.train(Pack(0, bench.jobs), [ClientPlan(start) for start in bench.starts], 0)
        return [update.report.train_loss_mean for update in updates]

    return run


def peft_model(bench: Bench, options: argparse.Namespace) -> tuple[Any, list[tuple[str, Any]]]:
    """A PEFT model on the base, and (module path, PEFT's layer) of each adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=list(bench.target_modules), lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(share(bench.base), config).eval()
    layers = [(path, model.get_submodule(f"base_model.model.{path}")) for path in bench.starts[0]]
    return model, layers


def load_start(layers: list[tuple[str, Any]], start: AdapterState) -> None:
    with torch.no_grad():
        for path, layer in layers:
            layer.lora_A["default"].weight.copy_(start[path].A)
            layer.lora_B["default"].weight.copy_(start[path].B)


def read_adapter(layers: list[tuple[str, Any]], start: AdapterState) -> AdapterState:
    return AdapterState(
        {
            path: LoraFactors(
                layer.lora_A["default"].weight.detach().clone(),
                layer.lora_B["default"].weight.detach().clone(),
                start[path].scaling,
            )
            for path, layer in layers
        }
    )


def with_peft(bench: Bench, options: argparse.Namespace, **optimizer_options: bool) -> Contender:
    model, layers = peft_model(bench, options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> Losses:
        means = []
        for job, start in zip(bench.jobs, bench.starts, strict=True):
            load_start(layers, start)
            optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, **optimizer_options)
            losses = []
            for (examples,) in job.batches(0):
                batch = collate(bench.store, examples, PAD)
                ids, mask = batch.input_ids.to(bench.device), batch.attention_mask.to(bench.device)
                loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            read_adapter(layers, start)
            means.append(float(torch.stack(losses).mean()))
        return means

    return run


def with_trainer(bench: Bench, options: argparse.Namespace, folder: Path) -> Contender:
    import transformers
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from transformers.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    disable_progress_bar()
    model, layers = peft_model(bench, options)

    def collate_examples(examples: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(bench.store, examples, PAD)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "labels": batch.input_ids.masked_fill(batch.attention_mask == 0, -100),
        }

    def run() -> Losses:
        means = []
        for job, start in zip(bench.jobs, bench.starts, strict=True):
            load_start(layers, start)
            arguments = TrainingArguments(
                output_dir=str(folder / "trainer"), per_device_train_batch_size=options.batch, num_train_epochs=1,
                learning_rate=LR, weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant",
                train_sampling_strategy="sequential", remove_unused_columns=False, logging_strategy="no",
                save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
                use_cpu=bench.device.type == "cpu",
            )  # fmt: skip
            order = [int(example) for (examples,) in job.batches(0) for example in examples]
            trainer = Trainer(
                model=model, args=arguments, train_dataset=order, data_collator=collate_examples
            )
            trainer.remove_callback(PrinterCallback)
            means.append(float(trainer.train().training_loss))
            model.eval()
            read_adapter(layers, start)
        return means

    return run


def measure(
    made: Mapping[str, Contender], bench: Bench, repeats: int, best_rate: float
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in made}
    losses: dict[str, Losses] = {}
    memory: dict[str, float | None] = {}
    operations: dict[str, float] = {}
    for name, run in made.items():
        with CountOperations() as counter:  # warms up as well
            losses[name] = run()
        operations[name] = counter.count / bench.num_steps
        memory[name] = most_memory(run, bench.device)
    for _ in range(repeats):  # in turn, so that a busy minute of the machine meets all of them
        for name, run in made.items():
            seconds[name].append(timed(run, bench))
    base = statistics.median(seconds[next(iter(made))])
    print(
        "\n                tokens/s   ratio   of peak      MiB   operations   ms a step      best ... worst"
    )
    rows = []
    for name in made:
        median = statistics.median(seconds[name])
        row = {
            "name": name,
            "tokens_per_s": bench.num_tokens / median,
            "ratio": base / median,
            "of_peak": useful_flops(bench) / median / best_rate,
            "memory_mib": memory[name],
            "operations": operations[name],
            "ms": 1e3 * median / bench.num_steps,
            "seconds": seconds[name],
            "losses_differ": max(
                abs(a - b) for a, b in zip(losses[name], next(iter(losses.values())), strict=True)
            ),
        }
        rows.append(row)
        mib = "-" if memory[name] is None else f"{memory[name]:.0f}"
        spread = f"{min(seconds[name]) / median:.2f} ... {max(seconds[name]) / median:.2f}"
        print(
            f"{name:14s} {row['tokens_per_s']:9,.0f} {row['ratio']:7.2f} {row['of_peak']:8.1%} {mib:>8s} "
            f"{operations[name]:12.1f} {row['ms']:11.3f}      {spread}"
        )
    print(f"\nmean losses of a client differ by at most {max(row['losses_differ'] for row in rows):.1e}")
    return rows


def timed(run: Callable[[], Any], bench: Bench) -> float:
    """Seconds of one run: of the CPU where a single thread of it does everything, else on the wall."""
    cuda = bench.device.type == "cuda"
    clock = time.process_time if bench.threads == 1 and not cuda else time.perf_counter
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
    began = clock()
    run()
    if cuda:
        torch.cuda.synchronize()
    return clock() - began


def most_memory(run: Contender, device: torch.device) -> float | None:
    """Most MiB that a run held beyond what stood before it; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = resident("VmRSS")
    except (OSError, AttributeError):
        run()
        return None
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    raise OSError(field)


def useful_flops(bench: Bench) -> float:
    """Of all clients: output and input gradient of the frozen matrices, nothing for padding or unused logits."""
    head = bench.base.get_output_embeddings().weight.numel()  # type: ignore[operator]
    body = sum(
        module.weight.numel()
        for module in bench.base.base_model.modules()  # type: ignore[operator, union-attr]
        if isinstance(module, torch.nn.Linear)
    )
    return 4.0 * (body * bench.num_tokens + head * bench.num_label_tokens)


def matrix_rates(bench: Bench, options: argparse.Namespace) -> dict[str, float]:
    """FLOP/s of a large square product, best of several."""
    size = 8192 if bench.device.type == "cuda" else 1024
    dtype = next(bench.base.parameters()).dtype
    left, right = (torch.randn(size, size).to(bench.device, dtype) for _ in range(2))
    products: dict[str, Callable[[], Any]] = {"torch": lambda: left @ right}
    if options.cpu_linear == "onednn":
        matrix = PackedMatrix(right)
        products["onednn"] = lambda: matrix.times_weight_t(left)

    return {
        name: 2.0 * size**3 / min(timed(product, bench) for _ in range(10))
        for name, product in products.items()
    }


def describe(options: argparse.Namespace, bench: Bench, rates: Mapping[str, float]) -> None:
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else cpu_name()
    print(f"{device}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(
        f"{options.model}, {options.dtype}, {options.case} lengths, batches of {options.batch}, {len(bench.jobs)} "
        f"clients of {options.steps} steps, LoRA rank {options.rank} on {options.targets}, {bench.num_tokens} tokens, "
        f"{options.max_tokens} in a row at most"
    )
    print(", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()))


def record(options: argparse.Namespace, bench: Bench, rates: Mapping[str, float]) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "options": vars(options),
        "tokens": bench.num_tokens,
        "matrix_flops_per_s": dict(rates),
        "device": torch.cuda.get_device_name() if bench.device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in packages},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
