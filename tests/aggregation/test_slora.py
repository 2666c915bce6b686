"""SLoRA: stage 1 against dense numpy averages, the change of stages against numpy's SVD, and the likely mistakes."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedsim.aggregation.fedavg import FedAvg
from fedsim.aggregation.flexlora import FlexLora
from fedsim.aggregation.hetlora import HetLora, HetLoraNaive
from fedsim.aggregation.slora import SPARSE, SLoRA, draw_part, draw_positions
from fedsim.config.loader import load_config
from fedsim.data.batches import collate
from fedsim.errors import ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import initial_adapter, initial_down
from fedsim.lora.plan import BOTH, ONLY_A, ONLY_B, Client, absent
from fedsim.lora.state import ServerState
from fedsim.models.adapted import AdaptedModel
from fedsim.models.targets import find_targets
from fedsim.server.build_clients import build_tiers
from fedsim.server.build_strategy import build_federated_strategy
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import LocalSettings, OptimizerSettings
from tests.cohorts import TARGETS, make_federation, make_report, one_round, stream
from tests.helpers import make_store, random_texts, tiny_opt

COUNTS = {0: 10, 3: 30, 5: 5}
DENSITY = 0.3
WIDE, TALL = TARGETS
"""One module with more in than out features, and one with fewer."""


def make(
    rounds: int = 3, density: float = DENSITY, max_rank: int = 4, targets=TARGETS, then=FedAvg, **changes
):
    federation = make_federation(max_rank, targets, **changes)
    strategy = SLoRA(federation, rounds, density, then(federation))
    start = initial_adapter(targets, federation.max_ranks, federation.scaling, 3, torch.float64)
    return strategy, ServerState(0, start)


def change_of(client_id: int, round_index: int, module: str, targets=TARGETS) -> np.ndarray:
    """What a client's data would do to the dense weight of a module if all of it trained."""
    i, o = targets[module]
    return np.random.default_rng([client_id, round_index, len(module)]).normal(size=(o, i))


def train(plan, client_id: int, round_index: int, targets=TARGETS) -> AdapterState:
    """A trainer that keeps to the plan: values move where the mask says, by the dense change of the client."""
    modules = {}
    for module, start in plan.start.items():
        change = torch.from_numpy(change_of(client_id, round_index, module, targets)).to(start.A.dtype)
        mask, sides = plan.mask[module], {}
        for side in "AB":
            value = getattr(start, side)
            trains = getattr(mask, side) if side in plan.trains else torch.zeros_like(value, dtype=torch.bool)
            sides[side] = torch.where(trains, value + change, value) if trains.any() else value
        modules[module] = LoraFactors(sides["A"], sides["B"], start.scaling)
    return AdapterState(modules)


def sparse_round(strategy: SLoRA, state: ServerState, modules=None, targets=TARGETS):
    uploads, plans = [], {}
    for client_id in COUNTS:
        client = Client(client_id, strategy.federation.max_ranks)
        plan = strategy.plan(state, client, strategy.download(state, client.lora_ranks))
        trained = train(plan, client_id, state.round_index, targets)
        upload = strategy.upload(state, client, plan, trained, make_report(client_id)).adapter
        sent = {
            m: LoraFactors(f.A, absent(tuple(f.B.shape), f.B.dtype, f.B.device), f.scaling)
            for m, f in upload.items()
        }
        uploads.append(AdapterState(sent))
        plans[client_id] = plan
    reports = [make_report(k, n) for k, n in COUNTS.items()]
    return strategy.aggregate(state, reports, stream(uploads, modules)), plans


def chosen(strategy: SLoRA, module: str, targets=TARGETS) -> np.ndarray:
    i, o = targets[module]
    mask = np.zeros(o * i, dtype=bool)
    mask[strategy.positions[module].numpy()] = True
    return mask.reshape(o, i)


def by_numpy(strategy: SLoRA, rounds: int, module: str, targets=TARGETS) -> np.ndarray:
    """Stage 1 written densely: the mean of masked weights, round after round."""
    delta = 0.0
    for t in range(rounds):
        total = sum(COUNTS.values())
        delta = delta + sum(
            n / total * chosen(strategy, module, targets) * change_of(k, t, module, targets)
            for k, n in COUNTS.items()
        )
    return delta


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_stage_1_is_the_mean_of_masked_dense_weights():
    strategy, state = make()
    for t in range(2):
        state = sparse_round(strategy, state)[0].state
        assert state.round_index == t + 1
        for module in TARGETS:
            weight = strategy.export(state)[module].delta_weight()
            np.testing.assert_allclose(weight, by_numpy(strategy, t + 1, module), rtol=1e-12, atol=1e-13)
            assert torch.count_nonzero(weight) == round(DENSITY * weight.numel())


