"""What several tests need: small models, small corpora, and real processes."""

import multiprocessing
import os
import queue
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.comm.group import Group, join_group
from fedsim.data.corpus import TextSet
from fedsim.data.prompts import PromptedTexts, Template
from fedsim.data.tokens import TokenStore, build_token_store

SHARED = Path(__file__).resolve().parents[2] / "shared"

VOCABULARY = 64

PRELOADED = [
    "fedsim.main",
    "fedsim.simulation.entry",
    "transformers.models.opt.modeling_opt",  # by full name: the packages of transformers load lazily
    "transformers.models.opt.configuration_opt",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_fast",
    "datasets",
    "peft",
    "scipy.io",
    "scipy.sparse",
    "rich.progress",
]
"""What a process that is forked for a test has imported already."""


def tiny_opt(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random OPT with two layers, in eval mode."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OPTForCausalLM(OPTConfig(**{**sizes, **changes})).to(dtype).eval()


def word_tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """A tokenizer whose words are w3, w4, ...; it puts </s> (id 2) before each text, as OPT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<pad>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<s>"
    )


def random_texts(num_texts: int, seed: int = 0, longest: int = 20, vocabulary: int = VOCABULARY) -> list[str]:
    """Texts of 1 to `longest` words."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, num_texts)
    return [" ".join(f"w{word}" for word in generator.integers(3, vocabulary, length)) for length in lengths]


def make_store(texts: Sequence[str], max_tokens: int = 32) -> TokenStore:
    """A token store of plain texts."""
    return build_token_store(TextSet(list(texts), None, None), word_tokenizer(), max_tokens, "error", "test")


def make_answer_store(num_examples: int, seed: int = 0, max_tokens: int = 32) -> TokenStore:
    """A token store of prompts of 0 to 12 words and answers of 1 to 8: only the answers are label tokens."""
    generator = np.random.default_rng(seed)

    def texts(shortest: int, longest: int) -> list[str]:
        lengths = generator.integers(shortest, longest + 1, num_examples)
        return [" ".join(f"w{word}" for word in generator.integers(3, VOCABULARY, size)) for size in lengths]

    prompts, answers = texts(0, 12), texts(1, 8)
    template = Template("{instruction} ", "{instruction} ")
    parts = np.zeros(num_examples, dtype=np.int8)
    prompted = PromptedTexts(template, prompts, [""] * num_examples, [[answer] for answer in answers], parts)
    return build_token_store(TextSet(prompted), word_tokenizer(), max_tokens, "error", "test")


def run_ranks(
    function: Callable[..., Any], world_size: int, tmp_path: Path, *arguments: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call `function(group, *arguments)` in `world_size` real gloo processes; results in rank order.

    The function must be importable from a module (spawned processes look it up by name). A rank that raises makes the
    test fail with its traceback; a rank that does not come back in time is killed.
    """
    context = _preloaded_context()
    results = context.Queue()
    rendezvous = tmp_path / f"rendezvous-{os.urandom(4).hex()}"
    processes = [
        context.Process(
            target=_rank_main,
            args=(function, rank, world_size, str(rendezvous), results, arguments),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes: dict[int, tuple[bool, Any]] = {}
    try:
        for _ in range(world_size):
            rank, fine, value = results.get(timeout=timeout_s)
            outcomes[rank] = (fine, value)
            assert fine, f"rank {rank} failed:\n{value}"
    except queue.Empty:
        raise AssertionError(
            f"ranks {sorted(set(range(world_size)) - set(outcomes))} did not come back"
        ) from None
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
    return [outcomes[rank][1] for rank in range(world_size)]


def _preloaded_context() -> Any:
    """Processes forked from a server that has imported what costs seconds, and has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    rendezvous: str,
    results: Any,
    arguments: Sequence[Any],
) -> None:
    torch.set_num_threads(1)
    try:
        group: Group = join_group(
            rank, world_size, torch.device("cpu"), "gloo", 60.0, init_method=f"file://{rendezvous}"
        )
        value = function(group, *arguments)
        group.close()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def run_program(
    arguments: Sequence[str],
    world_size: int,
    tmp_path: Path,
    timeout_s: float = 120.0,
    meanwhile: Callable[[list[int]], None] | None = None,
    pretend_gpus: bool = False,
) -> list[tuple[int | None, str]]:
    """Call `fedsim.main` in `world_size` real processes, as a launcher would; exit code and standard error of each.

    The processes are forked from a server that has imported what they need, which saves seconds for each. The exit
    code of a process that does not end in time is None. `meanwhile` is called with their ids while they run. With
    `pretend_gpus` each process has a pretend GPU (`tests.pretend_gpu`).
    """
    context = _preloaded_context()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen = ("FEDSIM_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    shared = {name: os.environ[name] for name in chosen if name in os.environ}
    shared |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tag = os.urandom(4).hex()
    outputs = [tmp_path / f"stderr-{tag}-{rank}" for rank in range(world_size)]
    processes = [
        context.Process(
            target=_program_main,
            args=(
                list(arguments),
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                str(outputs[rank]),
                pretend_gpus,
            ),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    if meanwhile is not None:
        meanwhile([process.pid for process in processes])
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return [(code, output.read_text(encoding="utf-8")) for code, output in zip(codes, outputs, strict=True)]


def _program_main(
    arguments: Sequence[str], environment: Mapping[str, str], output: str, pretend_gpus: bool
) -> None:
    os.environ.update(environment)
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    from fedsim.main import main

    if not pretend_gpus:
        sys.exit(main(arguments))
    from tests.pretend_gpu import pretend_gpu

    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    with pytest.MonkeyPatch.context() as patch, pretend_gpu(patch, rank, world_size):
        code = main(arguments)
    sys.exit(code)
