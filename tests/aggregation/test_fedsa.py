"""FedSA-LoRA: a shared A, and a B that never leaves its client."""

import numpy as np
import torch

from fedsim.aggregation.fedsa import FedSaLora
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import BOTH, ONLY_A, Client
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, learns_noise, make_federation, one_round

RANKS = dict.fromkeys(TARGETS, 4)
COUNTS = {0: 20, 3: 10, 9: 70}


def fresh_state():
    return ServerState(0, initial_adapter(TARGETS, RANKS, ScalingRule(16.0), 0, torch.float64))


def run(rounds, seeds=None, cohort=COUNTS):
    """Rounds with noise as training; `seeds` replaces the noise of single clients."""
    strategy, state, kept = FedSaLora(make_federation()), fresh_state(), {}
    for r in range(rounds):
        state = one_round(
            strategy,
            state,
            dict.fromkeys(cohort, RANKS),
            lambda k, start, r=r: learns_noise((seeds or {}).get(k, 0) + r)(k, start),
            COUNTS,
            kept,
        ).state
    return strategy, state, kept


def test_two_rounds_equal_a_plain_loop():
    strategy, state, kept = run(2)
    start = fresh_state().adapter
    for module in TARGETS:
        down = start[module].A.numpy()
        own = {k: np.zeros_like(start[module].B.numpy()) for k in COUNTS}
        for r in range(2):
            sent = {}
            for k in COUNTS:
                generator = torch.Generator().manual_seed(1000 * r + k)
                # the draw that `learns_noise` makes, module by module, A before B
                for m in TARGETS:
                    noise_a = torch.randn(start[m].A.shape, generator=generator, dtype=torch.float64).numpy()
                    noise_b = torch.randn(start[m].B.shape, generator=generator, dtype=torch.float64).numpy()
                    if m == module:
                        sent[k] = down + noise_a
                        own[k] = own[k] + noise_b
            down = sum(n / 100 * sent[k] for k, n in COUNTS.items())
        np.testing.assert_allclose(state.adapter[module].A, down, rtol=1e-12, atol=1e-12)
        for k in COUNTS:
            personal = strategy.export(state, Client(k, RANKS, kept[k]))[module]
            np.testing.assert_allclose(personal.A, down, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(personal.B, own[k], rtol=1e-12, atol=1e-12)


def test_a_clients_b_depends_on_that_client_alone():
    _, state, kept = run(3)
    _, other_state, other_kept = run(3, seeds={3: 50})
    for name in kept[9]:
        assert torch.equal(kept[9][name], other_kept[9][name])
        assert not torch.equal(kept[3][name], other_kept[3][name])
    for module in TARGETS:
        assert not torch.equal(state.adapter[module].A, other_state.adapter[module].A)


def test_first_b_is_zero_and_then_stays_while_the_client_is_away():
    strategy, state, kept = run(1)
    newcomer = strategy.plan(state, Client(4, RANKS), strategy.download(state, RANKS))
    assert not any(factors.B.any() for factors in newcomer.start.values())
    later = one_round(strategy, state, {4: RANKS}, learns_noise(9)).state
    again = strategy.plan(later, Client(3, RANKS, kept[3]), strategy.download(later, RANKS))
    for module, factors in again.start.items():
        assert torch.equal(factors.B, kept[3][f"own|{module}|B"])
        assert torch.equal(factors.A, later.adapter[module].A)


def test_both_train_and_only_a_travels():
    strategy, state, _ = run(1)
    plan = strategy.plan(state, Client(4, RANKS), strategy.download(state, RANKS))
    assert plan.trains == BOTH
    assert strategy.sends(state) == ONLY_A
    assert plan.downlink_bytes == sum(4 * i * 8 for i, _ in TARGETS.values())
    assert not strategy.traits.has_global_model


def test_the_global_export_adds_nothing():
    strategy, state, _ = run(2)
    for factors in strategy.export(state).values():
        assert not factors.delta_weight().any()


def test_nothing_learned_changes_nothing():
    strategy, state, kept = run(2)
    before = {k: dict(v) for k, v in kept.items()}
    after = one_round(strategy, state, dict.fromkeys(COUNTS, RANKS), client_states=kept).state
    for k in COUNTS:
        for name, tensor in before[k].items():
            assert torch.equal(kept[k][name], tensor)
    for module in TARGETS:
        torch.testing.assert_close(after.adapter[module].A, state.adapter[module].A, rtol=1e-12, atol=1e-12)


def test_one_client_is_local_training():
    strategy, state, kept = run(2, cohort={3: 10})
    local = fresh_state().adapter
    for r in range(2):
        local = learns_noise(r)(3, local)
    assert strategy.export(state, Client(3, RANKS, kept[3])).equal(local)