def test_a_full_weight_is_the_identity_and_a_matrix_of_which_chosen_values_train():
    strategy, state = make()
    state = sparse_round(strategy, state)[0].state
    client = Client(0, strategy.federation.max_ranks)
    received = strategy.download(state, client.lora_ranks)
    plan = strategy.plan(state, client, received)

    assert plan.start is received
    assert plan.trains == BOTH
    for module, dense, identity in ((WIDE, "A", "B"), (TALL, "B", "A")):
        i, o = TARGETS[module]
        factors, mask = received[module], plan.mask[module]
        assert factors.scaling == 1.0
        assert torch.equal(getattr(factors, identity), torch.eye(min(i, o), dtype=torch.float64))
        assert getattr(factors, dense).shape == (o, i)
        assert not getattr(mask, identity).any()
        assert np.array_equal(getattr(mask, dense).numpy(), chosen(strategy, module))
    # modules of one orientation need no gradient of the other side
    for targets, side in (({"x": (5, 3)}, ONLY_A), ({"x": (3, 5)}, ONLY_B), ({"x": (4, 4)}, ONLY_A)):
        other, fresh = make(targets=targets, max_rank=2)
        received = other.download(fresh, other.federation.max_ranks)
        assert other.plan(fresh, Client(0, other.federation.max_ranks), received).trains == side


def test_only_the_values_travel():
    strategy, state = make()
    num_values = {m: round(DENSITY * i * o) for m, (i, o) in TARGETS.items()}
    result, plans = sparse_round(strategy, state)
    client, plan = Client(0, strategy.federation.max_ranks), plans[0]
    upload = strategy.upload(state, client, plan, plan.start, make_report(0))

    assert strategy.sends(state) == ONLY_A
    assert {m: tuple(f.A.shape) for m, f in upload.adapter.items()} == {
        m: (1, n) for m, n in num_values.items()
    }
    assert plan.uplink_bytes == 8 * sum(num_values.values())
    assert plan.downlink_bytes == 8 * sum(num_values.values())
    assert result.state.strategy_state[SPARSE].num_parameters == sum(num_values.values()) + len(num_values)
    assert result.state.adapter is state.adapter


def test_the_mask_is_common_to_clients_and_rounds_and_follows_from_the_seed():
    strategy, state = make()
    first = sparse_round(strategy, state)
    second = sparse_round(strategy, first[0].state)
    masks = [plan.mask for _, plans in (first, second) for plan in plans.values()]
    assert all(mask.equal(masks[0]) for mask in masks)
    assert all(torch.equal(strategy.positions[m], make(density=DENSITY)[0].positions[m]) for m in TARGETS)
    assert not torch.equal(strategy.positions[WIDE], make(seed=4)[0].positions[WIDE])
    # a module's mask does not depend on the others
    alone = make(targets={TALL: TARGETS[TALL]})[0]
    assert torch.equal(alone.positions[TALL], strategy.positions[TALL])


@pytest.mark.parametrize(
    ("num_weights", "density", "count"),
    [(100, 0.25, 25), (100, 1e-6, 1), (7, 1.0, 7), (4_000_000, 0.0012, 4800), (1000, 0.0246, 25)],
)
def test_positions_are_distinct_sorted_and_of_the_right_number(num_weights, density, count):
    positions = draw_positions("x", num_weights, density, 0)
    assert positions.dtype == torch.int64
    assert positions.numel() == count
    assert bool((positions.diff() > 0).all())
    assert 0 <= int(positions[0]) <= int(positions[-1]) < num_weights


def test_positions_are_uniform():
    hits = np.zeros(40)
    for seed in range(2000):
        hits[draw_positions("x", 40, 0.25, seed).numpy()] += 1
    # 500 expected each, with a standard deviation of 19
    assert hits.min() > 410
    assert hits.max() < 590


