"""SCAFFOLD on quadratic problems, where plain gradient descent is known in closed form step by step."""

import numpy as np
import pytest
import torch

from fedsim.aggregation.scaffold import Scaffold
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import Client
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, make_federation, make_report, random_adapter, stream

NUM_CLIENTS = 6
RANKS = dict.fromkeys(TARGETS, 4)
LRS = [0.05, 0.1, 0.02, 0.08, 0.1, 0.05, 0.1, 0.1]
"""Learning rates of one local run: a schedule, so that the sum and not the mean times the steps counts."""

# client k has the loss 0.5 * h_k * ||x - t_k||^2 over all values of A and B
CURVATURES = [0.5, 1.0, 2.0, 4.0, 0.8, 1.5]
MINIMA = {k: random_adapter(100 + k) for k in range(NUM_CLIENTS)}


def each_factor(function, *adapters):
    """An adapter of `function(values of one factor in each adapter)`."""
    return AdapterState(
        {
            m: LoraFactors(
                function(*(a[m].A for a in adapters)), function(*(a[m].B for a in adapters)), f.scaling
            )
            for m, f in adapters[0].items()
        }
    )


def local_run(client_id, plan, steps=LRS):
    """Plain gradient descent with the plan's correction."""
    live = plan.start
    for lr in steps:
        live = each_factor(
            lambda y, t, c, lr=lr: y - lr * (CURVATURES[client_id] * (y - t) + c),
            live,
            MINIMA[client_id],
            plan.correction,
        )
    return live


def one_round(strategy, state, cohort, kept, steps=LRS):
    uploads, reports = [], []
    for k in cohort:
        client = Client(k, RANKS, kept.get(k, {}))
        plan = strategy.plan(state, client, strategy.download(state, RANKS))
        report = make_report(k, num_examples=10 + k, lr_sum=sum(steps))
        upload = strategy.upload(state, client, plan, local_run(k, plan, steps), report)
        kept[k] = upload.client_state
        uploads.append(upload.adapter)
        reports.append(report)
    return strategy.aggregate(state, reports, stream(uploads)).state


def flat(adapter):
    return np.concatenate([t.numpy().ravel() for f in adapter.values() for t in (f.A, f.B)])


def cohort_of(round_index, size):
    return sorted(np.random.default_rng(round_index).choice(NUM_CLIENTS, size, replace=False).tolist())


def numpy_scaffold(start, rounds, size, steps=LRS):
    """Algorithm 1 of arXiv 1910.06378, option II, one vector for all parameters."""
    x, c = flat(start), np.zeros_like(flat(start))
    own = [np.zeros_like(x) for _ in range(NUM_CLIENTS)]
    for r in range(rounds):
        moves, changes = [], []
        for k in cohort_of(r, size):
            y = x.copy()
            for lr in steps:
                y = y - lr * (CURVATURES[k] * (y - flat(MINIMA[k])) - own[k] + c)
            new = own[k] - c + (x - y) / sum(steps)
            moves.append(y - x)
            changes.append(new - own[k])
            own[k] = new
        x = x + np.mean(moves, axis=0)
        c = c + size / NUM_CLIENTS * np.mean(changes, axis=0)
    return x, c, own


def optimum():
    return sum(h * flat(MINIMA[k]) for k, h in enumerate(CURVATURES)) / sum(CURVATURES)


