"""Server optimizers: numpy loops over several rounds, one for each formula, and the likely mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.aggregation.fedavg import FedAvg
from fedsim.aggregation.local import LocalOnly
from fedsim.aggregation.server_optimizers import FIRST, SECOND, ServerOptimized, ServerOptimizerSettings
from fedsim.errors import ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import ONLY_A, ONLY_B
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, make_federation, make_report, one_round, random_adapter, stream

NAMES = ["fedavgm", "fedadam", "fedyogi", "fedadagrad"]
RANKS = {k: dict.fromkeys(TARGETS, 4) for k in range(3)}
COUNTS = {0: 10, 1: 30, 2: 5}
ROUNDS = 4


def learn(round_index: int):
    """Local training that pulls towards a point of its own, client by client and round by round."""

    def train(client_id: int, start: AdapterState) -> AdapterState:
        aim = random_adapter(100 * round_index + client_id)
        return AdapterState(
            {
                m: LoraFactors(
                    f.A + 0.3 * (aim[m].A.to(f.A) - f.A), f.B + 0.3 * (aim[m].B.to(f.B) - f.B), f.scaling
                )
                for m, f in start.items()
            }
        )

    return train


def run(strategy, start: ServerState, rounds: int = ROUNDS) -> ServerState:
    state = start
    for _ in range(rounds):
        state = one_round(strategy, state, RANKS, learn(state.round_index), COUNTS).state
    return state


def by_numpy(
    name: str, x: np.ndarray, module: str, side: str, settings: ServerOptimizerSettings
) -> np.ndarray:
    """The algorithms as printed, one value of the four at a time, without fedsim."""
    lr, b1, b2, tau = settings.lr, settings.beta1, settings.beta2, settings.tau
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for t in range(ROUNDS):
        mean = np.zeros_like(x)
        for k, n in COUNTS.items():
            aim = getattr(random_adapter(100 * t + k)[module], side).numpy()
            mean += n / 45 * (x + 0.3 * (aim - x))
        delta = mean - x
        if name == "fedavgm":
            m = b1 * m + delta
            x = x + lr * m
            continue
        m = b1 * m + (1 - b1) * delta
        if name == "fedadam":
            v = b2 * v + (1 - b2) * delta**2
        elif name == "fedyogi":
            v = v - (1 - b2) * delta**2 * np.sign(v - delta**2)
        else:
            v = v + delta**2
        x = x + lr * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{}, {"lr": 0.3, "beta1": 0.5, "beta2": 0.7, "tau": 0.1}])
def test_equals_the_printed_algorithm_over_rounds(name, changes):
    settings = ServerOptimizerSettings.published(name, **changes)
    start = ServerState(0, random_adapter(7))
    after = run(ServerOptimized(FedAvg(make_federation()), settings), start)

    assert after.round_index == ROUNDS
    for module, factors in after.adapter.items():
        assert factors.scaling == start.adapter[module].scaling
        for side in "AB":
            before = getattr(start.adapter[module], side).numpy()
            expected = by_numpy(name, before, module, side, settings)
            np.testing.assert_allclose(getattr(factors, side), expected, rtol=1e-12, atol=1e-13)


def test_published_numbers():
    assert ServerOptimizerSettings.published("fedavgm") == ServerOptimizerSettings(
        "fedavgm", 1.0, 0.9, 0.99, 1e-3
    )
    assert ServerOptimizerSettings.published("fedadam").lr == 1e-2
    assert ServerOptimizerSettings.published("fedyogi").beta1 == 0.9
    assert ServerOptimizerSettings.published("fedadagrad").beta1 == 0.0


def test_whole_steps_without_momentum_leave_the_wrapped_strategy_as_it_is():
    settings = ServerOptimizerSettings.published("fedavgm", beta1=0.0)
    start = ServerState(0, random_adapter(7, dtype=torch.float32))
    inner = FedAvg(make_federation())
    assert run(ServerOptimized(inner, settings), start).adapter.equal(run(inner, start).adapter)


def one_value(name: str, delta: float, settings: ServerOptimizerSettings) -> float:
    """What one round makes of x = 5 when the mean is 5 + delta."""
    pair = LoraFactors(torch.full((1, 1), 5.0).double(), torch.full((1, 1), 5.0).double(), 1.0)
    moved = pair.map(lambda factor: factor + delta)
    strategy = ServerOptimized(FedAvg(make_federation()), replace(settings, name=name))
    result = strategy.aggregate(
        ServerState(0, AdapterState({"x": pair})), [make_report(0)], stream([AdapterState({"x": moved})])
    )
    return float(result.state.adapter["x"].A)


@pytest.mark.parametrize("name", NAMES)
def test_first_step_by_hand_and_contrasts(name):
    settings = ServerOptimizerSettings.published(name)
    delta, tau = 0.02, settings.tau
    got = one_value(name, delta, settings)
    second = {
        "fedadam": 0.99 * tau**2 + 0.01 * delta**2,
        "fedyogi": tau**2 + 0.01 * delta**2,
        "fedadagrad": tau**2 + delta**2,
    }
    if name == "fedavgm":
        assert got == pytest.approx(5 + delta, rel=1e-14)
        return
    first = delta if name == "fedadagrad" else 0.1 * delta
    assert got == pytest.approx(5 + 1e-2 * first / (second[name] ** 0.5 + tau), rel=1e-14)

    # Adam as in deep-learning libraries divides the moments by 1 - beta^t: ten times the step here
    corrected = 5 + 1e-2 * delta / (delta + tau)
    assert name == "fedadagrad" or abs(got - corrected) > 3 * abs(got - 5) / 10
    # the mean itself, not its change, as the gradient
    assert abs(got - one_value_of_mean(delta, first / delta, second, name, tau)) > 1e-4
    # v from 0, as if tau were only a guard against division by 0
    no_start = 5 + 1e-2 * first / ((second[name] - tau**2 * (0.99 if name == "fedadam" else 1)) ** 0.5 + tau)
    assert abs(got - no_start) > 1e-6


def one_value_of_mean(delta, share, second, name, tau):
    mean = 5 + delta
    v = {
        "fedadam": 0.99 * tau**2 + 0.01 * mean**2,
        "fedyogi": tau**2 + 0.01 * mean**2,
        "fedadagrad": tau**2 + mean**2,
    }
    return 5 + 1e-2 * share * mean / (v[name] ** 0.5 + tau)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_without_change_moves_nothing_at_first(name):
    start = ServerState(0, random_adapter(7, dtype=torch.float32))
    strategy = ServerOptimized(FedAvg(make_federation()), ServerOptimizerSettings.published(name))
    assert one_round(strategy, start, RANKS).state.adapter.equal(start.adapter)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_same_bits(name):
    start = ServerState(0, random_adapter(7, dtype=torch.float32))
    strategy = ServerOptimized(FedAvg(make_federation()), ServerOptimizerSettings.published(name))
    half = run(strategy, start, 2)
    assert all(f.A.dtype == torch.float32 for entry in half.strategy_state.values() for f in entry.values())
    copied = half.with_adapters({n: entry.map(torch.clone) for n, entry in half.adapters().items()})
    resumed, whole = run(strategy, replace(copied, round_index=2), 2), run(strategy, start, 4)
    assert resumed.adapters().keys() == whole.adapters().keys()
    assert all(resumed.adapters()[n].equal(entry) for n, entry in whole.adapters().items())


class OneSide:
    """FedAvg of one factor in turn, which also keeps something of its own."""

    def __init__(self) -> None:
        self.inner = FedAvg(make_federation())
        self.name, self.traits = "one_side", self.inner.traits
        self.download, self.plan, self.upload = self.inner.download, self.inner.plan, self.inner.upload

    def sends(self, state):
        return ONLY_B if state.round_index % 2 == 0 else ONLY_A

    def aggregate(self, state, reports, factors):
        assert FIRST not in state.strategy_state, "the wrapped strategy does not see the optimizer's moments"
        result = self.inner.aggregate(state, reports, factors)
        side = self.sends(state)
        adapter = {
            m: LoraFactors(
                f.A if side == ONLY_A else state.adapter[m].A,
                f.B if side == ONLY_B else state.adapter[m].B,
                f.scaling,
            )
            for m, f in result.state.adapter.items()
        }
        kept = {"own": AdapterState(adapter)}
        return replace(
            result, state=replace(result.state, adapter=AdapterState(adapter), strategy_state=kept)
        )


@pytest.mark.parametrize("name", NAMES)
def test_only_what_travels_moves(name):
    start = ServerState(0, random_adapter(7))
    strategy = ServerOptimized(OneSide(), ServerOptimizerSettings.published(name))
    first = one_round(strategy, start, RANKS, learn(0), COUNTS).state
    second = one_round(strategy, first, RANKS, learn(1), COUNTS).state

    assert set(second.strategy_state) == {"own", FIRST} | ({SECOND} if name != "fedavgm" else set())
    for m in TARGETS:
        assert torch.equal(first.adapter[m].A, start.adapter[m].A)
        assert not torch.equal(first.adapter[m].B, start.adapter[m].B)
        assert torch.equal(second.adapter[m].B, first.adapter[m].B)
        assert not torch.equal(second.adapter[m].A, first.adapter[m].A)
        assert first.strategy_state[FIRST][m].A.count_nonzero() == 0
        assert torch.equal(second.strategy_state[FIRST][m].B, first.strategy_state[FIRST][m].B)


@pytest.mark.parametrize("name", NAMES)
def test_modules_one_by_one_give_the_same_bits(name):
    strategy = ServerOptimized(FedAvg(make_federation()), ServerOptimizerSettings.published(name))
    state = run(strategy, ServerState(0, random_adapter(7)), 2)
    cohort = [learn(2)(k, state.adapter) for k in range(3)]
    reports = [make_report(k) for k in range(3)]
    whole = strategy.aggregate(state, reports, stream(cohort)).state.adapters()
    for module in TARGETS:
        part = strategy.aggregate(state, reports, stream(cohort, [module])).state.adapters()
        for entry, adapter in whole.items():
            assert list(part[entry]) == [module]
            assert AdapterState({module: adapter[module]}).equal(part[entry])


def test_nothing_is_written_into_the_state():
    strategy = ServerOptimized(FedAvg(make_federation()), ServerOptimizerSettings.published("fedadam"))
    state = run(strategy, ServerState(0, random_adapter(7)), 1)
    before = {n: entry.map(torch.clone) for n, entry in state.adapters().items()}
    run(strategy, state, 1)
    assert all(state.adapters()[n].equal(entry) for n, entry in before.items())


def test_it_passes_for_the_wrapped_strategy_but_takes_no_second_wrapper():
    wrapped = ServerOptimized(FedAvg(make_federation()), ServerOptimizerSettings.published("fedadam"))
    assert wrapped.name == "fedavg"
    assert wrapped.traits == replace(FedAvg(make_federation()).traits, reduce="stack")
    assert wrapped.export(ServerState(0, random_adapter(7))).equal(random_adapter(7))
    with pytest.raises(ConfigError, match="fedavg"):
        ServerOptimized(wrapped, ServerOptimizerSettings.published("fedadam"))


def test_a_strategy_that_does_not_average_factors_is_refused():
    with pytest.raises(ConfigError, match=r"must be none with strategy\.name=local.*such as fedavg"):
        ServerOptimized(LocalOnly(make_federation()), ServerOptimizerSettings.published("fedyogi"))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"lr": 0.0}, r"server_optimizer\.lr must be positive, got 0\.0"),
        ({"tau": 0.0}, r"server_optimizer\.tau must be positive"),
        ({"beta1": 1.0}, r"server_optimizer\.beta1 must be in \[0, 1\), got 1\.0"),
        ({"beta2": -0.1}, r"server_optimizer\.beta2 must be in \[0, 1\)"),
        ({"name": "adam"}, r"server_optimizer\.name must be fedavgm, .*, got 'adam'"),
    ],
)
def test_wrong_numbers_are_refused(changes, rule):
    with pytest.raises(ConfigError, match=rule):
        replace(ServerOptimizerSettings.published("fedadam"), **changes)
