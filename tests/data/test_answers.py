import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data.answers import cut_to_fit, encode_answers
from fedsim.data.batches import IGNORED, collate
from fedsim.data.corpus import TextSet
from fedsim.data.prompts import PromptedTexts, Template
from fedsim.data.tokens import TokenStore, build_token_store
from fedsim.errors import DataError
from fedsim.evaluation.rouge import AnswerScorer
from tests.helpers import word_tokenizer

TEMPLATE = Template("w3 {instruction} w4 {input} w5 ", "w3 {instruction} w5 ")
BOS = EOS = 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def texts(rows: list[tuple[str, str, list[str]]], **columns: Any) -> TextSet:
    instructions, inputs, references = zip(*rows, strict=True)
    parts = columns.pop("parts", np.zeros(len(rows), dtype=np.int8))
    return TextSet(PromptedTexts(TEMPLATE, instructions, inputs, references, parts, **columns))


def build(
    rows: list[tuple[str, str, list[str]]],
    max_tokens: int = 32,
    on_empty: Any = "error",
    loss_on: Any = "answer",
    tokenizer: Any = None,
    **columns: Any,
) -> TokenStore:
    return build_token_store(
        texts(rows, **columns), tokenizer or word_tokenizer(), max_tokens, on_empty, "training", loss_on
    )


ROW = (words(10, 11), words(20, 21, 22), [words(30, 31), words(40)])
TOKENS = [BOS, 3, 10, 11, 4, 20, 21, 22, 5, 30, 31, EOS]


def test_the_answer_alone_is_learned() -> None:
    store = build([ROW])
    assert store.answers is not None

    assert store.sequence(0).tolist() == TOKENS
    assert store.label_start.tolist() == store.answers.answer_start.tolist() == [9]
    assert store.num_label_tokens.tolist() == [3]
    targets = collate(store, [0], pad_id=1).targets[0]
    assert targets.tolist() == [IGNORED] * 8 + [30, 31, EOS, IGNORED]


def test_the_whole_text_is_learned() -> None:
    store = build([ROW], loss_on="all")
    assert store.answers is not None

    assert store.sequence(0).tolist() == TOKENS
    assert store.label_start.tolist() == [1]
    assert store.answers.answer_start.tolist() == [9]
    batch = collate(store, [0], pad_id=1)
    assert torch.equal(batch.targets[0, :-1], batch.input_ids[0, 1:])


def test_several_references_tasks_and_categories_are_kept() -> None:
    rows = [ROW, (words(10), "", [words(33)]), (words(10), "", [])]
    store = build(
        rows,
        on_empty="drop",
        tasks=["b", "a", "a"],
        categories=["y", "y", "z"],
        parts=np.array([0, 2, 1], dtype=np.int8),
    )
    answers = store.answers
    assert answers is not None

    assert (len(store), store.num_dropped) == (2, 1)
    assert answers.references(0) == (words(30, 31), words(40))
    assert answers.references(1) == (words(33),)
    assert [answers.task(index) for index in (0, 1)] == ["b", "a"]
    assert [answers.category(index) for index in (0, 1)] == ["y", "y"]
    assert answers.task_names == ("a", "b")
    assert answers.parts.tolist() == [0, 2]


def merging_tokenizer() -> Any:
    """A byte-pair tokenizer of single characters that writes ":x" and ":xy" as one token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", *"abxyz:", ":x", ":xy"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, merges=[(":", "x"), (":x", "y")], unk_token="<s>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="</s>", unk_token="<s>")


@pytest.mark.parametrize("answer", ["xyz", "xz", "z", "xy"])
def test_a_token_across_the_boundary_belongs_to_the_answer(answer: str) -> None:
    tokenizer = merging_tokenizer()
    prompted = PromptedTexts(
        Template("{instruction}:", "{instruction}:"), ("ab",), ("",), ((answer,),), np.zeros(1, dtype=np.int8)
    )
    store = build_token_store(TextSet(prompted), tokenizer, 32, "error", "training", "answer")
    whole = tokenizer(f"ab:{answer}", return_offsets_mapping=True)
    prompt = [
        token
        for token, (start, end) in zip(whole["input_ids"], whole["offset_mapping"], strict=True)
        if all(character < len("ab:") for character in range(start, end))
    ]

    assert store.sequence(0).tolist() == [*whole["input_ids"], tokenizer.eos_token_id]
    assert store.label_start.tolist() == [len(prompt)]
    assert len(prompt) == (3 if answer == "z" else 2), "the tokens of an answer with x begin in the prompt"


def test_a_prompt_without_a_token_is_that_of_the_beginning() -> None:
    """Else the answer's first token would follow from nothing, and never be learned."""
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # puts nothing in front
    nothing = Template("{input}", "{input}")
    prompted = PromptedTexts(nothing, ("",), ("",), ((words(30, 31),),), np.zeros(1, dtype=np.int8))
    store = build_token_store(TextSet(prompted), tokenizer, 32, "error", "training", "answer")

    assert store.sequence(0).tolist() == [EOS, 30, 31, EOS]
    assert store.label_start.tolist() == [1]


