"""The reference trainer against plain PEFT and torch.optim."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedsim.data.batches import collate, local_batches
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.peft_format import save_peft_adapter
from fedsim.lora.plan import ClientPlan
from fedsim.models.adapted import AdaptedModel
from fedsim.models.targets import find_targets
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import LocalSettings, OptimizerSettings, lr_factor
from tests.helpers import make_store, random_texts, tiny_opt

PAD = 1
TARGETS = ("q_proj", "v_proj")
POST_LN = {"do_layer_norm_before": False, "word_embed_proj_dim": 8}


def settings(**changes: Any) -> LocalSettings:
    values: dict[str, Any] = {
        "batch_size": 4,
        "accumulation": 1,
        "max_grad_norm": 1.0,
        "optimizer": OptimizerSettings(lr=1e-2),
        "schedule": "linear",
        "warmup_steps": 0,
        "lora_dropout": 0.0,
        "base_dropout": False,
        "seed": 3,
    }
    return LocalSettings(**{**values, **changes})


def random_start(targets: dict[str, tuple[int, int]], dtype: torch.dtype, rank: int = 3) -> AdapterState:
    start = initial_adapter(targets, dict.fromkeys(targets, rank), ScalingRule(8.0), seed=5, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    return AdapterState(
        {
            module: LoraFactors(
                factors.A,
                0.1 * torch.randn(factors.B.shape, generator=generator, dtype=torch.float64).to(dtype),
                factors.scaling,
            )
            for module, factors in start.items()
        }
    )


def job(
    client_id: int,
    examples: list[int],
    store: Any,
    local: LocalSettings | None = None,
    epochs: int | None = 2,
    steps: int | None = None,
) -> ClientJob:
    indices = np.asarray(examples, dtype=np.int64)
    tokens = int(store.num_label_tokens[indices].sum())
    return ClientJob(client_id, indices, tokens, epochs, steps, tokens, local or settings())


def train_with_peft(
    base: torch.nn.Module,
    start: AdapterState,
    client: ClientJob,
    store: Any,
    local: LocalSettings,
    folder: Any,
    target_modules: tuple[str, ...] = TARGETS,
) -> tuple[dict[str, LoraFactors], list[float]]:
    """The same client through PEFT, torch.optim and the schedule of Hugging Face's trainer."""
    from peft import PeftModel
    from transformers import get_scheduler

    save_peft_adapter(start, folder, "base", target_modules)
    model = PeftModel.from_pretrained(
        base, str(folder), is_trainable=True, autocast_adapter_dtype=False
    ).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = local.optimizer
    if values.name == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameters,
            lr=values.lr,
            weight_decay=values.weight_decay,
            betas=(values.beta1, values.beta2),
            eps=values.eps,
        )
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=values.lr, momentum=values.momentum, weight_decay=values.weight_decay
        )
    steps = local_batches(
        len(client.examples),
        batch_size=local.batch_size,
        local_epochs=client.local_epochs,
        local_steps=client.local_steps,
        accumulation=local.accumulation,
        seed=local.seed,
        round_index=1,
        client_id=client.client_id,
    )
    scheduler = get_scheduler(local.schedule, optimizer, local.warmup_steps, len(steps))
    losses = []
    for micro_batches in steps:
        # one padded batch for the whole step: accumulation must not change anything
        batch = collate(store, client.examples[np.concatenate(micro_batches)], PAD)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        if local.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, local.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    trained = {}
    for module in start:
        layer = model.get_submodule(f"base_model.model.{module}")
        trained[module] = LoraFactors(
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
            start[module].scaling,
        )
    return trained, losses


CASES = [
    pytest.param({}, {}, {}, id="adamw-linear-clip"),
    pytest.param({"optimizer": OptimizerSettings("sgd", lr=0.1, momentum=0.9)}, {}, {}, id="sgd-momentum"),
    pytest.param(
        {"optimizer": OptimizerSettings(lr=1e-2, weight_decay=0.1), "schedule": "cosine", "warmup_steps": 2},
        {},
        {},
        id="cosine-warmup-decay",
    ),
    pytest.param({"accumulation": 3, "max_grad_norm": None, "batch_size": 2}, {}, {}, id="accumulation"),
    pytest.param(
        {"schedule": "constant", "max_grad_norm": 0.05}, {"epochs": None, "steps": 5}, {}, id="steps"
    ),
    pytest.param({}, {}, POST_LN, id="post-ln-with-projection"),
]


