"""Client-level differential privacy: arithmetic, sensitivity, the noise's law, and the likely mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.aggregation.fedavg import FedAvg
from fedsim.aggregation.local import LocalOnly
from fedsim.aggregation.private import PrivacySettings, Private, clip_update
from fedsim.aggregation.server_optimizers import ServerOptimized, ServerOptimizerSettings
from fedsim.errors import AggregationError, ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import BOTH, ONLY_A, ONLY_B, Client, ClientPlan, Upload, absent
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, make_federation, make_report, one_round, random_adapter, stream

RANKS = {k: dict.fromkeys(TARGETS, 4) for k in range(3)}


def private(clip_norm: float, noise: float, expected: float = 4.0, inner=None, seed: int = 3) -> Private:
    federation = make_federation(cohort_size=expected, seed=seed)
    return Private(inner or FedAvg(federation), federation, PrivacySettings(clip_norm, noise))


def moved(start: AdapterState, seed: int, size: float) -> AdapterState:
    change = random_adapter(seed, 4)
    return AdapterState(
        {
            m: LoraFactors(f.A + size * change[m].A.to(f.A), f.B + size * change[m].B.to(f.B), f.scaling)
            for m, f in start.items()
        }
    )


def vector(adapter: AdapterState, sides: str = "AB") -> np.ndarray:
    parts = [getattr(f, side).double().numpy().ravel() for f in adapter.values() for side in sides]
    return np.concatenate(parts)


def test_without_noise_it_is_the_mean_of_clipped_changes_over_the_expected_cohort():
    start = random_adapter(7)
    clients = [moved(start, k, size) for k, size in enumerate((0.001, 1.0, 5.0))]
    result = one_round(
        private(2.0, 0.0), ServerState(0, start), RANKS, lambda k, _: clients[k], {0: 10, 1: 999, 2: 1}
    )

    x = vector(start)
    changes = [vector(client) - x for client in clients]
    norms = [np.linalg.norm(change) for change in changes]
    assert norms[0] < 2.0 < norms[1] < norms[2]
    clipped = [c * min(1.0, 2.0 / n) for c, n in zip(changes, norms, strict=True)]
    np.testing.assert_allclose(vector(result.state.adapter), x + sum(clipped) / 4.0, rtol=1e-9, atol=1e-9)
    assert result.state.round_index == 1
    assert all(f.scaling == start[m].scaling for m, f in result.state.adapter.items())

    # contrasts: the drawn cohort's size as denominator; weights by examples; each module clipped by itself
    assert not np.allclose(vector(result.state.adapter), x + sum(clipped) / 3.0, rtol=1e-3)
    weighted = x + sum(w * c for w, c in zip((10, 999, 1), clipped, strict=True)) / 1010
    assert not np.allclose(vector(result.state.adapter), weighted, rtol=1e-3)
    apart = np.concatenate(
        [
            change * min(1.0, 2.0 / np.linalg.norm(change))
            for m in TARGETS
            for change in [vector(AdapterState({m: clients[2][m]})) - vector(AdapterState({m: start[m]}))]
        ]
    )
    assert not np.allclose(clipped[2], apart, rtol=1e-3)


def test_a_client_moves_the_next_adapter_by_no_more_than_its_share():
    state = ServerState(0, random_adapter(7, dtype=torch.float32))

    def after(strategy, clients: int, size: float) -> np.ndarray:
        ranks = dict.fromkeys(range(clients), RANKS[0])
        trained = [
            moved(state.adapter, 0, 0.01),
            moved(state.adapter, 1, 0.01),
            moved(state.adapter, 2, size),
        ]
        return vector(one_round(strategy, state, ranks, lambda k, _: trained[k]).state.adapter)

    for size in (0.01, 1.0, 1e6):
        with_client, without = after(private(0.5, 1.0), 3, size), after(private(0.5, 1.0), 2, size)
        # equal noise in both; 1e-5 for the rounding of the result to float32
        assert np.linalg.norm(with_client - without) <= 0.5 / 4 + 1e-5
    # contrast: without clipping the same client is not bounded
    assert np.linalg.norm(after(private(1e9, 0.0), 3, 1e3) - after(private(1e9, 0.0), 2, 1e3)) > 100


@given(
    st.integers(0, 10**6), st.floats(1e-9, 1e3), st.floats(1e-9, 1e6), st.sampled_from([BOTH, ONLY_A, ONLY_B])
)
@settings(max_examples=60, deadline=None)
def test_the_clipped_change_is_within_the_norm_as_the_server_sees_it(seed, clip_norm, size, sides):
    start = random_adapter(seed, dtype=torch.float32)
    trained = moved(start, seed + 1, size)
    clipped = clip_update(start, trained, sides, clip_norm)
    names = "".join(sorted(sides))
    change = vector(clipped, names) - vector(start, names)
    assert np.linalg.norm(change) <= clip_norm * (1 + 1e-14)
    whole = vector(trained, names) - vector(start, names)
    if np.linalg.norm(whole) <= clip_norm * (1 - 1e-14):
        assert clipped is trained
    elif clip_norm > 1e-3:
        # pulled straight towards the start, and no further than needed; the rest is float32
        np.testing.assert_allclose(change, whole * (clip_norm / np.linalg.norm(whole)), rtol=1e-5, atol=2e-6)
    for m, factors in clipped.items():
        assert factors.A.dtype == torch.float32
        assert "A" in sides or torch.equal(factors.A, trained[m].A)
        assert "B" in sides or torch.equal(factors.B, trained[m].B)


def noise_of_a_round(strategy: Private, clients: int, round_index: int = 0) -> np.ndarray:
    """What a round adds to equal clients that learned nothing."""
    targets = {"x": (400, 300), "y": (200, 500)}
    start = AdapterState(
        {
            m: LoraFactors(torch.ones(8, i).double(), torch.ones(o, 8).double(), 2.0)
            for m, (i, o) in targets.items()
        }
    )
    ranks = {k: dict.fromkeys(targets, 8) for k in range(clients)}
    return vector(one_round(strategy, ServerState(round_index, start), ranks).state.adapter) - vector(start)


def test_the_noise_has_the_right_spread_and_does_not_grow_with_the_cohort():
    """11,200 values: their standard deviation is known to 0.7 %, and 4 of these are allowed."""
    expected_std = 1.5 * 0.8 / 4
    for clients in (1, 3, 6):
        noise = noise_of_a_round(private(0.8, 1.5), clients)
        assert noise.std() == pytest.approx(expected_std, rel=0.028)
        assert abs(noise.mean()) < 4 * expected_std / np.sqrt(noise.size)
        # the law is normal: 4.55 % beyond two standard deviations
        assert np.mean(np.abs(noise) > 2 * expected_std) == pytest.approx(0.0455, abs=0.008)
        # contrast: noise from each client would add up to sqrt(K) as much
        if clients > 1:
            assert noise.std() != pytest.approx(expected_std * np.sqrt(clients), rel=0.2)


def test_the_noise_is_drawn_anew_for_each_round_and_factor_and_is_the_same_for_a_seed():
    first, second = (noise_of_a_round(private(1.0, 1.0), 2, index) for index in (0, 1))
    assert np.array_equal(first, noise_of_a_round(private(1.0, 1.0), 2, 0))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(first, noise_of_a_round(private(1.0, 1.0, seed=4), 2, 0))[0, 1]) < 0.05
    a, b = first[: 8 * 400], first[8 * 400 : 8 * 400 + 8 * 300]
    assert abs(np.corrcoef(a[: b.size], b)[0, 1]) < 0.08


def test_an_empty_cohort_gets_noise_alone():
    state = ServerState(2, random_adapter(7))
    strategy = private(1.0, 1.0)
    result = strategy.aggregate(state, [], ((m, ()) for m in TARGETS))
    assert result.state.round_index == 3
    changes = vector(result.state.adapter) - vector(state.adapter)
    assert np.std(changes) == pytest.approx(1 / 4, rel=0.3)
    assert strategy.traits.takes_empty_cohorts
    # the same noise as with clients that learned nothing
    full = one_round(strategy, state, RANKS).state.adapter
    np.testing.assert_allclose(vector(full), vector(result.state.adapter), rtol=1e-12)


class OneSide:
    """Averages one factor, keeps the other with the client, and refuses to see more than one client."""

    def __init__(self, sides) -> None:
        self.inner, self.sides = FedAvg(make_federation()), sides
        self.name, self.traits = "one_side", replace(self.inner.traits, keeps_client_state=True)
        self.download, self.plan, self.export = self.inner.download, self.inner.plan, self.inner.export

    def sends(self, state):
        return self.sides

    def upload(self, state, client, plan, trained, report):
        return Upload(trained, {"own": trained[next(iter(TARGETS))].B})

    def aggregate(self, state, reports, factors):
        assert [report.num_examples for report in reports] == [1]
        other = "B" if self.sides == ONLY_A else "A"
        modules = {}
        for module, (mean,) in factors:
            assert torch.isnan(getattr(mean, other)).all()
            modules[module] = replace(mean, **{other: getattr(state.adapter[module], other)})
        state = replace(state, round_index=state.round_index + 1, adapter=AdapterState(modules))
        return replace(self.inner.aggregate(state, reports, stream([state.adapter])), state=state)


@pytest.mark.parametrize(("sides", "side"), [(ONLY_A, "A"), (ONLY_B, "B")])
def test_only_what_travels_is_clipped_and_gets_noise(sides, side):
    other = "B" if side == "A" else "A"
    state = ServerState(0, random_adapter(7))
    strategy = private(1.0, 0.7, inner=OneSide(sides))
    trained = moved(state.adapter, 1, 3.0)
    client = Client(0, RANKS[0])
    upload = strategy.upload(
        state, client, strategy.plan(state, client, state.adapter), trained, make_report(0)
    )

    assert set(upload.client_state) == {"own"}
    assert torch.equal(upload.client_state["own"], trained[next(iter(TARGETS))].B)
    change = vector(upload.adapter, side) - vector(state.adapter, side)
    assert np.linalg.norm(change) == pytest.approx(1.0, rel=1e-5)
    assert all(torch.equal(getattr(upload.adapter[m], other), getattr(f, other)) for m, f in trained.items())

    sent = AdapterState(
        {
            m: replace(
                f, **{other: absent(tuple(getattr(f, other).shape), torch.float64, torch.device("cpu"))}
            )
            for m, f in upload.adapter.items()
        }
    )
    after = strategy.aggregate(state, [make_report(0)], stream([sent])).state.adapter
    assert np.array_equal(vector(after, other), vector(state.adapter, other))
    noise = vector(after, side) - vector(state.adapter, side) - change / 4
    assert np.std(noise) == pytest.approx(0.7 / 4, rel=0.3)


class StartsElsewhere:
    """Averages as FedAvg does, but its clients start from zero factors."""

    def __init__(self) -> None:
        self.inner = FedAvg(make_federation())
        self.name, self.traits = "starts_elsewhere", self.inner.traits
        self.sends, self.download, self.upload = self.inner.sends, self.inner.download, self.inner.upload
        self.aggregate, self.export = self.inner.aggregate, self.inner.export

    def plan(self, state, client, received):
        return ClientPlan(received.map(torch.zeros_like))


def test_the_change_is_bounded_as_the_server_sees_it_wherever_a_client_starts():
    state = ServerState(0, random_adapter(7))
    after = one_round(private(0.5, 0.0, inner=StartsElsewhere()), state, RANKS, lambda _, start: start)
    change = vector(after.state.adapter) - vector(state.adapter)
    # three clients of four expected ones, each pulled straight towards the zeros where they stayed
    np.testing.assert_allclose(
        change, -vector(state.adapter) * 3 / 4 * 0.5 / np.linalg.norm(vector(state.adapter)), rtol=1e-5
    )


def test_modules_one_by_one_give_the_same_bits():
    strategy = private(1.0, 1.0)
    state = ServerState(1, random_adapter(7, dtype=torch.float32))
    cohort = [clip_update(state.adapter, moved(state.adapter, k, 1.0), BOTH, 1.0) for k in range(3)]
    reports = [make_report(k) for k in range(3)]
    whole = strategy.aggregate(state, reports, stream(cohort)).state.adapter
    for module in reversed(TARGETS):
        part = strategy.aggregate(state, reports, stream(cohort, [module])).state.adapter
        assert part.equal(AdapterState({module: whole[module]}))


def test_a_server_optimizer_fits_around_it_and_not_within():
    federation = make_federation(cohort_size=4.0)
    settings_ = ServerOptimizerSettings.published("fedavgm", beta1=0.0)
    state = ServerState(0, random_adapter(7))
    plain = private(1.0, 1.0)
    around = one_round(ServerOptimized(plain, settings_), state, RANKS).state.adapter
    np.testing.assert_allclose(
        vector(around), vector(one_round(plain, state, RANKS).state.adapter), rtol=1e-12
    )
    with pytest.raises(ConfigError, match="clip_norm must be null"):
        Private(ServerOptimized(FedAvg(federation), settings_), federation, PrivacySettings(1.0, 1.0))


def test_strategies_that_do_not_average_factors_are_refused():
    federation = make_federation()
    with pytest.raises(ConfigError, match=r"must be null with strategy\.name=local.*such as fedavg"):
        Private(LocalOnly(federation), federation, PrivacySettings(1.0, 1.0))
    mixed = replace(FedAvg(federation), traits=replace(FedAvg(federation).traits, mixed_ranks=True))
    with pytest.raises(ConfigError, match="one LoRA rank"):
        Private(mixed, federation, PrivacySettings(1.0, 1.0))
    with pytest.raises(ConfigError, match="positive expected cohort"):
        Private(FedAvg(federation), make_federation(cohort_size=0), PrivacySettings(1.0, 1.0))


@pytest.mark.parametrize(("values", "key"), [((0.0, 1.0), "clip_norm"), ((1.0, -1.0), "noise_multiplier")])
def test_wrong_numbers_are_refused(values, key):
    with pytest.raises(ConfigError, match=rf"aggregation\.privacy\.{key} must be"):
        PrivacySettings(*values)


def test_updates_that_cannot_be_clipped_or_added_are_refused():
    start = random_adapter(7)
    broken = start.map(lambda factor: factor * float("nan"))
    with pytest.raises(AggregationError, match="finite norm, got nan"):
        clip_update(start, broken, BOTH, 1.0)
    with pytest.raises(AggregationError, match=r"LoRA ranks \[3\] for \[4\]"):
        clip_update(start, random_adapter(7, 3), BOTH, 1.0)
    with pytest.raises(AggregationError, match="LoRA rank 4"):
        private(1.0, 1.0).aggregate(ServerState(0, start), [make_report(0)], stream([random_adapter(7, 3)]))