@pytest.mark.parametrize("max_rank", [1, 4, 9])
def test_stage_2_starts_from_the_svd_of_stage_1_for_one_rank(max_rank):
    strategy, state = make(max_rank=max_rank)
    for _ in range(3):
        result, _ = sparse_round(strategy, state)
        state = result.state

    assert SPARSE not in state.strategy_state
    assert state.base_update is None
    for module in TARGETS:
        delta = by_numpy(strategy, 3, module)
        factors = strategy.download(state, strategy.federation.max_ranks)[module]
        assert factors.rank == max_rank
        assert factors.scaling == 16 / max_rank
        np.testing.assert_allclose(factors.delta_weight(), best(delta, max_rank), rtol=1e-9, atol=1e-11)
        share = np.linalg.norm(best(delta, max_rank)) ** 2 / np.linalg.norm(delta) ** 2
        assert result.by_module[module]["slora/energy_kept"] == pytest.approx(share, rel=1e-9)
        # A = V_r^T, and all singular values in B: the published split
        np.testing.assert_allclose(factors.A @ factors.A.mT, np.eye(max_rank), atol=1e-12)
        # contrast: without alpha / r it is another matrix
        assert not np.allclose(factors.B @ factors.A, best(delta, max_rank), rtol=1e-3)
    assert strategy.export(state).equal(state.adapter)


@pytest.mark.parametrize("then", [FlexLora, HetLora, HetLoraNaive])
def test_stage_2_starts_from_the_svd_of_stage_1_for_mixed_ranks(then):
    strategy, state = make(max_rank=6, then=then)
    assert strategy.traits.mixed_ranks
    for _ in range(3):
        state = sparse_round(strategy, state)[0].state
    for ranks in ({WIDE: 1, TALL: 6}, {WIDE: 3, TALL: 2}):
        received = strategy.download(state, ranks)
        start = strategy.plan(state, Client(0, ranks), received).start
        assert start.equal(received), "what is trained is what stage 1 has learned"
        for module, rank in ranks.items():
            assert received[module].rank == rank
            assert received[module].scaling == 16 / rank
            np.testing.assert_allclose(
                received[module].delta_weight(),
                best(by_numpy(strategy, 3, module), rank),
                rtol=1e-9,
                atol=1e-11,
            )


def test_stage_2_is_the_other_strategy():
    strategy, state = make(rounds=1)
    state = sparse_round(strategy, state)[0].state
    inner = strategy.then
    client = Client(0, strategy.federation.max_ranks)
    received = strategy.download(state, client.lora_ranks)
    plan = strategy.plan(state, client, received)
    assert plan == inner.plan(state, client, received)
    trained = plan.start.map(lambda factor: factor + 1)
    assert strategy.upload(state, client, plan, trained, make_report(0)).adapter is trained
    assert strategy.sends(state) == BOTH
    after = strategy.aggregate(state, [make_report(0)], stream([trained])).state
    assert after.adapter.equal(trained)
    assert after.round_index == 2


def test_a_mixed_stage_2_averages_products():
    strategy, state = make(rounds=1, max_rank=6, then=FlexLora)
    state = sparse_round(strategy, state)[0].state
    ranks = {0: {WIDE: 1, TALL: 6}, 1: {WIDE: 3, TALL: 2}}
    after = one_round(strategy, state, ranks, num_examples={0: 10, 1: 30}).state
    assert after.round_index == 2
    for module in TARGETS:
        delta = by_numpy(strategy, 1, module)
        mean = 0.25 * best(delta, ranks[0][module]) + 0.75 * best(delta, ranks[1][module])
        np.testing.assert_allclose(after.adapter[module].delta_weight(), mean, rtol=1e-9, atol=1e-11)


def test_ranks_beyond_that_of_the_delta_are_filled_with_fresh_rows():
    """A delta of one weight has rank 1; one of all weights has no more than the smaller side."""
    for density, max_rank in ((0.001, 4), (1.0, 13)):
        strategy, state = make(rounds=1, density=density, max_rank=4)
        federation = make_federation(max_rank)
        strategy = replace(strategy, federation=federation)
        state = sparse_round(strategy, state)[0].state
        for module, (i, o) in TARGETS.items():
            factors = state.adapter[module]
            rank = 1 if density < 1 else min(i, o)
            np.testing.assert_allclose(
                factors.delta_weight(), by_numpy(strategy, 1, module), rtol=1e-9, atol=1e-11
            )
            assert factors.rank == max_rank
            assert torch.count_nonzero(factors.B[:, rank:]) == 0
            # a zero row of A beside a zero column of B could never learn
            assert torch.equal(factors.A[rank:], initial_down(module, max_rank, i, 3)[rank:])


