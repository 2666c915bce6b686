"""Every strategy in whole rounds with real local training: processes, sharding and checkpoints leave the bits alone."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsim.aggregation.private import PrivacySettings
from fedsim.aggregation.server_optimizers import ServerOptimizerSettings
from fedsim.comm.group import Group, SoloGroup
from fedsim.config.strategy_section import STRATEGY_NAMES
from fedsim.lora.lowrank import combine
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.server.checkpoint import load_newest_checkpoint, save_checkpoint
from fedsim.server.round import run_round
from fedsim.server.summary import RunSummary
from fedsim.server.tiers import Tiers, with_phases
from tests.helpers import run_ranks
from tests.server.test_round import bits_of, make_run, start_state, three_rounds

MIXED = (1, 4, 2)

ARGUMENTS = {
    "hetlora": {"pruning_factor": 0.6, "tail_penalty": 0.05, "min_rank": 1},
    "florist": {"energy": 0.9},
    "slora": {"rounds": 2, "density": 0.1, "then": "flexlora"},
}

UNMIXED = ("fedavg", "fedex", "ffa", "rolora", "fedsa", "fedsvd", "scaffold")
"""Strategies for clients of one LoRA rank."""

CASES = {
    name: {"ranks": (2,) if name in UNMIXED else MIXED, "arguments": ARGUMENTS.get(name)} for name in STRATEGY_NAMES
} | {
    "slora, then hetlora": {
        "strategy": "slora",
        "ranks": MIXED,
        "arguments": {
            "rounds": 1,
            "density": 0.1,
            "client_densities": (0.05, 0.2, 0.1, 0.05, 0.2),
            "then": "hetlora",
            "then_arguments": ARGUMENTS["hetlora"],
        },
    },
    "fedadam over rolora": {
        "strategy": "rolora", "server_optimizer": ServerOptimizerSettings.published("fedadam")
    },
    "fedavgm over fedavg": {
        "strategy": "fedavg", "server_optimizer": ServerOptimizerSettings.published("fedavgm")
    },
    "private ffa": {"strategy": "ffa", "privacy": PrivacySettings(0.5, 0.8), "probability": 0.5},
    "private fedsa with fedyogi": {
        "strategy": "fedsa",
        "privacy": PrivacySettings(0.5, 0.8),
        "server_optimizer": ServerOptimizerSettings.published("fedyogi"),
        "probability": 0.5,
    },
}  # fmt: skip


SCHEDULED = (
    "flexlora",
    "flexlora_delta",
    "flexlora_partitioned",
    "hlora",
    "hetlora",
    "hetlora_naive",
    "rbla",
    "flora",
    "florist",
    "slora",
)
"""Strategies for mixed ranks with a global model."""


def case_rounds(group: Group, case: str, folder: Path, sharded: bool) -> dict:
    options = dict(CASES[case])
    strategy, ranks = options.pop("strategy", case), options.pop("ranks", (2,))
    folder = folder / case.replace(" ", "_") / ("sharded" if sharded else "root")
    return three_rounds(group, strategy, 2, True, folder, ranks, {**options, "sharded": sharded})


def all_cases(group: Group, folder: Path) -> dict:
    return {
        (case, sharded): case_rounds(group, case, folder, sharded)
        for case in CASES
        for sharded in (False, True)
    }


@pytest.mark.timeout(900)  # every strategy on two processes, twice: a minute alone, five on a busy machine
def test_no_strategy_depends_on_the_number_of_processes_nor_on_where_it_aggregates(tmp_path):
    alone = {case: case_rounds(SoloGroup(), case, tmp_path, False) for case in CASES}
    for result in run_ranks(all_cases, 2, tmp_path, tmp_path, timeout_s=280.0):
        for (case, sharded), outcome in result.items():
            assert outcome == alone[case], f"{case}, sharded={sharded}"


def some_sharded(group: Group, folder: Path) -> dict:
    return {case: case_rounds(group, case, folder, True) for case in ("flora", "slora", "private ffa")}


def test_more_ranks_than_modules_share_the_aggregation(tmp_path):
    """Four modules on five ranks: one has nothing to aggregate."""
    alone = some_sharded(SoloGroup(), tmp_path)
    for result in run_ranks(some_sharded, 5, tmp_path, tmp_path, timeout_s=200.0):
        assert result == alone


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path):
    options = dict(CASES[case])
    strategy, ranks = options.pop("strategy", case), options.pop("ranks", (2,))
    folder = tmp_path / "clients"
    run = make_run(SoloGroup(), strategy, 4, 2, True, folder, ranks, **options)
    state = start_state(ranks)
    run.base.apply(state.base_update)
    for _ in range(2):
        state, _ = run_round(state, run)
    save_checkpoint(state, tmp_path / "checkpoints", 2)
    uninterrupted, _ = run_round(state, run)
    kept = [run.client(client_id, uninterrupted).state for client_id in range(5)]

    loaded = load_newest_checkpoint(tmp_path / "checkpoints")
    again = make_run(SoloGroup(), strategy, 4, 2, True, folder, ranks, **options)
    again.base.apply(loaded.base_update)
    resumed, _ = run_round(loaded, again)
    assert bits_of(resumed) == bits_of(uninterrupted)
    assert resumed.client_versions == uninterrupted.client_versions
    for client_id, before in enumerate(kept):
        after = again.client(client_id, resumed).state
        assert sorted(after) == sorted(before)
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_what_a_base_changing_strategy_evaluates_is_what_it_exports(name, tmp_path):
    """The global loss on the updated base equals that of the combined adapter on the base as it was loaded."""
    ranks = MIXED if name == "flora" else (2,)
    run = make_run(SoloGroup(), name, 4, 2, True, tmp_path, ranks)
    state = start_state(ranks)
    for _ in range(2):
        state, report = run_round(state, run)
    assert state.base_update is not None
    combined = combine(run.strategy.export(state), state.base_update)
    fresh = make_run(SoloGroup(), name, 4, 2, True, tmp_path, ranks)
    measured = fresh.global_test.measure(combined)
    total = sum(float(sums.loss.sum()) for sums in measured.values())
    tokens = sum(int(sums.tokens.sum()) for sums in measured.values())
    assert total / tokens == pytest.approx(report.global_test.mean, abs=1e-5)
    forgotten = fresh.global_test.measure(run.strategy.export(state))
    assert sum(float(sums.loss.sum()) for sums in forgotten.values()) / tokens != pytest.approx(
        report.global_test.mean, abs=1e-4
    ), "without the base update it would be another model"


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "local"])
def test_each_client_trains_the_ranks_of_its_tier(name, tmp_path):
    """The published FlexLoRA code trains one rank everywhere."""
    run = make_run(SoloGroup(), name, 5, 2, True, tmp_path, MIXED, arguments=ARGUMENTS.get(name))
    assert isinstance(run.tiers, Tiers)
    _, report = run_round(start_state(MIXED), run)
    width = 4 * (16 + 16)
    assert [client.lora_rank for client in report.clients] == [1, 4, 2, 1, 4]
    assert [client.trained_parameters for client in report.clients] == [width * r for r in (1, 4, 2, 1, 4)]
    assert all(client.downlink_bytes in (0, 4 * width * client.lora_rank) for client in report.clients)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [("fedavg", 256, 256), ("ffa", 128, 128), ("fedsa", 128, 128), ("local", 0, 0), ("scaffold", 256, 512)],
)
def test_bytes_are_those_of_what_travels(name, up, down, tmp_path):
    """Four modules of 16 x 16 at LoRA rank 2: 128 values a side."""
    run = make_run(SoloGroup(), name, 5, 2, True, tmp_path)
    _, report = run_round(start_state(), run)
    assert {client.uplink_bytes for client in report.clients} == {4 * up}
    assert {client.downlink_bytes for client in report.clients} == {4 * down}


def test_an_empty_cohort_changes_nothing_but_the_round(tmp_path):
    run = make_run(SoloGroup(), "fedavg", folder=tmp_path, probability=1e-12)
    state, report = run_round(start_state(), run)
    assert state.round_index == 1
    assert state.adapter.equal(start_state().adapter)
    assert report.clients == ()


def test_noise_is_added_to_an_empty_cohort_too(tmp_path):
    run = make_run(SoloGroup(), "ffa", folder=tmp_path, probability=1e-12, privacy=PrivacySettings(1.0, 1.0))
    state, _ = run_round(start_state(), run)
    assert all(factors.B.abs().max() > 0 for factors in state.adapter.values())


@pytest.mark.parametrize("name", SCHEDULED)
def test_clients_follow_a_schedule_of_ranks(name, tmp_path):
    run = make_run(SoloGroup(), name, 5, 2, True, tmp_path, (2, 4), arguments=ARGUMENTS.get(name))
    run = replace(run, tiers=with_phases(run.tiers, [(1, 0.5)]))
    state, seen = start_state((2, 4)), []
    for _ in range(3):
        state, report = run_round(state, run)
        seen.append([client.lora_rank for client in report.clients])
        assert math.isfinite(report.global_test.mean)
    assert seen[2] == [1, 2, 1, 2, 1]
    if name != "slora":  # its first rounds have no ranks
        assert seen[:2] == [[2, 4, 2, 4, 2], [1, 2, 1, 2, 1]]


@pytest.mark.parametrize("case", [case for case in CASES if case != "slora, then hetlora"])
def test_a_dry_run_says_what_clients_do_in_the_first_round(case, tmp_path):
    """All but the case whose clients differ within a tier."""
    options = dict(CASES[case])
    strategy, ranks = options.pop("strategy", case), options.pop("ranks", (2,))
    run = make_run(SoloGroup(), strategy, 5, 2, True, tmp_path / "clients", ranks, **options)
    state = start_state(ranks)
    summary = RunSummary("made up", 1000, state.adapter, run.data, run.cohort, run.tiers, run.strategy)
    _, report = run_round(state, run)
    assert report.clients
    for client in report.clients:
        tier = 0 if client.client_id == POOLED_CLIENT else client.client_id % len(ranks)
        told = summary.first_round[tier]
        assert (told.trained_parameters, told.received_bytes, told.sent_bytes) == (
            client.trained_parameters,
            client.downlink_bytes,
            client.uplink_bytes,
        )
    texts = "\n".join(summary.lines())
    if summary.first_round[0].sent_bytes != state.adapter.num_bytes:
        assert "in the first round a client receives" in texts