@pytest.mark.parametrize(("changes", "budget", "shape"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_one_client_equals_plain_peft(changes, budget, shape, dtype, tolerance, tmp_path):
    store = make_store(random_texts(40, seed=1))
    local = settings(**changes)
    base = tiny_opt(dtype, **shape)
    targets = find_targets(base, TARGETS)
    start = random_start(targets, dtype)
    client = job(4, list(range(3, 14)), store, local, **budget)

    expected, losses = train_with_peft(tiny_opt(dtype, **shape), start, client, store, local, tmp_path)
    model = AdaptedModel(base, targets, torch.device("cpu"))
    [update] = SequentialTrainer(model, store, PAD, False, 0).train(
        Pack(0, (client,)), [ClientPlan(start)], 1
    )

    assert update.report.steps == len(losses)
    assert update.report.train_loss_first == pytest.approx(losses[0], abs=tolerance)
    assert update.report.train_loss_last == pytest.approx(losses[-1], abs=tolerance * 10)
    moved = max(float((update.adapter[m].B - start[m].B).abs().max()) for m in start)
    assert moved > 1e-3, "training must have moved the adapter, or equality means nothing"
    for module, factors in update.adapter.items():
        torch.testing.assert_close(factors.A, expected[module].A, rtol=0, atol=tolerance)
        torch.testing.assert_close(factors.B, expected[module].B, rtol=0, atol=tolerance)


def train_all(
    clients: list[ClientJob], store: Any, local: LocalSettings, round_index: int = 0
) -> dict[int, Any]:
    base = tiny_opt()
    targets = find_targets(base, TARGETS)
    start = random_start(targets, torch.float32)
    trainer = SequentialTrainer(AdaptedModel(base, targets, torch.device("cpu")), store, PAD, False, 0)
    pack = Pack(0, tuple(replace(client, settings=local) for client in clients))
    updates = trainer.train(pack, [ClientPlan(start)] * len(clients), round_index)
    return {update.report.client_id: update.adapter for update in updates}


def test_a_client_does_not_depend_on_who_trains_before_it():
    store = make_store(random_texts(40, seed=1))
    local = settings(lora_dropout=0.3)
    first, second = job(0, [0, 1, 2, 3, 4], store), job(1, [5, 6, 7], store)
    forward = train_all([first, second], store, local)
    backward = train_all([second, first], store, local)
    alone = train_all([second], store, local)
    assert forward[0].equal(backward[0])
    assert forward[1].equal(backward[1])
    assert forward[1].equal(alone[1])


def test_dropout_differs_by_client_and_round_and_leaves_the_global_generator_alone():
    store = make_store(random_texts(40, seed=1))
    examples = [0, 1, 2, 3]
    before = torch.get_rng_state()
    with_dropout = train_all([job(0, examples, store)], store, settings(lora_dropout=0.3))
    assert torch.equal(before, torch.get_rng_state())
    assert not with_dropout[0].equal(train_all([job(0, examples, store)], store, settings())[0])
    again = train_all([job(0, examples, store)], store, settings(lora_dropout=0.3), round_index=1)
    assert not with_dropout[0].equal(again[0])


def test_base_dropout_is_keyed_and_off_by_default():
    store = make_store(random_texts(40, seed=1))
    client = job(0, [0, 1, 2, 3], store)
    before = torch.get_rng_state()
    off = train_all([client], store, settings())
    on = train_all([client], store, settings(base_dropout=True))
    torch.rand(3)
    assert on[0].equal(train_all([client], store, settings(base_dropout=True))[0])
    assert not on[0].equal(off[0])
    torch.set_rng_state(before)


def test_the_start_is_not_written_to():
    store = make_store(random_texts(40, seed=1))
    base = tiny_opt()
    targets = find_targets(base, TARGETS)
    start = random_start(targets, torch.float32)
    copy = start.map(torch.clone)
    trainer = SequentialTrainer(AdaptedModel(base, targets, torch.device("cpu")), store, PAD, False, 0)
    trainer.train(Pack(0, (job(0, [0, 1, 2], store),)), [ClientPlan(start)], 0)
    assert start.equal(copy)


def test_a_loss_that_is_not_finite_is_refused():
    from fedsim.errors import TrainingError

    store = make_store(random_texts(40, seed=1))
    wild = settings(optimizer=OptimizerSettings("sgd", lr=1e30), max_grad_norm=None)
    with pytest.raises(TrainingError, match=r"client 0 .*training\.optimizer\.lr"):
        train_all([job(0, list(range(12)), store)], store, wild)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_equals_hugging_face(schedule):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, 3, 10)
    for step in range(10):
        assert lr_factor(step, 10, schedule, 3) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
