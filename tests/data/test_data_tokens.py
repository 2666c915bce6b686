import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.data import tokens as tokens_module
from fedsim.data.corpus import TextSet
from fedsim.data.tokens import TokenStore, build_token_store, tokenizer_fingerprint
from fedsim.errors import DataError
from tests.helpers import random_texts, word_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


def build(texts: TextSet, max_tokens: int = 16, on_empty: Any = "error", tokenizer: Any = None) -> TokenStore:
    return build_token_store(texts, tokenizer or word_tokenizer(), max_tokens, on_empty, "training")


def test_a_store_holds_what_the_tokenizer_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "TOKENIZER_BATCH", 7)
    tokenizer = word_tokenizer()
    texts = random_texts(50, longest=30)
    store = build(TextSet(texts), max_tokens=12)

    assert len(store) == 50
    for index, text in enumerate(texts):
        whole = tokenizer(text)["input_ids"]
        assert store.sequence(index).tolist() == whole[:12]
        assert store.sequence(index).dtype == np.int32
        assert store.untruncated_tokens[index] == len(whole)
        assert store.num_tokens[index] == min(len(whole), 12)
        assert store.num_label_tokens[index] == store.num_tokens[index] - 1
        assert store.words[index] == len(text.split())
        assert store.characters[index] == len(text)
    assert store.labels is None
    assert store.clients is None
    assert store.num_dropped == 0


def test_several_sequences_are_read_in_the_order_asked_for() -> None:
    store = build(TextSet(random_texts(20)))
    indices = np.array([5, 0, 19, 5])

    expected = np.concatenate([store.sequence(index) for index in indices.tolist()])
    assert np.array_equal(store.flat_tokens(indices), expected)


def test_a_store_is_read_only_and_bounded() -> None:
    store = build(TextSet(random_texts(5)))

    for array in (store.num_tokens, store.sequence(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for index in (-1, 5):
        with pytest.raises(IndexError):
            store.sequence(index)


def test_labels_and_clients_stay_with_their_texts() -> None:
    texts = TextSet(["w3 w4", "", "w5", " ", "w6 w7"], ["a", "b", "c", "d", "e"], ["1", "2", "3", "4", "5"])
    store = build(texts, on_empty="drop")

    assert store.labels == ["a", "c", "e"]
    assert store.clients == ["1", "3", "5"]
    assert [store.sequence(index).tolist() for index in range(3)] == [[2, 3, 4], [2, 5], [2, 6, 7]]
    assert store.characters.tolist() == [5, 2, 5]
    assert store.num_dropped == 2


def test_dropped_texts_are_reported_also_from_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        build(TextSet(["w3 w4", ""]), on_empty="drop")

    assert sum("dropped 1 of 2 training texts" in message for message in caplog.messages) == 2


def test_a_text_without_label_tokens_is_refused() -> None:
    texts = TextSet(["w3", "w4", "", "w5", ""], rows=np.array([2, 3, 11, 12, 13]))

    with pytest.raises(DataError, match=r"2 of 5 training texts .* row 11, .*data.on_empty=drop"):
        build(texts)


def test_nothing_left_is_refused_however_empty_texts_are_treated() -> None:
    for on_empty in ("error", "drop"):
        with pytest.raises(DataError, match="2 of 2 training texts leave no label token"):
            build(TextSet(["", " "]), on_empty=on_empty)
        with pytest.raises(DataError, match="training texts must be at least one"):
            build(TextSet([]), on_empty=on_empty)


def test_a_failed_store_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        build(TextSet(["w3", ""]))

    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []


def test_a_store_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(5)
    first = build(TextSet(texts, clients=["x"] * 5))

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokens_module, "_write_store", refuse)
    second = build(TextSet(list(texts), clients=["x"] * 5))

    assert second.fingerprint == first.fingerprint
    assert second.clients == ["x"] * 5
    assert np.array_equal(first.flat_tokens(np.arange(5)), second.flat_tokens(np.arange(5)))


def test_everything_that_decides_a_store_is_in_its_fingerprint() -> None:
    texts = ["w3 w4", "w5 w6"]
    stores = [
        build(TextSet(texts)),
        build(TextSet(["w3 w4 w5", "w6"])),
        build(TextSet(texts[::-1])),
        build(TextSet(texts, labels=["a", "b"])),
        build(TextSet(texts, clients=["a", "b"])),
        build(TextSet(texts), max_tokens=8),
        build(TextSet(texts), on_empty="drop"),
        build(TextSet(texts), tokenizer=word_tokenizer(vocabulary=80)),
    ]

    assert len({store.fingerprint for store in stores}) == len(stores)


def test_a_tokenizer_fingerprint_ignores_what_earlier_calls_left_behind() -> None:
    tokenizer = word_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w3 w4 w5", "w6"], truncation=True, max_length=2, padding=True)

    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.split_special_tokens = True
    assert tokenizer_fingerprint(tokenizer) != before, "it decides whether </s> in a text is one token"
    tokenizer.split_special_tokens = False
    assert build(TextSet(["w3 w4 w5", "w6"]), tokenizer=tokenizer).num_tokens.tolist() == [4, 2]


def test_a_tokenizer_without_a_rust_backend_has_a_fingerprint() -> None:
    class Plain:
        is_fast = False

        def __init__(self, prefix: list[int]) -> None:
            self.prefix = prefix
            self.special_tokens_map = {"bos_token": "<s>"}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*self.prefix, len(text)]}

    assert tokenizer_fingerprint(Plain([0])) == tokenizer_fingerprint(Plain([0]))
    assert tokenizer_fingerprint(Plain([0])) != tokenizer_fingerprint(Plain([]))


def test_long_texts_bring_no_warning(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(TextSet(["w3 " * 100]), tokenizer=tokenizer)

    assert caplog.messages == []
    assert capsys.readouterr().err == ""


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1 .* not valid Unicode"):
        build(TextSet(["w3", "w4 \ud800"]))
