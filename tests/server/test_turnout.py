"""Unreliable clients and the simulated clock: who reports back, when, and what a round makes of it."""

from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from fedsim.comm.group import Group, SoloGroup
from fedsim.server.cohort import CohortPolicy, sample_cohort
from fedsim.server.metrics import client_rows, round_metrics
from fedsim.server.round import run_round
from fedsim.server.selection import drawn_cohort, round_jobs, who_reports
from fedsim.server.turnout import Device, Outage, Participation, Slowness
from tests.helpers import run_ranks
from tests.server.test_round import NUM_CLIENTS, bits_of, make_run, start_state
from tests.server.test_strategy_rounds import CASES

DEVICE = Device(tokens_per_s=100.0, uplink_bytes_per_s=1e4, downlink_bytes_per_s=4e4)


def clocked(**settings) -> Participation:
    tiers = np.arange(NUM_CLIENTS, dtype=np.int64) % 2
    return Participation(devices=(DEVICE,), tier_of=tiers, **settings)


def test_clients_are_available_with_the_probability_asked_for():
    participation = Participation(availability=0.3)
    counts = [len(participation.available(1000, 1, index)) for index in range(50)]
    assert abs(np.mean(counts) - 300) < 5 * np.sqrt(1000 * 0.3 * 0.7 / 50)
    assert len(set(counts)) > 1
    assert (participation.available(1000, 1, 7) == participation.available(1000, 1, 7)).all()


def test_an_outage_takes_its_clients_away_and_gives_them_back():
    participation = Participation(outages=(Outage(2, 4, (1, 3)), Outage(3, 4, share=0.5)))
    assert participation.available(5, 0, 1).tolist() == [0, 1, 2, 3, 4]
    assert participation.available(5, 0, 2).tolist() == [0, 2, 4]
    both = Participation(outages=(Outage(0, 9, share=0.5),))
    assert len(both.available(10, 0, 0)) == 5
    assert both.available(10, 0, 0).tolist() == both.available(10, 0, 8).tolist(), "one outage, one draw"
    assert participation.available(5, 0, 4).tolist() == [0, 1, 2, 3, 4]


@given(st.integers(1, 60), st.data(), st.integers(0, 2**40), st.integers(0, 99))
def test_a_cohort_is_drawn_among_the_available(num_clients, data, seed, round_index):
    available = np.array(sorted(data.draw(st.sets(st.integers(0, num_clients - 1)))), dtype=np.int64)
    size = data.draw(st.integers(1, num_clients))
    cohort = sample_cohort(CohortPolicy(num_clients, size), seed, round_index, available)
    assert len(set(cohort)) == len(cohort) == min(size, len(available))
    assert list(cohort) == sorted(cohort)
    if len(available) < num_clients:
        assert set(cohort) <= set(available.tolist())
    else:
        assert cohort == sample_cohort(CohortPolicy(num_clients, size), seed, round_index), "nothing changes"
    tossed = sample_cohort(CohortPolicy(num_clients, size, None, 0.5), seed, round_index, available)
    assert set(tossed) <= set(available.tolist())
    assert set(tossed) <= set(sample_cohort(CohortPolicy(num_clients, size, None, 0.5), seed, round_index))


def test_simulated_seconds_follow_the_formula():
    run = make_run(SoloGroup())
    jobs = round_jobs(run, 0)
    traffic = {job.client_id: (4000 + job.client_id, 1000) for job in jobs}
    seconds = clocked().client_seconds(jobs, traffic, 1, 0)
    for job in jobs:
        expected = (4000 + job.client_id) / 4e4 + job.cost_tokens / 100 + 1000 / 1e4
        assert seconds[job.client_id] == pytest.approx(expected)
    by_tier = replace(clocked(), devices=(DEVICE, Device(50.0, 1e4, 4e4))).client_seconds(jobs, traffic, 1, 0)
    for job in jobs:
        extra = job.cost_tokens / 100 if job.client_id % 2 else 0.0
        assert by_tier[job.client_id] == pytest.approx(seconds[job.client_id] + extra)


@pytest.mark.parametrize(
    ("slowness", "median"),
    [
        (Slowness("lognormal", 0.5), 1.0),
        (Slowness("pareto", 2.0), 2**0.5),
        (Slowness("uniform", 3.0), 2.5),
        (Slowness(), 1.0),
    ],
)
def test_slowness_has_the_median_of_its_distribution(slowness, median):
    factors = slowness.factors(20_000, 5, 0)
    assert (factors > 0).all()
    assert np.median(factors) == pytest.approx(median, rel=0.03)
    fixed = replace(slowness, each_round=False)
    assert (fixed.factors(9, 5, 0) == fixed.factors(9, 5, 1)).all()
    if slowness.name != "none":
        assert (slowness.factors(9, 5, 0) != slowness.factors(9, 5, 1)).any()


