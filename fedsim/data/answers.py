"""Prompts and answers as tokens: truncation that spares the answer, and what evaluation needs to know of an example.

n = examples of a store, P and a = tokens of an example's prompt and of its answer, the end of sequence included.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.data.columns import encode_column
from fedsim.data.prompts import PromptedTexts, Spans
from fedsim.errors import DataError

ANSWERS_FORMAT = 1
"""Raised whenever the same texts would give other tokens."""

TOKENIZER_BATCH = 256

Ints = NDArray[np.int64]


class Answers:
    """What an instruction corpus says of the examples of a token store, memory-mapped and read-only.

    Attributes:
        answer_start: (n,) int64, position of the first token of the answer: `sequence[:answer_start]` is the prompt,
            cut as in training. Equal to `label_start` where the loss is on the answer only.
        parts: (n,) int8, what the example is for in the eyes of its client (`prompts.TRAIN`, `EVAL`, `TEST`).
        task_names, tasks: the distinct tasks in ascending order, and the (n,) int64 position of each example's;
            empty and None where the corpus has none.
        category_names, categories: the same for categories.
        num_prompts_cut: examples whose prompt was cut.
        num_answers_cut: examples whose answer was cut, as it alone is longer than max_tokens - 1.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `write_answers` has written to `folder`."""
        import pyarrow as pa

        facts = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        self.answer_start: Ints = np.asarray(np.load(folder / "answer_start.npy", mmap_mode="r"))
        self.parts: NDArray[np.int8] = np.asarray(np.load(folder / "parts.npy", mmap_mode="r"))
        self.task_names: tuple[str, ...] = tuple(facts["task_names"])
        self.category_names: tuple[str, ...] = tuple(facts["category_names"])
        self.tasks = _load_codes(folder / "tasks.npy", self.task_names)
        self.categories = _load_codes(folder / "categories.npy", self.category_names)
        self.num_prompts_cut: int = facts["num_prompts_cut"]
        self.num_answers_cut: int = facts["num_answers_cut"]
        self._references = pa.ipc.open_file(pa.memory_map(str(folder / "references.arrow"))).read_all()[0]

    def references(self, index: int) -> tuple[str, ...]:
        """The acceptable answers of one example, whole, as texts; the first is the one to learn."""
        return tuple(self._references[index].as_py())

    def num_without_rouge_tokens(self) -> int:
        """Examples none of whose references has a letter a to z or a digit: Rouge-L is 0 whatever the answer."""
        import pyarrow.compute as pc

        references = self._references.combine_chunks()
        has_token = pc.match_substring_regex(pc.utf8_lower(pc.list_flatten(references)), "[a-z0-9]")
        owners = pc.list_parent_indices(references).to_numpy()
        with_token = np.unique(owners[has_token.to_numpy(zero_copy_only=False)])
        return len(references) - with_token.size

    def task(self, index: int) -> str | None:
        """The task of one example."""
        return None if self.tasks is None else self.task_names[self.tasks[index]]

    def category(self, index: int) -> str | None:
        """The category of one example."""
        return None if self.categories is None else self.category_names[self.categories[index]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Columns of tokenized prompts and answers, before any is dropped.

    Attributes:
        untruncated: (n,) tokens of the whole sequence.
        num_tokens: (n,) tokens kept.
        answer_start: (n,) position of the first token of the answer.
        kept: (n,) whether there is an answer; the others' tokens are not written.
        prompt_cut, answer_cut: (n,) whether tokens of the prompt, or of the answer, are gone.
    """

    untruncated: Ints
    num_tokens: Ints
    answer_start: Ints
    kept: NDArray[np.bool_]
    prompt_cut: NDArray[np.bool_]
    answer_cut: NDArray[np.bool_]


