"""From the configuration to local training, the scaling of adapters and the weights of clients."""

import math

import numpy as np
import pytest
import torch

from fedsim.comm.group import SoloGroup
from fedsim.config.loader import load_config
from fedsim.config.training_section import TrainingConfig
from fedsim.models.base import BaseModel
from fedsim.models.targets import find_targets
from fedsim.server.build import build_initial_adapter, build_local_training, build_run
from fedsim.server.build_strategy import build_federated_strategy
from fedsim.server.cohort import client_jobs, pooled_job
from fedsim.server.tiers import Tiers
from fedsim.training.settings import OptimizerSettings
from tests.cohorts import TARGETS
from tests.helpers import tiny_opt, word_tokenizer
from tests.server.test_round import make_data

ELSEWHERE = {
    "trainer",
    "gradient_checkpointing",
    "on_not_finite",
    "max_update_norm",
    "on_large_update",
    "round_schedule",
    "pack",
}
"""Keys of `training` that say nothing about a single local run."""

ADAMW = [
    "training.local_epochs=3",
    "training.batch_size=5",
    "training.gradient_accumulation_steps=4",
    "training.max_grad_norm=0.7",
    "training.proximal_mu=0.25",
    "training.optimizer={lr: 0.02, weight_decay: 0.1, beta1: 0.8, beta2: 0.95, eps: 1.0e-6}",
    "training.schedule={name: cosine, warmup_steps: 2}",
    "lora.dropout=0.15",
    "model.dropout=as_config",
    "run.seed=11",
]
SGD = [
    "training.local_steps=6",
    "training.max_grad_norm=null",
    "training.optimizer={name: sgd, lr: 0.02, momentum: 0.6}",
    "training.schedule.name=constant",
]


@pytest.mark.parametrize("overrides", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_each_key_of_training_reaches_local_runs(overrides):
    config = load_config(None, overrides)
    budget, local = build_local_training(config)
    training, optimizer, schedule = config.training, config.training.optimizer, config.training.schedule
    reached = {
        "local_epochs": (training.local_epochs, budget.local_epochs),
        "local_steps": (training.local_steps, budget.local_steps),
        "batch_size": (training.batch_size, local.batch_size),
        "gradient_accumulation_steps": (training.gradient_accumulation_steps, local.accumulation),
        "max_grad_norm": (training.max_grad_norm, local.max_grad_norm),
        "proximal_mu": (training.proximal_mu, local.proximal_mu),
        "optimizer": (
            OptimizerSettings(
                optimizer.name,
                optimizer.lr,
                optimizer.weight_decay,
                optimizer.beta1,
                optimizer.beta2,
                optimizer.eps,
                optimizer.momentum,
            ),
            local.optimizer,
        ),
        "schedule": ((schedule.name, schedule.warmup_steps), (local.schedule, local.warmup_steps)),
    }
    assert reached.keys() == TrainingConfig.model_fields.keys() - ELSEWHERE, (
        "a new key is to be compared here"
    )
    assert {key: asked for key, (asked, _) in reached.items()} == {
        key: got for key, (_, got) in reached.items()
    }
    assert (local.lora_dropout, local.base_dropout, local.seed) == (
        config.lora.dropout,
        config.model.dropout == "as_config",
        config.run.seed,
    )


def test_no_value_of_these_keys_is_the_default():
    """Else a key that is forgotten would not be noticed above."""
    changed = [load_config(None, overrides).training for overrides in (ADAMW, SGD)]
    default = TrainingConfig()
    nodes = [(default, changed)] + [
        (getattr(default, name), [getattr(each, name) for each in changed])
        for name in ("optimizer", "schedule")
    ]
    for node, others in nodes:
        for key in type(node).model_fields.keys() - ELSEWHERE:
            assert any(getattr(other, key) != getattr(node, key) for other in others), key


def test_centralized_training_sees_what_the_cohort_would_with_accumulated_steps():
    steps = ["training.local_steps=3", "training.batch_size=2", "training.gradient_accumulation_steps=2"]
    budget, local = build_local_training(load_config(None, steps))
    data, cohort = make_data(), (0, 3, 4)
    [pooled] = pooled_job(cohort, data, budget, local, 0)
    by_client = [
        sum(len(batch) for step in job.batches(0) for batch in step)
        for job in client_jobs(cohort, data, budget, local)
    ]
    assert by_client == [3 * 2, 3 * 4, 4 + 4 + 2], "of 2, 8 and 10 examples"
    assert len(pooled.examples) == sum(by_client)


def tiers_of(rank: int) -> Tiers:
    return Tiers((dict.fromkeys(TARGETS, rank),), np.zeros(20, dtype=np.int64))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_stabilised_scaling_reaches_server_and_clients(use_rslora):
    config = load_config(None, ["lora.lora_alpha=12", "lora.rank=9", f"lora.use_rslora={use_rslora}"])
    expected = 12 / (math.sqrt(9) if use_rslora else 9)
    adapter = build_initial_adapter(config, TARGETS, tiers_of(9))
    strategy = build_federated_strategy(config, TARGETS, tiers_of(9), 20)

    assert [factors.scaling for factors in adapter.values()] == pytest.approx([expected] * len(TARGETS))
    assert strategy.federation.scaling(9) == pytest.approx(expected)


@pytest.mark.parametrize("weights", ["examples", "tokens", "uniform"])
def test_client_weights_reach_the_sums_in_packs_and_the_strategy(weights):
    config = load_config(None, [f"aggregation.client_weights={weights}", "training.trainer=sequential"])
    base = BaseModel(tiny_opt(), word_tokenizer(), 1, "made up", "made up", torch.float32, "made up")
    targets = find_targets(base.model, config.lora.target_modules)
    tiers = Tiers((dict.fromkeys(targets, 2),), np.zeros(5, dtype=np.int64))
    strategy = build_federated_strategy(config, targets, tiers, 5)
    run = build_run(config, SoloGroup(), base, make_data(), tiers, strategy)

    assert run.aggregator.weighting == run.strategy.federation.weighting == weights