def test_the_server_waits_for_the_deadline_only_where_somebody_is_missing():
    seconds = {0: 1.0, 1: 5.0, 2: 2.0, 3: 9.0}
    everyone = clocked().turnout([0, 1, 2, 3], 4, seconds, 0, 0, 5)
    assert (everyone.reporting, everyone.round_s) == ((0, 1, 2, 3), 9.0)
    late = clocked(deadline_s=6.0).turnout([0, 1, 2, 3], 4, seconds, 0, 0, 5)
    assert (late.reporting, late.num_late, late.round_s) == ((0, 1, 2), 1, 6.0)
    first = clocked(over_selection=2.0, deadline_s=6.0).turnout([0, 1, 2, 3], 2, seconds, 0, 0, 5)
    assert (first.reporting, first.num_surplus, first.num_late, first.round_s) == ((0, 2), 1, 1, 2.0)
    for deadline_s in (None, 6.0):
        few = clocked(over_selection=2.0, deadline_s=deadline_s).turnout([1], 2, seconds, 0, 0, 5)
        assert (few.reporting, few.round_s) == ((1,), 5.0), "there is nobody left to wait for"


@pytest.mark.parametrize(
    ("wanted", "factor", "drawn"), [(3, 1.3, 4), (10, 1.1, 11), (100, 1.1, 110), (10, 1.01, 11), (4, 1.0, 4)]
)
def test_more_clients_are_drawn_than_wanted_rounded_up(wanted, factor, drawn):
    """100 times 1.1 is a little more than 110 in floating point."""
    policy, participation = CohortPolicy(200, wanted), Participation(over_selection=factor)
    inputs = SimpleNamespace(cohort=policy, participation=participation, seed=1)
    assert len(drawn_cohort(inputs, 0)) == drawn


def test_no_client_of_a_poisson_cohort_is_surplus():
    """Its size is only the expected one, and the server waits for all whom it has drawn."""
    run = replace(make_run(SoloGroup(), size=2, probability=0.7), participation=clocked(availability=0.9))
    drawn = [round_jobs(run, index) for index in range(12)]
    for index, jobs in enumerate(drawn):
        reporting, turnout = who_reports(run, replace(start_state(), round_index=index), jobs)
        assert turnout is not None
        assert (reporting, turnout.num_surplus) == (jobs, 0)
    assert max(map(len, drawn)) > run.cohort.size


def test_the_clock_knows_that_a_client_has_pruned_itself(tmp_path):
    """Clients 0, 2 and 4 are of one tier of rank 4, of which 2 has pruned itself to one row."""
    run = make_run(
        SoloGroup(), "hetlora", 5, folder=tmp_path, ranks=(4, 2), arguments={"pruning_factor": 0.6}
    )
    state = replace(start_state((4, 2)), client_versions={2: 0}, round_index=1)
    run.store.save(2, 0, {"lora_ranks": torch.ones(len(state.adapter), dtype=torch.int64)})
    endless = replace(DEVICE, tokens_per_s=1e30)  # the traffic alone takes time
    run = replace(run, participation=replace(clocked(), devices=(endless,)))
    _, turnout = who_reports(run, state, round_jobs(run, 1))

    row_bytes = 4 * len(state.adapter) * (16 + 16)
    expected = {k: rank * row_bytes * (1 / 4e4 + 1 / 1e4) for k, rank in enumerate((4, 2, 1, 2, 4))}
    assert turnout is not None
    assert turnout.seconds == pytest.approx(expected)


def test_clients_drop_out_with_the_probability_asked_for():
    participation = Participation(dropout=0.25)
    lost = [participation.turnout(range(400), 400, {}, 3, index, 400).num_lost for index in range(40)]
    assert abs(np.mean(lost) - 100) < 5 * np.sqrt(400 * 0.25 * 0.75 / 40)
    assert participation.turnout(range(400), 400, {}, 3, 0, 400).round_s is None, "no clock"


def test_clients_that_do_not_report_leave_no_trace_in_the_aggregate():
    """A round in which client 2 is late equals a round of the others alone."""
    run = make_run(SoloGroup(), size=4)
    drawn = [job.client_id for job in round_jobs(run, 0)]
    seconds = {
        job.client_id: s
        for job, s in zip(
            round_jobs(run, 0),
            (clocked().client_seconds(round_jobs(run, 0), dict.fromkeys(drawn, (0, 0)), 1, 0)).values(),
            strict=True,
        )
    }
    slowest = max(seconds, key=lambda client: seconds[client])
    instant = replace(DEVICE, uplink_bytes_per_s=1e30, downlink_bytes_per_s=1e30)
    participation = replace(clocked(deadline_s=sorted(seconds.values())[-2] + 1e-6), devices=(instant,))
    state, report = run_round(start_state(), replace(run, participation=participation))
    others = tuple(client for client in drawn if client != slowest)
    alone, _ = run_round(start_state(), replace(run, cohort=CohortPolicy(NUM_CLIENTS, 3, others)))
    everyone, _ = run_round(start_state(), run)
    assert bits_of(state) == bits_of(alone)
    assert bits_of(state) != bits_of(everyone)
    metrics = round_metrics(report, None)
    assert (metrics["cohort/num_drawn"], metrics["cohort/num_late"], metrics["cohort/num_clients"]) == (
        4,
        1,
        3,
    )
    assert metrics["simulated/round_s"] == participation.deadline_s
    rows = client_rows(report)
    assert [row["simulated_s"] for row in rows] == pytest.approx([seconds[client] for client in others])


