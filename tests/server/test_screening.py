"""Broken and oversized updates: what the server does with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.aggregation.private import PrivacySettings
from fedsim.comm.group import Group, SoloGroup
from fedsim.errors import TrainingError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.server.cohort import CohortPolicy
from fedsim.server.metrics import round_metrics
from fedsim.server.round import run_round
from fedsim.server.screening import Corruption, Screening, scaled_update, update_norm
from tests.helpers import run_ranks
from tests.server.test_round import NUM_CLIENTS, bits_of, make_run, start_state


def adapter(seed: int, modules: int = 2) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return AdapterState(
        {
            f"m{i}": LoraFactors(
                torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator), 8.0
            )
            for i in range(modules)
        }
    )


def test_the_norm_is_over_all_factors_together():
    start, trained = adapter(0), adapter(1)
    flat = [
        np.concatenate(
            [np.asarray(f.A).ravel() for f in x.values()] + [np.asarray(f.B).ravel() for f in x.values()]
        )
        for x in (start, trained)
    ]
    expected = np.linalg.norm(flat[1].astype(np.float64) - flat[0])
    assert update_norm(start, trained) == pytest.approx(expected, rel=1e-12)
    by_module = max(np.linalg.norm(trained[m].A - start[m].A) for m in start)
    assert update_norm(start, trained) > by_module


def test_scaling_down_moves_towards_the_start():
    start, trained = adapter(0), adapter(1)
    half = scaled_update(start, trained, 0.5)
    for module, factors in half.items():
        assert torch.allclose(factors.A, (start[module].A + trained[module].A) / 2)
        assert torch.allclose(factors.B, (start[module].B + trained[module].B) / 2)
        assert factors.scaling == 8.0
    taken, was_clipped = Screening("fail", 0.25, "clip").screen(start, trained, 3, 0)
    assert was_clipped
    assert update_norm(start, taken) == pytest.approx(0.25, rel=1e-6)
    assert not torch.allclose(taken["m0"].A, trained["m0"].A * 0.25 / update_norm(start, trained)), (
        "not of the adapter"
    )


def test_an_update_within_the_limit_is_taken_as_it_is():
    start, trained = adapter(0), adapter(1)
    taken, was_clipped = Screening("fail", 1e3, "clip").screen(start, trained, 3, 0)
    assert taken is trained
    assert not was_clipped


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_what_is_not_finite_is_refused_or_left_out(kind, caplog):
    start, trained = adapter(0), adapter(1)
    broken = Corruption(1.0, kind, 1.0, 0).apply(start, trained)
    assert update_norm(start, trained) < 1e9, "the client's own adapter stays as it was"
    with pytest.raises(
        TrainingError, match=r"update of client 3 must be finite, .* in round 7; or set training.on_not"
    ):
        Screening("fail").screen(start, broken, 3, 7)
    assert Screening("drop").screen(start, broken, 3, 7) == (None, False)
    assert "client 3" in caplog.text
    assert Screening("drop", 1.0, "clip").screen(start, broken, 3, 7) == (None, False), (
        "nothing to scale down"
    )


def test_what_is_too_large_is_refused_or_left_out():
    start, trained = adapter(0), adapter(1)
    with pytest.raises(TrainingError, match=r"training.max_update_norm=1, got [0-9.]+ in round 2; or set"):
        Screening("fail", 1.0, "fail").screen(start, trained, 3, 2)
    assert Screening("fail", 1.0, "drop").screen(start, trained, 3, 2) == (None, False)


def test_updates_are_corrupted_as_often_as_asked_for():
    corruption = Corruption(0.2, "nan", 1.0, 4)
    hits = [corruption.hits(client, index) for client in range(100) for index in range(40)]
    assert abs(np.mean(hits) - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)


def corrupted_rounds(group: Group, kind: str = "nan", policy: str = "drop") -> list:
    run = replace(
        make_run(group, size=4),
        corruption=Corruption(0.4, kind, 1e4, 1),
        screening=Screening("drop", 5.0, policy),
    )
    state, told = start_state(), []
    for _ in range(3):
        state, report = run_round(state, run)
        told.append((report.num_corrupted, report.num_clipped, report.num_dropped, len(report.clients)))
    return [bits_of(state), told, round_metrics(report, None)["cohort/num_corrupted"]]


@pytest.mark.parametrize(("kind", "policy"), [("nan", "drop"), ("scaled", "clip")])
def test_broken_updates_are_counted_and_the_same_on_any_number_of_processes(kind, policy, tmp_path):
    alone = corrupted_rounds(SoloGroup(), kind, policy)
    for corrupted, clipped, dropped, clients in alone[1]:
        assert corrupted == (dropped if policy == "drop" else clipped)
        assert clients == 4 - dropped
    assert sum(corrupted for corrupted, *_ in alone[1]) > 0
    for result in run_ranks(corrupted_rounds, 2, tmp_path, kind, policy):
        assert result == alone


def test_a_client_that_is_left_out_changes_nothing():
    """The round equals one of the other clients alone."""
    run = make_run(SoloGroup(), size=4)
    corruption = Corruption(0.4, "inf", 1.0, 1)
    state, report = run_round(start_state(), replace(run, corruption=corruption, screening=Screening("drop")))
    others = tuple(client.client_id for client in report.clients)
    assert 0 < report.num_corrupted == 4 - len(others)
    alone, _ = run_round(start_state(), replace(run, cohort=CohortPolicy(NUM_CLIENTS, len(others), others)))
    assert bits_of(state) == bits_of(alone)


@pytest.mark.parametrize("strategy", ["fedsa", "local"])
@pytest.mark.parametrize(("kind", "policy"), [("scaled", "clip"), ("scaled", "fail"), ("nan", "drop")])
def test_what_stays_with_a_client_is_as_it_trained_it(strategy, kind, policy, tmp_path):
    """Updates break on their way to the server."""
    kept = {}
    for name, around in (
        ("healthy", {}),
        (
            "broken",
            {
                "corruption": Corruption(1.0, kind, 100.0, 1),
                "screening": Screening("drop", 0.01 if policy == "clip" else None, policy),
            },
        ),
    ):
        run = replace(make_run(SoloGroup(), strategy, folder=tmp_path / name), **around)
        state, report = run_round(start_state(), run)
        versions = state.client_versions
        assert len(versions) == 4
        assert report.num_corrupted == (4 if name == "broken" else 0)
        kept[name] = {client: run.store.load(client, versions) for client in versions}
    for client, tensors in kept["healthy"].items():
        for key, values in tensors.items():
            assert torch.equal(kept["broken"][client][key], values), (client, key)


@pytest.mark.parametrize(
    "around",
    [{"corruption": Corruption(1.0, "scaled", 100.0, 1)}, {"screening": Screening("fail", 0.1, "clip")}],
    ids=["corrupted", "scaled-down"],
)
def test_differential_privacy_clips_what_arrives(around):
    """A broken update moves the global adapter no further than a healthy one may: four clients of four expected."""
    clip_norm = 1e-3
    private = make_run(SoloGroup(), size=4, privacy=PrivacySettings(clip_norm, 0.0))
    state, report = run_round(start_state(), replace(private, **around))
    open_to_all, _ = run_round(start_state(), replace(make_run(SoloGroup(), size=4), **around))

    assert report.num_corrupted + report.num_clipped == len(report.clients) == 4
    assert 0 < update_norm(start_state().adapter, state.adapter) <= clip_norm * (1 + 1e-3)
    assert update_norm(start_state().adapter, open_to_all.adapter) > 10 * clip_norm, (
        "contrast: without clipping"
    )


def test_bytes_of_updates_that_are_left_out_are_counted():
    run = make_run(SoloGroup())
    broken = replace(run, corruption=Corruption(0.5, "nan", 1.0, 1), screening=Screening("drop"))
    state = start_state()
    _, report = run_round(state, broken)
    metrics = round_metrics(report, None)
    assert 0 < report.num_dropped < 4
    for direction in ("up", "down"):
        assert metrics[f"comm/{direction}link_bytes"] == 4 * state.adapter.num_bytes
