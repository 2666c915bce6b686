"""One copy of a base's weights for the processes of a node, whatever type their files have."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedsim.cache import cache_root
from fedsim.errors import ModelError
from fedsim.models.base import fingerprint, load_frozen
from tests.helpers import tiny_opt


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in float16, as OPT's are on the hub, for one of two processes of a node."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    tiny_opt().half().save_pretrained(tmp_path / "half")
    return tmp_path / "half"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_frozen(folder, "half", dtype, allow_pickle=False, trust_remote_code=False)


def mapped_from(tensor: torch.Tensor) -> str:
    """The file in whose mapping a tensor lies; "" for memory of the process's own."""
    place = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        begin, end = (int(edge, 16) for edge in span.split("-"))
        if begin <= place < end:
            return path[0] if path and path[0].startswith("/") else ""
    raise AssertionError("no mapping holds it")


def converted() -> list[Path]:
    return sorted((cache_root() / "converted-weights").glob("*/model.safetensors"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_converted_weights_are_mapped_from_one_file(half: Path) -> None:
    first, second = load(half), load(half)
    assert len(converted()) == 1
    for model in (first, second):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert mapped_from(parameter) == str(converted()[0]), name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_a_process_alone_converts_for_itself(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    model = load(half)
    assert not converted()
    assert all(mapped_from(parameter) == "" for parameter in model.parameters())


def test_a_process_that_merges_a_model_converts_nothing_for_others(half: Path) -> None:
    """On GPUs the run never needs float32 weights, which the merged model is made of."""
    load_frozen(half, "half", torch.float32, allow_pickle=False, trust_remote_code=False, alone=True)
    assert not converted()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_of_the_wanted_type_are_mapped_from_where_they_are(half: Path) -> None:
    model = load(half, torch.float16)
    assert not converted()
    assert {mapped_from(parameter) for parameter in model.parameters()} == {str(half / "model.safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_weights_as_without(half: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = load(half, dtype)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    own = load(half, dtype)
    assert fingerprint(shared) == fingerprint(own)
    assert shared.get_output_embeddings().weight is shared.get_input_embeddings().weight
    ids = torch.arange(4, 12)[None]
    assert torch.equal(shared(ids).logits, own(ids).logits)


def test_writing_to_the_base_changes_no_file(half: Path) -> None:
    """Strategies that change the base write into it; the other processes must not see that before their own turn."""
    model = load(half)
    before = {name: tensor.clone() for name, tensor in load_file(converted()[0]).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    after = load_file(converted()[0])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_model_that_was_changed_is_converted_again(half: Path) -> None:
    old = fingerprint(load(half))
    model = tiny_opt()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    model.half().save_pretrained(half)
    assert fingerprint(load(half)) != old
    assert len(converted()) == 2


@pytest.mark.parametrize("why", ["is full", "fills up", "cannot be written"])
def test_without_a_cache_each_converts_for_itself(
    half: Path, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if why == "is full":
        monkeypatch.setattr("fedsim.models.shared_weights._free_bytes", lambda folder: 10)
    elif why == "fills up":

        def fail(model: Any, folder: Path) -> None:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("fedsim.models.shared_weights._save", fail)
    else:
        cache_root().write_text("a file", encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        model = load(half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    (message,) = (record.getMessage() for record in caplog.records)
    assert "each process converts its weights to torch.float32" in message


def test_missing_weights_are_refused_and_nothing_is_kept(half: Path) -> None:
    weights = load_file(half / "model.safetensors")
    del weights["model.decoder.layers.0.fc1.weight"]
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are missing"):
        load(half)
    assert not converted()


def test_a_damaged_file_is_named(half: Path) -> None:
    (half / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"its weights in .*half cannot be loaded"):
        load(half)
