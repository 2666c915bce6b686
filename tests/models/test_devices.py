"""What depends on the kind of GPU, told without one; and how values come to a device."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedsim.models import dropout, packing, sharding
from fedsim.models.products import may_be_grouped
from fedsim.models.transfer import to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The compute capability of the GPU that is pretended."""
    of_gpu = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_gpu[0])
    return of_gpu


@pytest.mark.parametrize(
    ("dtype", "device", "chip", "allowed"),
    [
        (torch.float32, CPU, (0, 0), True),
        (torch.bfloat16, GPU, (9, 0), True),
        (torch.bfloat16, GPU, (10, 0), True),
        (
            torch.bfloat16,
            GPU,
            (8, 0),
            False,
        ),  # there torch waits for the GPU and multiplies one after another
        (torch.float32, GPU, (9, 0), False),
    ],
)
def test_grouped_products_where_a_kernel_has_them(dtype, device, chip, allowed, capability):
    capability[0] = chip
    assert may_be_grouped([8, 8], [16, 32], 48, dtype, device) is allowed


@pytest.mark.parametrize(
    ("dtype", "width", "chip", "flash"),
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 256, (9, 0), True),
        (torch.float16, 64, (7, 0), False),  # V100
        (torch.float16, 64, (7, 5), False),  # T4
        (torch.bfloat16, 320, (9, 0), False),
        (torch.float32, 64, (9, 0), False),
    ],
)
def test_attention_over_sequences_where_a_kernel_has_it(dtype, width, chip, flash, capability, monkeypatch):
    capability[0] = chip
    monkeypatch.setattr(packing, "HAS_VARLEN", True)
    query = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 2, 9, width), device=GPU)
    assert packing._has_flash_attention(query) is flash  # type: ignore[arg-type]


def test_values_come_to_a_device_as_they_are():
    numbers = np.arange(5, dtype=np.int32)
    assert torch.equal(to_device(numbers, CPU, torch.int64), torch.arange(5))
    assert torch.equal(to_device(range(3), CPU, torch.int64), torch.arange(3))
    assert torch.equal(
        to_device([0.5, 1.0], CPU, torch.bfloat16), torch.tensor([0.5, 1.0], dtype=torch.bfloat16)
    )
    assert to_device([], CPU, torch.int32).shape == (0,)


def test_keys_of_the_bases_dropout_are_made_once_for_a_device():
    first, again = dropout._features_on(-1, 12, CPU), dropout._features_on(-1, 12, CPU)
    assert first is again
    assert torch.equal(first, dropout.feature_keys(-1, 12))
    assert not torch.equal(first, dropout._features_on(-2, 12, CPU))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (GPU, {"LOCAL_RANK": "1"}),
        (torch.device("cuda", 0), {"LOCAL_RANK": "0"}),  # a task that sees one GPU, its own
        (CPU, {"LOCAL_RANK": "3", "DS_ACCELERATOR": "cpu"}),  # also where there are GPUs
    ],
)
def test_deepspeed_is_told_the_device_of_this_process(device, expected, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    sharding._name_device(device)
    told = {name: os.environ[name] for name in ("LOCAL_RANK", "DS_ACCELERATOR") if name in os.environ}
    assert told == ({"LOCAL_RANK": "3"} | expected)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zero = sharding.deepspeed_settings(offload=True)["zero_optimization"]
    assert zero["offload_param"]["pin_memory"] is (device.type == "cuda")


def test_dropout_of_attention_weights_is_no_dropout_of_tokens():
    """Eager attention drops weights of (batch, heads, length, length), which have no row for a token."""
    tokens = torch.from_numpy(dropout.token_keys(0, "base", (0, 0, 0, 0), 50))
    weights, states = torch.ones(2, 3, 25, 25), torch.ones(2, 25, 16)
    with dropout.keyed_base_dropout(tokens):
        torch.manual_seed(0)
        dropped = torch.nn.functional.dropout(weights, 0.5, training=True)
        keyed = torch.nn.functional.dropout(states, 0.5, training=True)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    with dropout.keyed_base_dropout(tokens):
        assert torch.equal(torch.nn.functional.dropout(states, 0.5, training=True), keyed), (
            "it counts no call"
        )
