"""Cohort sampling and jobs."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fedsim.config.loader import load_config
from fedsim.data.batches import local_batches
from fedsim.errors import ConfigError
from fedsim.server.build_clients import build_cohort_policy
from fedsim.server.build_tests import sample_examples
from fedsim.server.cohort import CohortPolicy, LocalBudget, client_jobs, pooled_job, sample_cohort
from fedsim.training.packs import pack_cohort
from fedsim.training.settings import LocalSettings, OptimizerSettings
from tests.server.test_round import make_data

SETTINGS = LocalSettings(4, 1, None, OptimizerSettings(), "constant", 0, 0.0, False, 0)


@given(st.integers(1, 300), st.data(), st.integers(0, 2**40), st.integers(0, 1000))
def test_a_cohort_is_drawn_without_replacement(num_clients, data, seed, round_index):
    size = data.draw(st.integers(1, num_clients))
    cohort = sample_cohort(CohortPolicy(num_clients, size), seed, round_index)
    assert len(set(cohort)) == size
    assert list(cohort) == sorted(cohort)
    assert set(cohort) <= set(range(num_clients))
    assert cohort == sample_cohort(CohortPolicy(num_clients, size), seed, round_index)


def test_every_client_is_drawn_about_equally_often():
    policy = CohortPolicy(20, 2)
    counts = np.bincount([k for r in range(2000) for k in sample_cohort(policy, 3, r)], minlength=20)
    assert counts.sum() == 4000
    assert abs(counts - 200).max() < 5 * np.sqrt(200 * 0.95)


def test_cohorts_differ_by_round_and_seed():
    policy = CohortPolicy(1613, 80)
    drawn = {sample_cohort(policy, seed, r) for seed in range(3) for r in range(3)}
    assert len(drawn) == 9


def test_a_fixed_list_is_the_cohort_of_every_round():
    policy = CohortPolicy(20, 3, (7, 1, 4))
    assert sample_cohort(policy, 0, 0) == sample_cohort(policy, 9, 9) == (1, 4, 7)


def test_cohorts_of_flexloras_code():
    """Sums and first clients that its `client_selection` gives, run once with its own seed."""
    policy = build_cohort_policy(load_config(None, PUBLISHED).cohort, 1613)
    assert policy == CohortPolicy(1613, 80, as_published=True)
    drawn = {t: sample_cohort(policy, 42, t) for t in (0, 1, 15)}
    assert {t: sum(cohort) for t, cohort in drawn.items()} == {0: 67631, 1: 65116, 15: 66154}
    assert drawn[0][:8] == (18, 53, 76, 113, 175, 191, 204, 219)
    assert drawn[1][:4] == (8, 60, 75, 108)
    assert all(len(set(cohort)) == 80 and max(cohort) < 1613 for cohort in drawn.values())
    seen = [
        len({k for t in range(rounds) for k in sample_cohort(policy, 42, t)}) for rounds in (10, 20, 30, 50)
    ]
    assert seen == [640, 1038, 1260, 1480]
    assert sample_cohort(policy, 7, 0) == drawn[0], "as published: round 0 is the same for all seeds"
    other = np.random.RandomState(3 * 207 * 20).choice(np.arange(1613), 80, replace=False)
    assert sample_cohort(policy, 7, 3) == tuple(sorted(other.tolist()))
    assert sample_cohort(CohortPolicy(1613, 80), 42, 0) != drawn[0], "contrast: our own stream"


PUBLISHED = ["cohort.sampling=flexlora", "cohort.fraction=0.05", "data.partition.num_clients=1613"]


def test_what_flexloras_code_cannot_draw_is_refused():
    with pytest.raises(ConfigError, match="run.seed must be at most 4382419 with cohort.sampling=flexlora"):
        load_config(None, [*PUBLISHED, "run.rounds=50", "run.seed=4382420"])
    largest = load_config(None, [*PUBLISHED, "run.rounds=50", "run.seed=4382419"])
    sample_cohort(build_cohort_policy(largest.cohort, 1613), largest.run.seed, 49)
    with pytest.raises(
        ConfigError, match="cohort.sampling must be fixed when cohort.client_ids is set, got 'flex"
    ):
        load_config(None, ["cohort.sampling=flexlora", "cohort.client_ids=[1]"])


def test_size_from_the_configuration():
    def size(*overrides: str, clients: int = 20) -> int:
        return build_cohort_policy(load_config(None, overrides).cohort, clients).size

    assert size("cohort.size=3") == 3
    assert size("cohort.fraction=0.05", clients=1613) == 80, "arXiv 2402.11505: int(80.65)"
    assert size("cohort.fraction=0.3", clients=10) == 3, "0.3 * 10 is below 3 in floating point"
    assert size("cohort.fraction=0.01") == 1
    assert size("cohort.client_ids=[2,5]") == 2


def test_jobs_hold_what_the_partition_says():
    data = make_data()
    jobs = client_jobs((0, 3), data, LocalBudget(2, None, 4), SETTINGS)
    assert [list(job.examples) for job in jobs] == [[0, 1], list(range(12, 20))]
    assert jobs[1].num_tokens == data.client_label_tokens(3)
    assert jobs[1].cost_tokens == 2 * data.client_tokens(3)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 30))
def test_the_budget_is_what_the_batches_hold(num_examples, batch_size, accumulation, local_steps):
    steps = local_batches(
        num_examples,
        batch_size=batch_size,
        local_epochs=None,
        local_steps=local_steps,
        accumulation=accumulation,
        seed=0,
        round_index=0,
        client_id=0,
    )
    seen = sum(len(batch) for step in steps for batch in step)
    assert LocalBudget(None, local_steps, batch_size * accumulation).examples_seen(num_examples) == seen


def test_the_pool_has_the_cohorts_budget_and_repeats_nothing_before_it_must():
    data = make_data()
    [job] = pooled_job((0, 3), data, LocalBudget(1, None, 4), SETTINGS, round_index=0)
    assert len(job.examples) == len(set(job.examples.tolist())) == 10
    [longer] = pooled_job((0, 1, 2, 3, 4), data, LocalBudget(2, None, 4), SETTINGS, round_index=0)
    assert np.array_equal(np.bincount(longer.examples), np.full(30, 2))
    [steps] = pooled_job((0, 3), data, LocalBudget(None, 3, 4), SETTINGS, round_index=1)
    assert len(steps.examples) == 3 * 2 + (8 + 4), (
        "client 0 holds 2 examples, less than a step; client 3 holds 8"
    )
    assert pooled_job((), data, LocalBudget(1, None, 4), SETTINGS, round_index=1) == (), (
        "Poisson sampling's empty round"
    )
    [again] = pooled_job((0, 3), data, LocalBudget(1, None, 4), SETTINGS, round_index=1)
    assert set(again.examples.tolist()) != set(job.examples.tolist())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 9))
def test_packs_hold_each_client_once_and_depend_on_the_cohort_alone(sizes, num_packs):
    from fedsim.training.packs import ClientJob

    jobs = [ClientJob(k, np.arange(size), size, 1, None, size, SETTINGS) for k, size in enumerate(sizes)]
    packs = pack_cohort(jobs, num_packs)
    assert sorted(job.client_id for pack in packs for job in pack.jobs) == list(range(len(sizes)))
    assert len(packs) == min(num_packs, len(sizes))
    assert max(pack.cost_tokens for pack in packs) - min(pack.cost_tokens for pack in packs) <= max(sizes)
    assert [pack.index for pack in packs] == list(range(len(packs)))
    shuffled = pack_cohort(jobs[::-1], num_packs)
    assert [[job.client_id for job in pack.jobs] for pack in shuffled] == [
        [job.client_id for job in pack.jobs] for pack in packs
    ]


def test_sampled_examples():
    assert sample_examples(5, None, 0, "x").tolist() == [0, 1, 2, 3, 4]
    assert sample_examples(5, 9, 0, "x").tolist() == [0, 1, 2, 3, 4]
    drawn = sample_examples(1000, 10, 0, "x")
    assert len(set(drawn.tolist())) == 10
    assert sorted(drawn.tolist()) == drawn.tolist()
    assert drawn.tolist() != sample_examples(1000, 10, 1, "x").tolist()


def test_poisson_sampling_tosses_for_each_client():
    policy = CohortPolicy(50, 10, None, probability=0.2)
    cohorts = [sample_cohort(policy, 7, round_index) for round_index in range(2000)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    assert abs(sizes.mean() - 10) < 4 * np.sqrt(50 * 0.2 * 0.8 / 2000)
    assert abs(sizes.var() - 8) < 1.2, "binomial, not fixed"
    counts = np.bincount(np.concatenate(cohorts), minlength=50)
    assert np.all(np.abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8))
    assert all(list(cohort) == sorted(set(cohort)) for cohort in cohorts[:50])
    assert sample_cohort(CohortPolicy(3, 1, None, probability=1e-12), 0, 0) == ()