def test_stage_1_that_learned_nothing_gives_a_fresh_adapter():
    strategy, state = make(rounds=1)
    zero = AdapterState(
        {
            m: LoraFactors(torch.zeros(1, p.numel()).double(), torch.ones(1, 1).double(), 1.0)
            for m, p in strategy.positions.items()
        }
    )
    result = strategy.aggregate(state, [make_report(0)], stream([zero]))
    assert result.state.adapter.equal(state.adapter)
    assert {figures["slora/energy_kept"] for figures in result.by_module.values()} == {1.0}


def test_rounds_without_clients_change_nothing_but_stages():
    strategy, state = make(rounds=2)
    assert strategy.traits.takes_empty_cohorts
    nobody = [(m, ()) for m in TARGETS]
    idle = strategy.aggregate(state, [], iter(nobody)).state
    assert strategy.export(idle).equal(strategy.export(state))
    first = sparse_round(strategy, state)[0].state
    switched = strategy.aggregate(first, [], iter(nobody)).state
    assert switched.round_index == 2
    assert SPARSE not in switched.strategy_state
    for module, factors in switched.adapter.items():
        np.testing.assert_allclose(
            factors.delta_weight(), best(by_numpy(strategy, 1, module), 4), rtol=1e-9, atol=1e-11
        )
    later = strategy.aggregate(switched, [], iter(nobody)).state
    assert later.round_index == 3
    assert later.adapter is switched.adapter


@pytest.mark.parametrize("rounds", [1, 2])
def test_modules_one_by_one_give_the_same_bits(rounds):
    strategy, state = make(rounds=rounds)
    whole = sparse_round(strategy, state)[0].state.adapters()
    for module in TARGETS:
        part = sparse_round(strategy, state, [module])[0].state.adapters()
        assert part.keys() == whole.keys()
        for name, adapter in whole.items():
            assert adapter[module].A.equal(part[name][module].A)
            assert adapter[module].B.equal(part[name][module].B)


def test_a_resumed_run_has_the_same_bits():
    strategy, state = make()
    half = sparse_round(strategy, state)[0].state
    copied = half.with_adapters({n: a.map(torch.clone) for n, a in half.adapters().items()})
    again = make()[0]
    for _ in range(2):
        half, copied = sparse_round(strategy, half)[0].state, sparse_round(again, copied)[0].state
    assert half.adapter.equal(copied.adapter)


def test_float32_stays_float32():
    strategy, state = make(rounds=2)
    state = ServerState(0, state.adapter.to("cpu", torch.float32))
    for _ in range(2):
        state = sparse_round(strategy, state)[0].state
        assert {f.A.dtype for a in state.adapters().values() for f in a.values()} == {torch.float32}
    for module in TARGETS:
        np.testing.assert_allclose(
            state.adapter[module].delta_weight(), best(by_numpy(strategy, 2, module), 4), rtol=1e-4, atol=1e-5
        )


def test_a_client_of_stage_1_is_plain_masked_fine_tuning_of_the_weights():
    """Autograd on the weights themselves, gradients masked, against the trainer with factors of full rank."""
    store = make_store(random_texts(20, seed=1))
    base = tiny_opt(torch.float64)
    targets = find_targets(base, ("q_proj", "fc1", "fc2"))
    strategy, state = make(rounds=2, density=0.2, max_rank=2, targets=targets)
    local = LocalSettings(4, 1, 1.0, OptimizerSettings(lr=1e-2), "constant", 0, 0.0, False, 3)
    job = ClientJob(5, np.arange(12), 1, 2, None, 1, local)

    client = Client(5, strategy.federation.max_ranks)
    plan = strategy.plan(state, client, strategy.download(state, client.lora_ranks))
    trainer = SequentialTrainer(AdaptedModel(base, targets, torch.device("cpu")), store, 1, False, 0)
    [update] = trainer.train(Pack(0, (job,)), [plan], 0)
    upload = strategy.upload(state, client, plan, update.adapter, update.report)
    after = strategy.aggregate(state, [update.report], stream([upload.adapter])).state

    plain = tiny_opt(torch.float64).requires_grad_(False)
    weights = [plain.get_submodule(module).weight.requires_grad_() for module in targets]
    masks = [torch.from_numpy(chosen(strategy, module, targets)) for module in targets]
    loaded = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for [examples] in job.batches(0):
        batch = collate(store, examples, 1)
        logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad *= mask
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    assert update.report.trained_parameters == sum(int(mask.sum()) for mask in masks)
    for module, weight, before in zip(targets, weights, loaded, strict=True):
        delta = strategy.export(after)[module].delta_weight()
        assert float(delta.abs().max()) > 1e-3, "the weights must have moved, or equality means nothing"
        torch.testing.assert_close(delta, weight.detach() - before, rtol=0, atol=1e-12)


