"""Token stores: texts tokenized once, kept in the cache, read through memory maps.

n = number of examples in a store.
"""

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.cache import cached_folder, content_hash
from fedsim.data.answers import ANSWERS_FORMAT, Answers, encode_answers, label_starts, write_answers
from fedsim.data.corpus import TextSet
from fedsim.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = 1
TOKENIZER_BATCH = 1024
COLUMNS = ("num_tokens", "untruncated_tokens", "words", "characters", "label_start")

Ints = NDArray[np.int64]


class TokenStore:
    """Token sequences of a set of texts, memory-mapped and read-only.

    Attributes:
        num_tokens: (n,) int64, tokens of each sequence, at most max_tokens.
        label_start: (n,) int64, position of a sequence's first label token. 1 for plain text: nothing precedes the
            first token, so it is never predicted. The first token of the answer for instruction data, unless the loss
            is on the whole text.
        num_label_tokens: (n,) int64, tokens from label_start on; at least 1.
        untruncated_tokens, words, characters: (n,) int64, lengths of the whole text. Words are what whitespace
            separates.
        labels, clients: n class labels and natural clients, or None where the corpus has none.
        answers: what is known of prompts and answers; None for plain text.
        num_dropped: texts that left no label token and are not in the store.
        fingerprint: hash of what the store was made from.
    """

    num_tokens: Ints
    untruncated_tokens: Ints
    words: Ints
    characters: Ints
    label_start: Ints

    def __init__(self, folder: Path, fingerprint: str) -> None:
        """Open the store that `build_token_store` has written to `folder`."""
        for name in COLUMNS:
            # A plain array view: reductions over np.memmap return memmaps again.
            setattr(self, name, np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")))
        self._tokens = np.asarray(np.memmap(folder / "tokens.bin", dtype="<i4", mode="r"))
        self._ends = np.cumsum(self.num_tokens)
        self.num_label_tokens: Ints = self.num_tokens - self.label_start
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.num_dropped: int = facts["num_dropped"]
        self.labels = _read_strings(folder / "labels.parquet") if facts["has_labels"] else None
        self.clients = _read_strings(folder / "clients.parquet") if facts["has_clients"] else None
        self.answers = Answers(folder) if facts.get("has_answers") else None
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return int(self.num_tokens.size)

    def sequence(self, index: int) -> NDArray[np.int32]:
        """(num_tokens[index],) int32 token ids of one example, a read-only view."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of a store of {len(self)}")
        end = self._ends[index]
        tokens: NDArray[np.int32] = self._tokens[end - self.num_tokens[index] : end]
        return tokens

    def flat_tokens(self, indices: Ints) -> NDArray[np.int32]:
        """(num_tokens[indices].sum(),) int32 token ids of several examples, one after another."""
        lengths = self.num_tokens[indices]
        starts = self._ends[indices] - lengths
        begins = np.cumsum(lengths) - lengths
        tokens: NDArray[np.int32] = self._tokens[
            np.repeat(starts - begins, lengths) + np.arange(lengths.sum())
        ]
        return tokens


def build_token_store(
    texts: TextSet,
    tokenizer: Any,
    max_tokens: int,
    on_empty: Literal["error", "drop"],
    name: str,
    loss_on: Literal["answer", "all"] = "answer",
) -> TokenStore:
    """Tokenize texts, or open the store of an earlier run with the same texts, tokenizer and settings.

    Special tokens are those the tokenizer adds by default. A sequence longer than `max_tokens` is cut at its end, or,
    for instruction data, in its prompt (`fedsim.data.answers.cut_to_fit`).

    Args:
        tokenizer: a `transformers` tokenizer.
        max_tokens: longest sequence, > 1.
        on_empty: what to do with a text that leaves no label token (fewer than 2 tokens, or no answer).
        name: what the texts are, for messages, for example "training".
        loss_on: which tokens are label tokens; for instruction data only.

    Raises:
        DataError: a text leaves no label token and `on_empty` is "error", or none of them leaves any.
        CacheError: the cache cannot be written or is damaged.
    """
    content: dict[str, object] = {
        "format": FORMAT,
        "texts": texts.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "max_tokens": max_tokens,
        "on_empty": on_empty,
    }
    if texts.prompted is not None:
        # the end of sequence that follows an answer is no part of how a tokenizer encodes
        content |= {"answers": ANSWERS_FORMAT, "loss_on": loss_on, "eos": tokenizer.eos_token_id}

    def build(folder: Path) -> None:
        _write_store(folder, texts, tokenizer, max_tokens, on_empty, name, loss_on)

    store = TokenStore(cached_folder("tokens", content, build), content_hash(content))
    if store.num_dropped:
        logger.info(
            "data.on_empty=drop: dropped %d of %d %s texts, which leave no label token",
            store.num_dropped,
            store.num_dropped + len(store),
            name,
        )
    if store.answers is not None and store.answers.num_answers_cut:
        logger.warning(
            "data.max_tokens=%d cuts %d of %d %s answers; raise it to keep them whole",
            max_tokens,
            store.answers.num_answers_cut,
            len(store),
            name,
        )
    return store


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides how a tokenizer encodes; not of padding or truncation left from a call."""
    if getattr(tokenizer, "is_fast", False):
        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = {key: tree[key] for key in tree if key not in ("padding", "truncation")}
        if getattr(tokenizer, "split_special_tokens", False):  # it is no part of the backend
            kept["split_special_tokens"] = True
        return content_hash(kept)
    return content_hash(
        {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
            "probe": tokenizer("One, two. Three!")["input_ids"],  # shows which special tokens it adds
        }
    )


def _write_store(
    folder: Path,
    texts: TextSet,
    tokenizer: Any,
    max_tokens: int,
    on_empty: str,
    name: str,
    loss_on: Literal["answer", "all"],
) -> None:
    prompted = texts.prompted
    with (folder / "tokens.bin").open("wb") as file:
        if prompted is None:
            columns, kept = _write_texts(file, texts.texts, tokenizer, max_tokens)
        else:
            encoded = encode_answers(file, prompted, tokenizer, max_tokens)
            kept = encoded.kept
            columns = {
                "num_tokens": encoded.num_tokens,
                "untruncated_tokens": encoded.untruncated,
                "label_start": label_starts(encoded.answer_start, loss_on),
            }
    _check_kept(kept, texts, on_empty, name)
    columns["words"] = np.fromiter((len(text.split()) for text in texts.texts), np.int64, len(kept))
    columns["characters"] = np.fromiter((len(text) for text in texts.texts), np.int64, len(kept))
    for column in COLUMNS:
        np.save(folder / f"{column}.npy", columns[column][kept])
    for file_name, strings in (("labels", texts.labels), ("clients", texts.clients)):
        if strings is not None:
            _write_strings(folder / f"{file_name}.parquet", list(itertools.compress(strings, kept)))
    if prompted is not None:
        write_answers(folder, prompted, encoded)
    facts = {
        "num_dropped": int((~kept).sum()),
        "has_labels": texts.labels is not None,
        "has_clients": texts.clients is not None,
        "has_answers": prompted is not None,
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _write_texts(
    file: BinaryIO, texts: Sequence[str], tokenizer: Any, max_tokens: int
) -> tuple[dict[str, Ints], NDArray[np.bool_]]:
    """Append the tokens of plain texts; columns of them all, and which are kept."""
    untruncated = np.concatenate(
        [_write_batch(file, batch, max_tokens) for batch in _encode(texts, tokenizer)]
        or [np.zeros(0, dtype=np.int64)]
    )
    columns = {
        "num_tokens": np.minimum(untruncated, max_tokens),
        "untruncated_tokens": untruncated,
        "label_start": np.ones(untruncated.size, dtype=np.int64),
    }
    return columns, untruncated > 1


def _encode(texts: Sequence[str], tokenizer: Any) -> Iterator[list[list[int]]]:
    for start in range(0, len(texts), TOKENIZER_BATCH):
        encoded = tokenizer(
            list(texts[start : start + TOKENIZER_BATCH]),
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about sequences longer than the model's: they are cut below
        )
        yield encoded["input_ids"]


def _write_batch(file: BinaryIO, sequences: list[list[int]], max_tokens: int) -> Ints:
    """Append the sequences that have a label token, cut to max_tokens; the uncut length of each."""
    kept = (sequence[:max_tokens] for sequence in sequences if len(sequence) > 1)
    file.write(np.fromiter(itertools.chain.from_iterable(kept), dtype="<i4").tobytes())
    return np.fromiter(map(len, sequences), np.int64, len(sequences))


def _check_kept(kept: NDArray[np.bool_], texts: TextSet, on_empty: str, name: str) -> None:
    if kept.size == 0:
        raise DataError(f"data: the {name} texts must be at least one, got none")
    if kept.all() or (on_empty == "drop" and kept.any()):
        return
    row = texts.source_row(int(np.argmin(kept)))
    where = "data.text_field" if texts.prompted is None else "data.instruction.output_field"
    why = "fewer than 2 tokens" if texts.prompted is None else "an empty answer"
    remedy = "remove them or set data.on_empty=drop" if kept.any() else f"check {where} and data.source"
    raise DataError(
        f"data: {int((~kept).sum())} of {kept.size} {name} texts leave no label token ({why}; first: "
        f"row {row}, counted from 0), but every example needs one; {remedy}"
    )


def _write_strings(path: Path, strings: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"value": pa.array(strings, pa.string())}), path)


def _read_strings(path: Path) -> list[str]:
    import pyarrow.parquet as pq

    strings: list[str] = pq.read_table(path)["value"].to_pylist()
    return strings