def unreliable_rounds(group: Group) -> list:
    run = make_run(group, size=2)
    participation = clocked(
        availability=0.8,
        dropout=0.3,
        over_selection=1.5,
        slowness=Slowness("lognormal", 1.0),
        deadline_s=30.0,
    )
    state, told = start_state(), []
    for _ in range(4):
        state, report = run_round(state, replace(run, participation=participation))
        metrics = round_metrics(report, None)
        told.append({k: v for k, v in metrics.items() if k.startswith(("cohort/", "simulated/", "test/"))})
    return [bits_of(state), state.simulated_s, told]


def test_unreliable_clients_are_the_same_on_any_number_of_processes(tmp_path):
    alone = unreliable_rounds(SoloGroup())
    rounds = alone[2]
    assert len({row["cohort/num_clients"] for row in rounds}) > 1, "some of the four rounds lost clients"
    assert rounds[-1]["simulated/elapsed_s"] == sum(row["simulated/round_s"] for row in rounds) == alone[1]
    for result in run_ranks(unreliable_rounds, 2, tmp_path):
        assert result == alone


def test_a_round_without_clients_goes_by():
    run = replace(make_run(SoloGroup()), participation=Participation(outages=(Outage(0, 1),)))
    before = start_state()
    state, report = run_round(before, run)
    assert state.round_index == 1
    assert bits_of(state) == bits_of(before)
    assert round_metrics(report, None)["cohort/num_drawn"] == 0
    later, report = run_round(state, run)
    assert len(report.clients) == 4
    assert bits_of(later) != bits_of(state)


@pytest.mark.parametrize(
    "case", ["fedavg", "ffa", "fedsa", "local", "scaffold", "flora", "fedex", "hetlora", "slora"]
)
def test_the_clock_counts_the_bytes_that_the_record_does(case, tmp_path):
    """In the second round, in which stacks, residuals and what clients keep are there."""
    options = dict(CASES[case])
    strategy, ranks = options.pop("strategy", case), options.pop("ranks", (2,))
    plain = make_run(SoloGroup(), strategy, 4, 2, True, tmp_path, ranks, **options)
    heard: list[dict[int, tuple[int, int]]] = []

    class Listening(Participation):
        def client_seconds(self, jobs, traffic, seed, round_index):
            heard.append(dict(traffic))
            return super().client_seconds(jobs, traffic, seed, round_index)

    run = replace(plain, participation=Listening(**vars(clocked())))
    state = start_state(ranks)
    for _ in range(2):
        state, report = run_round(state, run)
        for client in report.clients:
            received, sent = heard[-1][client.client_id]
            assert received == client.downlink_bytes, case
            if strategy != "hetlora":  # which may prune itself while it trains
                assert sent == client.uplink_bytes, case


def test_bytes_of_clients_that_nobody_hears_of_are_counted():
    """Lost clients have received the model; late ones and those that were not needed have sent theirs as well."""
    run = make_run(SoloGroup(), size=2)
    slow = Device(tokens_per_s=1e-3, uplink_bytes_per_s=1e4, downlink_bytes_per_s=4e4)
    unreliable = Participation(
        dropout=0.3, over_selection=2.0, devices=(DEVICE, slow), deadline_s=100.0, tier_of=clocked().tier_of
    )
    seen = set()
    for round_index in range(8):
        state = replace(start_state(), round_index=round_index)
        _, report = run_round(state, replace(run, rounds=9, participation=unreliable))
        turnout, metrics = report.turnout, round_metrics(report, None)
        one_way = state.adapter.num_bytes
        assert turnout is not None
        assert (
            turnout.num_drawn
            == len(report.clients) + turnout.num_lost + turnout.num_late + turnout.num_surplus
        )
        assert metrics["comm/downlink_bytes"] == turnout.num_drawn * one_way
        assert metrics["comm/uplink_bytes"] == (turnout.num_drawn - turnout.num_lost) * one_way
        seen |= {name for name in ("num_lost", "num_late", "num_surplus") if getattr(turnout, name)}
    assert seen == {"num_lost", "num_late", "num_surplus"}
