"""The embedded base: a tiny OPT that is trained in seconds, once, and kept in the cache as an ordinary model folder.

It learns from the code of one half of Python's standard library; the embedded corpus is the docstrings of the other
half (`fedsim.data.docstrings`). On random weights LoRA stays above the entropy of the token frequencies, so a quick
start without pretraining would show nothing.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.cache import cached_folder, content_hash
from fedsim.data.docstrings import read_base_code, split_docstrings
from fedsim.models.quiet import quiet_transformers
from fedsim.seeding import derive_seed, numpy_generator

FORMAT = 1
"""Raised whenever the same texts would give another tokenizer or base."""

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""In the order of their ids, 0 to 3, as OPT has them. OPT begins a text with </s>."""

VOCAB_SIZE = 1024
MAX_POSITIONS = 512
HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 2

STEPS = 900
BATCH_TOKENS = 512
SEQUENCE_TOKENS = 256
PEAK_LR = 3e-3
WARMUP_STEPS = 20
SEED = 0
BUCKET = 256
"""Blocks sorted by length at a time, so that a batch holds little padding."""

logger = logging.getLogger(__name__)


def embedded_tokenizer_folder() -> Path:
    """The folder with the embedded tokenizer: byte-level BPE on docstrings and code of the base part. About 1 s.

    Raises:
        DataError: the standard library's sources are missing.
        CacheError: the cache folder cannot be written or is damaged.
    """
    docstrings, _ = split_docstrings()
    texts = [docstring.text for docstring in docstrings] + read_base_code()
    content = {
        "format": FORMAT,
        "texts": content_hash(texts),
        "vocab_size": VOCAB_SIZE,
        "versions": package_versions("tokenizers", "transformers"),
    }
    return cached_folder(
        "embedded-tokenizer", content, lambda folder: _train_tokenizer(texts).save_pretrained(folder)
    )


def embedded_base_config() -> Any:
    """The `OPTConfig` of the embedded base."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        word_embed_proj_dim=HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        ffn_dim=4 * HIDDEN_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


def embedded_base_folder(steps: int = STEPS) -> Path:
    """The folder with the embedded base and its tokenizer, trained first if it is not in the cache.

    Args:
        steps: optimizer steps; anything but the default is for tests.

    Raises:
        DataError, CacheError: as `embedded_tokenizer_folder`.
    """
    tokenizer_folder = embedded_tokenizer_folder()
    blocks = read_base_code()
    config = embedded_base_config()
    content = {
        "format": FORMAT,
        "texts": content_hash(blocks),
        "tokenizer": tokenizer_folder.name,
        "config": config.to_diff_dict(),
        "training": [steps, BATCH_TOKENS, SEQUENCE_TOKENS, PEAK_LR, WARMUP_STEPS, SEED, BUCKET],
        "versions": package_versions("torch", "transformers"),
    }

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        model = train_embedded(config, tokenizer(blocks)["input_ids"], steps)
        with quiet_transformers():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder("embedded-base", content, build)


def train_embedded(config: Any, sequences: Sequence[Sequence[int]], steps: int) -> Any:
    """Train a causal language model from scratch, on one CPU thread, without touching any global generator.

    Args:
        config: of the `transformers` model.
        sequences: token ids of the texts; longer ones are cut at `SEQUENCE_TOKENS`.
        steps: optimizer steps of AdamW, with warm-up and cosine decay to a tenth of the peak rate.

    Returns:
        the model in float32.
    """
    from transformers import AutoModelForCausalLM

    logger.info("training the embedded base (once, about 15 s on one core) ...")
    batches = _batches([sequence[:SEQUENCE_TOKENS] for sequence in sequences])
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(SEED, "embedded_base"))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * _lr_factor(step, steps)
            loss = _loss(model, *next(batches))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 300 == 0:
                logger.info("embedded base: step %d of %d, loss %.2f nats", step + 1, steps, loss.item())
    return model.eval()


def _train_tokenizer(texts: Iterable[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input ids (b, L), attention mask (b, L)), of at most `BATCH_TOKENS` with padding, in a seeded order."""
    generator = numpy_generator(SEED, "embedded_base_batches")
    while True:
        order = generator.permutation(len(sequences)).tolist()
        groups: list[list[int]] = []
        for start in range(0, len(order), BUCKET):
            bucket = sorted(order[start : start + BUCKET], key=lambda index: len(sequences[index]))
            groups.append([])
            for index in bucket:
                if groups[-1] and len(sequences[index]) * (len(groups[-1]) + 1) > BATCH_TOKENS:
                    groups.append([])
                groups[-1].append(index)
        for number in generator.permutation(len(groups)).tolist():
            rows = [torch.tensor(sequences[index]) for index in groups[number]]
            lengths = torch.tensor([len(row) for row in rows])
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
            yield ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _loss(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def _lr_factor(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same bits whatever the machine, and no slowdown by threads on busy cores (measured: tenfold)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def package_versions(*packages: str) -> dict[str, str]:
    """Package -> major and minor version, for the content of cache entries."""
    return {package: ".".join(version(package).split(".")[:2]) for package in packages}
