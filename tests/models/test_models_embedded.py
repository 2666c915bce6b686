"""The embedded tokenizer and base: trained once, cached, an ordinary model folder."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from fedsim.cache import CacheError
from fedsim.config.model_section import ModelConfig
from fedsim.models.base import build_base, fingerprint
from fedsim.models.description import describe_base
from fedsim.models.embedded import embedded_base_config, embedded_base_folder, train_embedded
from fedsim.models.tokenizer import build_tokenizer

SEQUENCES = [[2, *range(4, 4 + length)] for length in range(1, 60)]


def train_in_a_process(folder: str) -> None:
    Path(folder).write_text(str(embedded_base_folder(steps=2)), encoding="utf-8")


def test_tokenizer_has_the_layout_of_opt() -> None:
    tokenizer = build_tokenizer(ModelConfig())
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    text = "Return the number of bytes, or None.\n\tÜbung ☂"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < len(text)
    assert len(tokenizer) == embedded_base_config().vocab_size


def test_tokenizer_and_description_need_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.models.embedded.train_embedded", None)
    description = describe_base(
        ModelConfig(), ["q_proj", "v_proj"], build_tokenizer(ModelConfig()), max_tokens=128
    )
    assert len(description.targets) == 4
    assert description.num_lora_parameters(2) == 4 * 2 * (64 + 64)


def test_base_is_cached_and_an_ordinary_folder() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_base_folder(steps=3)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert embedded_base_folder(steps=3) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before

    ours = build_base(ModelConfig(name_or_path=str(folder)), "cpu")
    assert ours.fingerprint == fingerprint(AutoModelForCausalLM.from_pretrained(folder))
    assert ours.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert ours.pad_id == 1
    counted = sum(parameter.numel() for parameter in ours.model.parameters())
    assert describe_base(ModelConfig(), ["q_proj"]).num_parameters == counted


def test_training_is_deterministic_and_leaves_global_state_alone() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(5)
        state = torch.get_rng_state()
        first = train_embedded(embedded_base_config(), SEQUENCES, steps=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == 2
        torch.rand(3)
        second = train_embedded(embedded_base_config(), SEQUENCES, steps=4)
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(train_embedded(embedded_base_config(), SEQUENCES, steps=5))


def test_training_lowers_the_loss() -> None:
    ids = torch.tensor([SEQUENCES[40]])
    losses = [
        train_embedded(embedded_base_config(), SEQUENCES, steps)(input_ids=ids, labels=ids).loss.item()
        for steps in (1, 40)
    ]
    assert losses[1] < losses[0] - 1


def test_two_processes_ask_at_once(tmp_path: Path) -> None:
    build_tokenizer(ModelConfig())  # so that the processes meet at the base
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=train_in_a_process, args=(str(tmp_path / name),), daemon=True) for name in "ab"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_a_damaged_entry_is_refused() -> None:
    folder = embedded_base_folder(steps=3)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(CacheError, match=r"model.safetensors changed or missing\); delete that folder"):
        embedded_base_folder(steps=3)
    weights.write_bytes(content)
    assert embedded_base_folder(steps=3) == folder