def test_without_tasks_there_are_none() -> None:
    answers = build([ROW]).answers
    assert answers is not None

    assert (answers.tasks, answers.task(0), answers.category(0)) == (None, None, None)


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (12, TOKENS),
        (11, [BOS, 3, 10, 11, 4, 20, 21, 5, 30, 31, EOS]),  # the input is longer
        (10, [BOS, 3, 10, 11, 4, 20, 5, 30, 31, EOS]),  # of equally long ones the input goes
        (9, [BOS, 3, 10, 4, 20, 5, 30, 31, EOS]),
        (7, [BOS, 3, 4, 5, 30, 31, EOS]),
        (6, [BOS, 4, 5, 30, 31, EOS]),  # then the template, from its beginning
        (4, [BOS, 30, 31, EOS]),
        (3, [BOS, 30, 31]),  # an answer that alone is too long is cut at its end
        (2, [BOS, 30]),
    ],
)
def test_truncation_cuts_the_prompt_and_never_the_answer(max_tokens: int, expected: list[int]) -> None:
    store = build([ROW], max_tokens=max_tokens)
    assert store.answers is not None

    assert store.sequence(0).tolist() == expected
    assert store.untruncated_tokens.tolist() == [12]
    assert store.num_label_tokens[0] == min(3, max_tokens - 1)
    assert store.answers.num_prompts_cut == (max_tokens < 12)
    assert store.answers.num_answers_cut == (max_tokens < 4)


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_keeps_every_answer_that_fits(seed: int) -> None:
    generator = np.random.default_rng(seed)
    prompt = generator.integers(3, 60, generator.integers(1, 30))
    answer = generator.integers(3, 60, generator.integers(2, 12))
    max_tokens = int(generator.integers(2, 30))

    left, kept = cut_to_fit(prompt, answer, generator.permutation(prompt.size), max_tokens)

    assert kept.tolist() == answer[: max_tokens - 1].tolist()
    assert left.size >= 1
    assert left.size + kept.size == min(prompt.size + answer.size, max(max_tokens, 1))


def test_examples_without_an_answer_are_refused_and_counted() -> None:
    rows = [ROW, (words(10), "", [""]), (words(10), words(11), [" "])]

    with pytest.raises(
        DataError, match="2 of 3 training texts leave no label token .an empty answer; first: row 1"
    ):
        build(rows)
    store = build(rows, on_empty="drop")
    assert (len(store), store.num_dropped) == (1, 2)
    with pytest.raises(DataError, match="check data.instruction.output_field"):
        build(rows[1:], on_empty="drop")


def test_a_tokenizers_own_end_of_sequence_stands_once() -> None:
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", special_tokens=[("</s>", 2)]
    )

    assert build([ROW], tokenizer=tokenizer).sequence(0).tolist() == TOKENS


def test_a_tokenizer_without_an_end_of_sequence_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="an end-of-sequence token, got none"):
        build([ROW], tokenizer=tokenizer)


def test_a_tokenizer_that_does_not_know_its_characters_is_refused() -> None:
    prompted = texts([ROW]).prompted
    assert prompted is not None
    with pytest.raises(DataError, match="needs a fast tokenizer, .* got SimpleNamespace"):
        encode_answers(io.BytesIO(), prompted, SimpleNamespace(is_fast=False), 10)


def test_everything_that_matters_is_in_the_fingerprint() -> None:
    base = texts([ROW]).fingerprint
    others = [
        texts([(*ROW[:2], [ROW[2][0]])]),
        texts([ROW], tasks=["a"]),
        texts([ROW], categories=["a"]),
        texts([ROW], parts=np.ones(1, dtype=np.int8)),
        TextSet(list(texts([ROW]).texts)),
    ]

    assert len({base, *(other.fingerprint for other in others)}) == 6
    assert build([ROW]).fingerprint != build([ROW], loss_on="all").fingerprint


@pytest.mark.parametrize("model", ["opt_tokenizer", "stories260K", "tiny_opt"])
def test_real_tokenizers_split_prompt_and_answer(model: str, shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    prompted = PromptedTexts(
        Template("Rule: {instruction}\nText: {input}\nAnswer:\n", "Rule: {instruction}\nAnswer:\n"),
        ["Name the colour of the thing that is described, in one word."] * 2,
        ["The sky on a day without any clouds at all, at noon.", ""],
        [["blue as ever"], ["42"]],
        np.zeros(2, dtype=np.int8),
    )
    for max_tokens in (200, 24, 14):
        store = build_token_store(TextSet(prompted), tokenizer, max_tokens, "error", "training")
        assert store.answers is not None
        for index in range(2):
            start = store.answers.answer_start[index]
            answer = tokenizer.decode(store.sequence(index)[start:].tolist())
            assert answer.strip() == f"{prompted.answer(index)}{tokenizer.eos_token}"
            if max_tokens == 200:
                prompt = tokenizer.decode(store.sequence(index)[:start].tolist(), skip_special_tokens=True)
                assert (
                    prompt.strip()
                    == prompted.template.render(prompted.instructions[index], prompted.inputs[index])[
                        0
                    ].strip()
                )


def test_references_without_a_token_of_rouge_are_counted() -> None:
    answers = [["\u732b"], ["w3", "\u732b"], ["."], ["\u732b", "7"], ["\u00c9"], ["K"]]
    store = build([(words(10), "", references) for references in answers])
    assert store.answers is not None
    scores = AnswerScorer().scores(np.arange(6), ["x"] * 6, answers)
    assert store.answers.num_without_rouge_tokens() == int(scores.without_tokens.sum()) == 3