def test_contrast_a_mask_for_each_client_thins_out_the_mean():
    """As in published code: the mean is denser than one update, and each value in it has fewer clients behind it."""
    strategy, state = make(rounds=2, density=0.1)
    module = WIDE
    i, o = TARGETS[module]
    common = strategy.export(sparse_round(strategy, state)[0].state)[module].delta_weight()
    mean = np.zeros((o, i))
    for client_id, count in COUNTS.items():
        own = np.zeros(o * i, dtype=bool)
        own[draw_positions(module, o * i, 0.1, 1000 + client_id).numpy()] = True
        mean += count / 45 * own.reshape(o, i) * change_of(client_id, 0, module)
    assert torch.count_nonzero(common) == round(0.1 * o * i)
    assert np.count_nonzero(mean) > 2 * round(0.1 * o * i)
    assert not np.allclose(common, mean)


def by_tier(densities=(0.1, 0.3), **changes):
    """Ten clients of which those of odd numbers have the larger density."""
    strategy, state = make(**changes)
    return replace(strategy, client_densities=tuple(densities[k % 2] for k in range(10))), state


def part_of(strategy: SLoRA, client_id: int, module: str) -> np.ndarray:
    i, o = TARGETS[module]
    mask = np.zeros(o * i, dtype=bool)
    part = strategy.parts[strategy.client_densities[client_id]][module].numpy()
    mask[strategy.positions[module].numpy()[part]] = True
    return mask.reshape(o, i)


def test_masks_of_smaller_densities_lie_within_those_of_larger_ones():
    densities = (0.02, 0.1, 0.3, 1.0)
    strategy = replace(make()[0], client_densities=(*densities, *densities, 0.02, 0.1))
    for module, (i, o) in TARGETS.items():
        masks = [part_of(strategy, k, module) for k in range(4)]
        assert [int(mask.sum()) for mask in masks] == [max(1, round(d * i * o)) for d in densities]
        for smaller, larger in pairwise(masks):
            assert not (smaller & ~larger).any()
        assert np.array_equal(masks[0], part_of(strategy, 8, module)), "clients of a tier have one mask"
        assert not np.array_equal(
            masks[1], part_of(replace(strategy, federation=make_federation(seed=4)), 1, module)
        )
    # the largest mask is the one that a run of that density alone has
    largest = replace(strategy, client_densities=(0.02, *[0.3] * 9))
    assert all(torch.equal(largest.positions[m], make(density=0.3)[0].positions[m]) for m in TARGETS)


def test_which_weights_a_small_client_trains_is_drawn_uniformly():
    hits = np.zeros(40)
    for seed in range(2000):
        positions, part = draw_positions("x", 40, 0.5, seed), draw_part("x", 20, 40, 0.25, seed)
        hits[positions[part].numpy()] += 1
    # 500 expected each, with a standard deviation of 19
    assert hits.min() > 410
    assert hits.max() < 590


def test_clients_of_a_density_train_and_send_their_part_and_enter_the_mean_with_all():
    strategy, state = by_tier(rounds=3)
    before = state = sparse_round(strategy, state)[0].state
    result, plans = sparse_round(strategy, state)
    for client_id, plan in plans.items():
        for module, dense in ((WIDE, "A"), (TALL, "B")):
            mask = getattr(plan.mask[module], dense).numpy()
            assert np.array_equal(mask, part_of(strategy, client_id, module))
        sent = sum(part_of(strategy, client_id, module).sum() for module in TARGETS)
        assert plan.uplink_bytes == 8 * sent
        assert plan.downlink_bytes == 8 * sum(p.numel() for p in strategy.positions.values())
    for module in TARGETS:
        held = strategy.export(before)[module].delta_weight().numpy()
        moved = {k: part_of(strategy, k, module) * change_of(k, 1, module) for k in COUNTS}
        mean = held + sum(n / 45 * moved[k] for k, n in COUNTS.items())
        weight = strategy.export(result.state)[module].delta_weight()
        np.testing.assert_allclose(weight, mean, rtol=1e-12, atol=1e-13)
        # contrast: averaged over those who train a weight, the others' say in it would be lost
        shares = sum(n * part_of(strategy, k, module) for k, n in COUNTS.items())
        thinned = held + sum(n * moved[k] for k, n in COUNTS.items()) / np.maximum(shares, 1)
        assert not np.allclose(weight, thinned)