@pytest.mark.parametrize("size", [1, 3, NUM_CLIENTS])
def test_equals_the_published_algorithm(size):
    strategy = Scaffold(make_federation(num_clients=NUM_CLIENTS))
    state, kept = ServerState(0, random_adapter(0)), {}
    for r in range(12):
        state = one_round(strategy, state, cohort_of(r, size), kept)
    x, c, own = numpy_scaffold(random_adapter(0), 12, size)
    np.testing.assert_allclose(flat(state.adapter), x, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(flat(state.strategy_state["control"]), c, rtol=1e-9, atol=1e-11)
    for k, tensors in kept.items():
        mine = np.concatenate([tensors[f"control|{m}|{s}"].numpy().ravel() for m in TARGETS for s in "AB"])
        np.testing.assert_allclose(mine, own[k], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("size", "rounds", "error"), [(2, 100, 2e-2), (NUM_CLIENTS, 110, 1e-5)])
def test_reaches_the_optimum_where_fedavg_does_not(size, rounds, error):
    """Many local steps on unlike clients: without control variates, the fixed point is another one."""
    steps = [0.1] * 30
    strategy = Scaffold(make_federation(num_clients=NUM_CLIENTS))
    state, kept = ServerState(0, random_adapter(0)), {}
    plain = flat(state.adapter)
    for r in range(rounds):
        state = one_round(strategy, state, cohort_of(r, size), kept, steps)
        ends = []
        for k in range(NUM_CLIENTS):
            shrink = (1 - 0.1 * CURVATURES[k]) ** 30
            ends.append(flat(MINIMA[k]) + shrink * (plain - flat(MINIMA[k])))
        plain = np.mean(ends, axis=0)
    scale = np.linalg.norm(optimum())
    assert np.linalg.norm(flat(state.adapter) - optimum()) < error * scale
    assert np.linalg.norm(plain - optimum()) > 0.1 * scale


def test_controls_become_the_clients_gradients_and_their_mean():
    """At the optimum c_k is the gradient of client k, and c, their mean, is zero."""
    strategy = Scaffold(make_federation(num_clients=NUM_CLIENTS))
    state, kept = ServerState(0, random_adapter(0)), {}
    for _ in range(80):
        state = one_round(strategy, state, range(NUM_CLIENTS), kept)
    np.testing.assert_allclose(flat(state.strategy_state["control"]), 0, atol=1e-8)
    for k in range(NUM_CLIENTS):
        gradient = CURVATURES[k] * (optimum() - flat(MINIMA[k]))
        mine = np.concatenate([kept[k][f"control|{m}|{s}"].numpy().ravel() for m in TARGETS for s in "AB"])
        np.testing.assert_allclose(mine, gradient, atol=1e-6)


def test_a_first_round_is_plain_averaging():
    strategy, state = Scaffold(make_federation()), ServerState(0, random_adapter(0))
    plan = strategy.plan(state, Client(0, RANKS), strategy.download(state, RANKS))
    assert not flat(plan.correction).any()
    assert plan.downlink_bytes == 2 * state.adapter.num_bytes
    trained = [random_adapter(k) for k in (1, 2, 3)]
    reports = [make_report(k, 10**k) for k in range(3)]
    after = strategy.aggregate(state, reports, stream(trained)).state
    np.testing.assert_allclose(flat(after.adapter), np.mean([flat(a) for a in trained], axis=0), rtol=1e-12)


def test_contrast_the_mean_rate_instead_of_the_sum_is_another_control():
    strategy, state = Scaffold(make_federation(num_clients=NUM_CLIENTS)), ServerState(0, random_adapter(0))
    after = one_round(strategy, state, range(NUM_CLIENTS), {})
    gradient = np.mean(
        [h * (flat(state.adapter) - flat(MINIMA[k])) for k, h in enumerate(CURVATURES)], axis=0
    )
    control = flat(after.strategy_state["control"])
    # the control is a mean of gradients along the way, so of their size and not of eight times it
    assert 0.3 < np.linalg.norm(control) / np.linalg.norm(gradient) < 1


def test_a_client_that_has_not_moved_keeps_its_control():
    strategy, kept = Scaffold(make_federation(num_clients=NUM_CLIENTS)), {}
    state = one_round(strategy, ServerState(0, random_adapter(0)), range(NUM_CLIENTS), kept)
    before = dict(kept[2])
    after = one_round(strategy, state, [2], kept, steps=[0.0, 0.0])
    assert all(torch.equal(kept[2][name], tensor) for name, tensor in before.items())
    assert after.adapter.equal(state.adapter)
    assert after.strategy_state["control"].equal(state.strategy_state["control"])


def test_other_ranks_and_scalings_are_refused():
    strategy, state = Scaffold(make_federation()), ServerState(0, random_adapter(0))
    with pytest.raises(AggregationError, match="one LoRA rank and scaling"):
        strategy.aggregate(state, [make_report(0)], stream([random_adapter(1, 3)]))
