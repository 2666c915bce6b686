"""The packed trainer against the sequential one, and one client against its neighbours."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.errors import TrainingError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import ClientPlan
from fedsim.lora.updates import ClientUpdate
from fedsim.models.adapted import AdaptedModel
from fedsim.models.stacked import StackedModel, plan_products
from fedsim.models.targets import find_targets
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import LocalSettings, OptimizerSettings
from tests.helpers import VOCABULARY, make_store, random_texts, tiny_opt

CPU = torch.device("cpu")
PAD = 1
TWO = ("q_proj", "v_proj")


def tiny_llama(dtype: torch.dtype) -> torch.nn.Module:
    """Rotary positions, gated feed-forward, and two query heads for each key head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt_neox(dtype: torch.dtype) -> torch.nn.Module:
    """Fused query, key and value; parallel residual; an untied head."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTNeoXForCausalLM(config).to(dtype).eval()


def tiny_qwen2(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).to(dtype).eval()


FAMILIES = {
    "opt-qv": (lambda dtype: tiny_opt(dtype), TWO),
    "opt-all": (lambda dtype: tiny_opt(dtype), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "opt-post-ln": (lambda dtype: tiny_opt(dtype, do_layer_norm_before=False, word_embed_proj_dim=8), TWO),
    "llama": (tiny_llama, ("q_proj", "v_proj", "down_proj")),
    "gpt-neox": (tiny_gpt_neox, ("query_key_value", "dense")),
    "qwen2": (tiny_qwen2, TWO),
}

ADAMW = LocalSettings(
    batch_size=3, accumulation=1, max_grad_norm=1.0, optimizer=OptimizerSettings(lr=1e-2), schedule="linear",
    warmup_steps=0, lora_dropout=0.0, base_dropout=False, seed=3,
)  # fmt: skip

RANKS = (1, 2, 4, 8, 2, 1)
DIFFERENT = (
    ADAMW,
    replace(ADAMW, optimizer=OptimizerSettings(lr=3e-3, weight_decay=0.1), schedule="cosine", batch_size=5),
    replace(ADAMW, max_grad_norm=None, schedule="constant"),
    replace(ADAMW, max_grad_norm=0.05, warmup_steps=2),
    replace(ADAMW, batch_size=2, accumulation=2),
    replace(ADAMW, batch_size=1),
)


def random_adapter(
    targets: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype, seed: int
) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            module: LoraFactors(
                (0.3 * torch.randn(rank, i, generator=generator, dtype=torch.float64)).to(dtype),
                (0.1 * torch.randn(o, rank, generator=generator, dtype=torch.float64)).to(dtype),
                8.0 / rank,
            )
            for module, (i, o) in targets.items()
        }
    )


def clients(store: Any, local: tuple[LocalSettings, ...] = DIFFERENT) -> tuple[ClientJob, ...]:
    """Six clients of 3 to 11 examples; two of them count steps instead of epochs."""
    jobs = []
    start = 0
    for client_id, size in enumerate((5, 11, 3, 7, 6, 4)):
        examples = np.arange(start, start + size, dtype=np.int64)
        start += size
        tokens = int(store.num_label_tokens[examples].sum())
        by_steps = client_id in (2, 5)
        jobs.append(
            ClientJob(
                client_id,
                examples,
                tokens,
                None if by_steps else 2,
                3 if by_steps else None,
                tokens,
                local[client_id % len(local)],
            )
        )
    return tuple(jobs)


def starts_for(
    model: torch.nn.Module, target_modules: tuple[str, ...], dtype: torch.dtype
) -> list[AdapterState]:
    targets = find_targets(model, target_modules)
    return [random_adapter(targets, rank, dtype, seed) for seed, rank in enumerate(RANKS)]


def train_packed(
    model: torch.nn.Module, target_modules: tuple[str, ...], jobs: tuple[ClientJob, ...],
    starts: list[AdapterState], store: Any, max_slots: int = 3, max_tokens: int = 10_000, drop: bool = False,
) -> list[ClientUpdate]:  # fmt: skip
    stacked = StackedModel(model, find_targets(model, target_modules), CPU)
    trainer = PackedTrainer(stacked, store, max_slots, max_tokens, drop, process_rank=0)
    return trainer.train(Pack(0, jobs), [ClientPlan(start) for start in starts], round_index=1)


def train_sequential(
    model: torch.nn.Module, target_modules: tuple[str, ...], jobs: tuple[ClientJob, ...],
    starts: list[AdapterState], store: Any,
) -> list[ClientUpdate]:  # fmt: skip
    adapted = AdaptedModel(model, find_targets(model, target_modules), CPU)
    plans = [ClientPlan(start) for start in starts]
    return SequentialTrainer(adapted, store, PAD, False, 0).train(Pack(0, jobs), plans, round_index=1)


def worst_difference(one: AdapterState, other: AdapterState) -> float:
    return max(
        max(float((one[m].A - other[m].A).abs().max()), float((one[m].B - other[m].B).abs().max()))
        for m in one
    )


def assert_same(packed: list[ClientUpdate], alone: list[ClientUpdate], tolerance: float) -> None:
    assert [update.report.client_id for update in packed] == [update.report.client_id for update in alone]
    for mine, theirs in zip(packed, alone, strict=True):
        assert mine.report.steps == theirs.report.steps
        assert mine.report.trained_tokens == theirs.report.trained_tokens
        assert mine.report.train_loss_mean == pytest.approx(
            theirs.report.train_loss_mean, abs=max(tolerance, 1e-9)
        )
        assert worst_difference(mine.adapter, theirs.adapter) <= tolerance


@pytest.fixture(scope="module")
def store() -> Any:
    return make_store(random_texts(40, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_client_ends_where_it_would_alone(family, store):
    """Ragged ranks, own steps, schedules, batch sizes, weight decay and clipping, refilled slots."""
    build, target_modules = FAMILIES[family]
    starts = starts_for(build(torch.float64), target_modules, torch.float64)
    jobs = clients(store)
    alone = train_sequential(build(torch.float64), target_modules, jobs, starts, store)
    packed = train_packed(build(torch.float64), target_modules, jobs, starts, store)
    moved = max(worst_difference(update.adapter, start) for update, start in zip(alone, starts, strict=True))
    assert moved > 1e-2
    assert_same(packed, alone, 1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.3},
        {"base_dropout": True},
        {"lora_dropout": 0.2, "base_dropout": True, "accumulation": 2},
        {"optimizer": OptimizerSettings("sgd", lr=0.1, momentum=0.9, weight_decay=0.01)},
        {"accumulation": 3, "batch_size": 1},
    ],
    ids=["lora-dropout", "base-dropout", "both-dropouts", "sgd", "accumulation"],
)
def test_dropout_sgd_and_accumulation(changes, store):
    local = tuple(replace(settings, **changes) for settings in DIFFERENT)
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = clients(store, local)
    alone = train_sequential(tiny_opt(torch.float64, dropout=0.2), TWO, jobs, starts, store)
    packed = train_packed(tiny_opt(torch.float64, dropout=0.2), TWO, jobs, starts, store)
    assert_same(packed, alone, 1e-9)


@pytest.mark.parametrize(("max_slots", "max_tokens"), [(1, 10_000), (6, 10_000), (4, 40), (6, 1)])
def test_slots_and_token_budget_change_nothing_but_rounding(max_slots, max_tokens, store):
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    local = tuple(replace(settings, lora_dropout=0.3) for settings in DIFFERENT)
    jobs = clients(store, local)
    alone = train_sequential(tiny_opt(torch.float64), TWO, jobs, starts, store)
    assert_same(
        train_packed(tiny_opt(torch.float64), TWO, jobs, starts, store, max_slots, max_tokens), alone, 1e-9
    )


def test_fp32_losses(store):
    starts = starts_for(tiny_opt(), TWO, torch.float32)
    jobs = clients(store)
    alone = train_sequential(tiny_opt(), TWO, jobs, starts, store)
    packed = train_packed(tiny_opt(), TWO, jobs, starts, store)
    for mine, theirs in zip(packed, alone, strict=True):
        assert mine.report.train_loss_mean == pytest.approx(theirs.report.train_loss_mean, abs=1e-5)
        assert mine.report.train_loss_last == pytest.approx(theirs.report.train_loss_last, abs=1e-5)


def test_neighbours_do_not_matter(store):
    """Other neighbours, another order, none at all: the same client to 1e-9 after all its steps."""
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    jobs = clients(store)

    def of_client_zero(members: list[int]) -> AdapterState:
        updates = train_packed(
            tiny_opt(torch.float64), TWO, tuple(jobs[k] for k in members), [starts[k] for k in members], store
        )
        return next(update.adapter for update in updates if update.report.client_id == 0)

    together = of_client_zero([0, 1, 2, 3, 4, 5])
    for members in ([5, 4, 3, 2, 1, 0], [0, 3], [0]):
        assert worst_difference(together, of_client_zero(members)) <= 1e-9


def test_one_clients_infinity_reaches_nobody(store):
    """Policy `drop`: the client is left out, all others end as if it had never been there."""
    starts = starts_for(tiny_opt(torch.float64), TWO, torch.float64)
    wild = replace(ADAMW, optimizer=OptimizerSettings(lr=1e300), max_grad_norm=None, schedule="constant")
    jobs = clients(store)
    sick = (*jobs[:3], replace(jobs[3], settings=wild), *jobs[4:])
    healthy = train_packed(tiny_opt(torch.float64), TWO, jobs, starts, store)
    left = train_packed(tiny_opt(torch.float64), TWO, sick, starts, store, drop=True)
    assert [update.report.client_id for update in left] == [0, 1, 2, 4, 5]
    by_id = {update.report.client_id: update for update in healthy}
    for update in left:
        assert worst_difference(update.adapter, by_id[update.report.client_id].adapter) <= 1e-9
    with pytest.raises(TrainingError, match="client 3 must stay finite"):
        train_packed(tiny_opt(torch.float64), TWO, sick, starts, store)


def test_the_base_is_given_back_as_it_was(store):
    model = tiny_opt()
    ids = torch.randint(3, VOCABULARY, (2, 7))
    before = model(input_ids=ids).logits
    stacked = StackedModel(model, find_targets(model, TWO), CPU)
    stacked.unwrap()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("StackedLinear" in type(module).__name__ for module in model.modules())


@pytest.mark.parametrize("family", ["opt-all", "llama"])
def test_gradient_checkpointing_changes_nothing(family, store):
    build, target_modules = FAMILIES[family]
    starts = starts_for(build(torch.float64), target_modules, torch.float64)
    jobs = clients(store, tuple(replace(settings, lora_dropout=0.3) for settings in DIFFERENT))
    kept = train_packed(build(torch.float64), target_modules, jobs, starts, store)
    model = build(torch.float64)
    stacked = StackedModel(model, find_targets(model, target_modules), CPU, checkpoint_gradients=True)
    plans = [ClientPlan(start) for start in starts]
    again = PackedTrainer(stacked, store, 3, 10_000, False, process_rank=0).train(Pack(0, jobs), plans, 1)
    assert_same(again, kept, 1e-12)
    assert not model.training
    stacked.unwrap()


def test_grouped_products_equal_the_sequential_trainer(store, monkeypatch):
    """Equal ranks that are multiples of 4, too many for one dense product, in float32."""
    seen = []

    def watched(*arguments):
        planned = plan_products(*arguments)
        seen.extend(type(product).__name__ for product in planned.values())
        return planned

    monkeypatch.setattr("fedsim.training.packed.plan_products", watched)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    targets = find_targets(tiny_opt(**sizes), FAMILIES["opt-all"][1])
    local = replace(ADAMW, lora_dropout=0.3, optimizer=OptimizerSettings("sgd", lr=1.0))
    starts = [random_adapter(targets, 16, torch.float32, seed) for seed in range(6)]
    jobs = clients(store, (local,))
    alone = train_sequential(tiny_opt(**sizes), FAMILIES["opt-all"][1], jobs, starts, store)
    packed = train_packed(tiny_opt(**sizes), FAMILIES["opt-all"][1], jobs, starts, store, max_slots=6)
    assert "GroupedProduct" in seen
    assert_same(packed, alone, 1e-5)
    assert max(worst_difference(u.adapter, s) for u, s in zip(packed, starts, strict=True)) > 1e-2