def test_stage_1_with_densities_by_client_reaches_stage_2():
    strategy, state = by_tier(rounds=2, max_rank=3, then=FlexLora)
    sums = dict.fromkeys(TARGETS, 0.0)
    for t in range(2):
        for module in TARGETS:
            sums[module] = sums[module] + sum(
                n / 45 * part_of(strategy, k, module) * change_of(k, t, module) for k, n in COUNTS.items()
            )
        state = sparse_round(strategy, state)[0].state
    for module, rank in ((WIDE, 2), (TALL, 3)):
        received = strategy.download(state, {WIDE: 2, TALL: 3})[module]
        np.testing.assert_allclose(received.delta_weight(), best(sums[module], rank), rtol=1e-9, atol=1e-11)


TYPES = "strategy.slora.tier_densities=[0.0012, 0.0246, 0.0822, 0.1222]"
DISTRIBUTED = ["strategy.name=slora", "strategy.slora.then=hetlora", "lora.rank_scale=0.05", TYPES]


@pytest.mark.parametrize("distribution", ["heavy_tail_light", "homogeneous"])
def test_densities_of_the_published_code_by_type(distribution):
    config = load_config(
        None, [*DISTRIBUTED, f"lora.distribution={distribution}", "strategy.hetlora.min_rank=2"]
    )
    targets = {"x.q_proj": (64, 64), "x.fc1": (64, 80)}
    tiers = build_tiers(config, targets, 200)
    strategy = build_federated_strategy(config, targets, tiers, 200)
    of_type = {"type 1": 0.0012, "type 2": 0.0246, "type 3": 0.0822, "type 4": 0.1222}
    expected = tuple(of_type[tiers.names[tier]] for tier in tiers.tier_of.tolist())
    assert strategy.client_densities == expected
    assert len(set(expected)) == (1 if distribution == "homogeneous" else 4)
    assert isinstance(strategy.then, HetLora)
    assert strategy.then.min_rank == 2
    count = round(max(expected) * 64 * 64)
    assert len(strategy.positions["x.q_proj"]) == count


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["strategy.name=slora", TYPES],
            "must be empty unless lora.tiers or lora.distribution names tiers, got",
        ),
        ([*DISTRIBUTED[:2], TYPES, "lora.distribution=by_size"], "must be empty unless lora.tiers or"),
        (
            ["strategy.name=slora", "lora.tiers=[{rank: 2}, {rank: 4}]", TYPES],
            "tier_densities must have 2 values, one for each tier of lora.tiers, got",
        ),
        (
            ["strategy.name=slora", "lora.distribution=uniform", "strategy.slora.tier_densities=[0.1]"],
            "tier_densities must have 4 values, one for each type of lora.distribution=uniform, got",
        ),
        (
            [*DISTRIBUTED, "lora.distribution=uniform", "strategy.slora.density=0.5"],
            "strategy.slora.density must stay at its default 0.0012 when strategy.slora.tier_densities is set",
        ),
        (
            ["strategy.name=slora", "strategy.hetlora.min_rank=2"],
            "strategy.hetlora.min_rank must stay at its default",
        ),
    ],
)
def test_densities_that_fit_no_tiers_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def test_each_client_must_have_a_density():
    with pytest.raises(ConfigError, match="10 clients must have a density each, or none of them, got 3"):
        replace(make()[0], client_densities=(0.1, 0.2, 0.3))


def test_traits_are_those_of_stage_2_but_nothing_may_be_wrapped_around():
    for then in (FlexLora, HetLora):
        strategy, _ = make(then=then)
        expected = replace(
            strategy.then.traits, reduce="stack", takes_empty_cohorts=True, uses_client_weights=True
        )
        assert strategy.traits == expected
    assert strategy.name == "slora"


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ((0, 0.1), r"slora\.rounds must be positive, got 0"),
        ((1, 0.0), r"slora\.density must be in \(0, 1\], got 0\.0"),
        ((1, 1.1), r"slora\.density must be in"),
    ],
)
def test_wrong_numbers_are_refused(values, rule):
    federation = make_federation()
    with pytest.raises(ConfigError, match=rule):
        SLoRA(federation, *values, FedAvg(federation))