def encode_answers(file: BinaryIO, texts: PromptedTexts, tokenizer: Any, max_tokens: int) -> Encoded:
    """Append the tokens of all texts with an answer, int32, to `file`.

    Prompt and answer are tokenized together, as one text; a token with at least one character of the answer belongs
    to the answer. The end-of-sequence token follows, in place of whatever the tokenizer itself puts behind a text. A
    prompt without any token is that of the beginning, or else the end, of a sequence, so that the answer has a
    first token to follow from.

    Raises:
        DataError: the tokenizer cannot say which characters a token stands for, or has no end-of-sequence token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "data.instruction.format needs a fast tokenizer, which knows the characters of each token, got "
            f"{type(tokenizer).__name__}; set model.tokenizer to one with a tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "data.instruction.format needs a tokenizer with an end-of-sequence token, got none; set model.tokenizer "
            "to one that has it"
        )
    bos = tokenizer.bos_token_id
    in_front = np.array([tokenizer.eos_token_id if bos is None else bos], dtype=np.int64)
    rows = np.zeros((len(texts), 6), dtype=np.int64)
    for start in range(0, len(texts), TOKENIZER_BATCH):
        stop = min(start + TOKENIZER_BATCH, len(texts))
        rendered = [texts.render(index) for index in range(start, stop)]
        encoded = tokenizer(
            [text for text, _ in rendered], truncation=False, padding=False, verbose=False
        ).encodings
        for index, encoding, (_, spans) in zip(range(start, stop), encoded, rendered, strict=True):
            if not texts.answer(index).strip():
                rows[index, 0] = len(encoding.ids)
                continue
            prompt, answer, order = _take_apart(encoding, spans, tokenizer.eos_token_id)
            if prompt.size == 0:
                prompt, order = in_front, np.zeros(1, dtype=order.dtype)
            kept_prompt, kept_answer = cut_to_fit(prompt, answer, order, max_tokens)
            file.write(np.concatenate((kept_prompt, kept_answer)).astype("<i4").tobytes())
            rows[index] = (
                prompt.size + answer.size,
                kept_prompt.size + kept_answer.size,
                kept_prompt.size,
                True,
                kept_prompt.size < prompt.size,
                kept_answer.size < answer.size,
            )
    flags = rows[:, 3:].astype(bool)
    return Encoded(rows[:, 0], rows[:, 1], rows[:, 2], flags[:, 0], flags[:, 1], flags[:, 2])


def cut_to_fit(prompt: Ints, answer: Ints, order: Ints, max_tokens: int) -> tuple[Ints, Ints]:
    """Cut a prompt, never the answer, until both fit into `max_tokens`.

    Only an answer that alone is longer than max_tokens - 1 is cut, at its end, behind a single token of the prompt.

    Args:
        prompt: (P,) tokens.
        answer: (a,) tokens, the end of sequence among them.
        order: (P,) positions of the prompt, those that go first in front.

    Returns:
        The prompt and the answer that are left.
    """
    budget = max(max_tokens - answer.size, 1)
    if prompt.size > budget:
        prompt = np.delete(prompt, order[: prompt.size - budget])
    return prompt, answer[: max_tokens - prompt.size]


def _take_apart(encoding: Any, spans: Spans, eos_id: int) -> tuple[Ints, Ints, Ints]:
    """Tokens of the prompt, tokens of the answer with the end of sequence, and the order in which the prompt goes.

    First goes the end of the input or of the instruction, whichever is longer at that moment; when nothing of them is
    left, the template, from its beginning; last what the tokenizer puts before a text.
    """
    ids = np.asarray(encoding.ids, dtype=np.int64)
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    of_text = np.flatnonzero(np.asarray(encoding.special_tokens_mask) == 0)
    first, stop = (int(of_text[0]), int(of_text[-1]) + 1) if of_text.size else (ids.size, ids.size)
    of_answer = np.flatnonzero(offsets[first:stop, 1] > spans.prompt_end)
    split = first + int(of_answer[0]) if of_answer.size else stop
    pieces = [
        _inside(offsets[first:split], spans.input_start, spans.input_end) + first,
        _inside(offsets[first:split], spans.instruction_start, spans.instruction_end) + first,
    ]
    of_pieces = np.concatenate(pieces)
    # the end of the longer one first: by position within the piece, of equal ones the input's
    place = np.concatenate([np.arange(piece.size) for piece in pieces])
    of_pieces = of_pieces[np.argsort(-place, kind="stable")]
    is_rest = np.ones(split, dtype=bool)
    is_rest[:first] = False
    is_rest[of_pieces] = False
    order = np.concatenate((of_pieces, np.flatnonzero(is_rest), np.arange(first)))
    return ids[:split], np.append(ids[split:stop], eos_id), order


def _inside(offsets: Ints, start: int, end: int) -> Ints:
    """Positions of the tokens from the first to the last that has characters in [start, end) and no others."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    # tokenizers that leave white space out of offsets give empty ones: these count only between two others
    inside = np.flatnonzero((starts >= start) & (ends <= end) & (ends > starts))
    return np.arange(inside[0], inside[-1] + 1) if inside.size else inside


def write_answers(folder: Path, texts: PromptedTexts, encoded: Encoded) -> None:
    """Write what `Answers` reads, of the kept examples."""
    import pyarrow as pa

    kept = encoded.kept
    np.save(folder / "answer_start.npy", encoded.answer_start[kept])
    np.save(folder / "parts.npy", texts.parts[kept])
    facts: dict[str, object] = {
        "num_prompts_cut": int(encoded.prompt_cut.sum()),
        "num_answers_cut": int(encoded.answer_cut.sum()),
    }
    for file, key, values in (
        ("tasks", "task_names", texts.tasks),
        ("categories", "category_names", texts.categories),
    ):
        names: tuple[str, ...] = ()
        if values is not None:
            names, codes = encode_column([values[index] for index in np.flatnonzero(kept).tolist()])
            np.save(folder / f"{file}.npy", codes)
        facts[key] = list(names)
    references = pa.array(
        [texts.references[index] for index in np.flatnonzero(kept).tolist()], pa.list_(pa.string())
    )
    table = pa.table({"references": references}).combine_chunks()
    with (
        pa.OSFile(str(folder / "references.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as out,
    ):
        out.write_table(table)
    (folder / "answers.json").write_text(json.dumps(facts), encoding="utf-8")


def label_starts(answer_start: Ints, loss_on: Literal["answer", "all"]) -> Ints:
    """Position of the first label token: of the answer, or 1, as nothing precedes the first token of a sequence."""
    return np.maximum(answer_start, 1) if loss_on == "answer" else np.ones_like(answer_start)


def _load_codes(path: Path, names: tuple[str, ...]) -> Ints | None:
    return np.asarray(np.load(path, mmap_mode="r")) if names else None
