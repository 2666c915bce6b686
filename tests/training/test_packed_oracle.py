"""Packs against plain PEFT and torch.optim: every family, two of its modules and all, plain texts and answers."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.models.targets import find_targets
from fedsim.training.packs import ClientJob
from fedsim.training.settings import OptimizerSettings
from tests.helpers import make_answer_store, make_store, random_texts, tiny_opt
from tests.training.test_packed import (
    ADAMW,
    random_adapter,
    tiny_gpt_neox,
    tiny_llama,
    tiny_qwen2,
    train_packed,
    worst_difference,
)
from tests.training.test_packed_more import norm_in_full
from tests.training.test_sequential_oracle import train_with_peft

DOUBLE = torch.float64
QV = ("q_proj", "v_proj")
OPT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def exact(build: Any) -> torch.nn.Module:
    """A model in float64 throughout."""
    model: torch.nn.Module = build(DOUBLE)
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = partial(norm_in_full, norm)
    return model


BASES = {
    "opt": tiny_opt,
    "opt-post-ln": partial(tiny_opt, do_layer_norm_before=False, word_embed_proj_dim=8),
    "llama": tiny_llama,
    "gpt-neox": tiny_gpt_neox,
    "qwen2": tiny_qwen2,
}
CASES = [
    pytest.param(base, modules, id=f"{base}-{size}")
    for base, few, all_modules in [
        ("opt", QV, OPT),
        ("opt-post-ln", QV, OPT),
        ("llama", QV, LLAMA),
        ("gpt-neox", NEOX[:2], NEOX),
        ("qwen2", QV, LLAMA),
    ]
    for size, modules in (("two", few), ("all", all_modules))
]

ADAMW_CLIENTS = (
    replace(ADAMW, batch_size=2, accumulation=2),
    replace(ADAMW, optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.1, beta1=0.8), schedule="cosine"),
    replace(ADAMW, max_grad_norm=None, schedule="constant", batch_size=1, accumulation=3),
    replace(ADAMW, max_grad_norm=0.05, warmup_steps=2),
)
SGD = OptimizerSettings("sgd", lr=0.1)
SGD_CLIENTS = (
    replace(ADAMW, optimizer=replace(SGD, momentum=0.9), batch_size=2, accumulation=2),
    replace(ADAMW, optimizer=replace(SGD, weight_decay=0.01), schedule="cosine"),
    replace(ADAMW, optimizer=SGD, max_grad_norm=None, schedule="constant", batch_size=1, accumulation=3),
    replace(ADAMW, optimizer=replace(SGD, momentum=0.5), max_grad_norm=0.05, warmup_steps=2),
)
SIZES = (5, 7, 3, 4)
RANKS = (2, 1, 8, 4)


@pytest.fixture(scope="module")
def stores() -> dict[str, Any]:
    return {"texts": make_store(random_texts(20, seed=1)), "answers": make_answer_store(20, seed=1)}


@pytest.mark.parametrize("kind", ["texts", "answers"])
@pytest.mark.parametrize("local", [ADAMW_CLIENTS, SGD_CLIENTS], ids=["adamw", "sgd"])
@pytest.mark.parametrize(("base", "target_modules"), CASES)
def test_each_client_of_a_pack_equals_plain_peft(base, target_modules, local, kind, stores, tmp_path):
    """Other ranks, sizes and settings for each client, fewer slots than clients, steps of several micro-batches."""
    store, build = stores[kind], BASES[base]
    targets = find_targets(build(DOUBLE), target_modules)
    starts = [random_adapter(targets, rank, DOUBLE, seed) for seed, rank in enumerate(RANKS)]
    examples = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    jobs = tuple(
        ClientJob(
            client_id, own, 1, None if client_id == 3 else 2, 3 if client_id == 3 else None, 1, settings
        )
        for client_id, (own, settings) in enumerate(zip(examples, local, strict=True))
    )
    packed = train_packed(exact(build), target_modules, jobs, starts, store)
    for job, start, update in zip(jobs, starts, packed, strict=True):
        expected, losses = train_with_peft(
            exact(build), start, job, store, job.settings, tmp_path, target_modules
        )
        assert update.report.steps == len(losses)
        assert update.report.train_loss_mean == pytest.approx(np.mean(losses), abs=1e-9)
        assert worst_difference(update.adapter, start) > 1e-6, "a thousand times the tolerance"
        assert list(update.adapter) == list(expected)
        assert worst_difference(update.adapter, expected) <= 1e-9
