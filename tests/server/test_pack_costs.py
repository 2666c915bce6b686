"""What packs will cost, learned from what they have cost."""

from dataclasses import replace

import numpy as np
import pytest

from fedsim.comm.placement import place
from fedsim.server.pack_costs import PackCosts
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.settings import LocalSettings, OptimizerSettings
from tests.cohorts import make_report

SETTINGS = LocalSettings(
    batch_size=4, accumulation=2, max_grad_norm=None, optimizer=OptimizerSettings(lr=1e-2), schedule="constant",
    warmup_steps=0, lora_dropout=0.0, base_dropout=False, seed=0,
)  # fmt: skip


def make_packs(seed: int, count: int = 12) -> list[Pack]:
    generator = np.random.default_rng(seed)
    packs = []
    for index in range(count):
        jobs = []
        for number in range(3):
            examples = int(generator.integers(1, 60))
            tokens = examples * int(generator.integers(5, 120))
            jobs.append(ClientJob(index * 3 + number, np.arange(examples), tokens, 1, None, tokens, SETTINGS))
        packs.append(Pack(index, tuple(jobs)))
    return packs


def ranks_of(packs: list[Pack], seed: int) -> dict[int, int]:
    generator = np.random.default_rng(seed)
    return {job.client_id: int(generator.choice([1, 8, 200])) for pack in packs for job in pack.jobs}


def seconds_of(job: ClientJob, lora_rank: int) -> float:
    """The truth of these tests."""
    steps = -(-len(job.examples) // 8)
    return 2e-4 * job.cost_tokens + 1e-6 * job.cost_tokens * lora_rank + 3e-3 * steps


def reports_of(packs: list[Pack], ranks: dict[int, int]) -> list:
    return [
        make_report(
            job.client_id, lora_rank=ranks[job.client_id], seconds=seconds_of(job, ranks[job.client_id])
        )
        for pack in packs
        for job in pack.jobs
    ]


def totals(packs: list[Pack], ranks: dict[int, int]) -> list[float]:
    return [sum(seconds_of(job, ranks[job.client_id]) for job in pack.jobs) for pack in packs]


def test_tokens_decide_until_enough_is_known_and_then_what_was_measured() -> None:
    costs = PackCosts()
    packs = make_packs(1)
    ranks = ranks_of(packs, 1)
    assert costs.expected(packs, ranks) == [float(pack.cost_tokens) for pack in packs]
    costs.learn(packs, reports_of(packs, ranks))

    later = make_packs(2)
    other = ranks_of(later, 2)
    np.testing.assert_allclose(costs.expected(later, other), totals(later, other), rtol=1e-6)


def test_a_round_without_packs_costs_nothing() -> None:
    """As when all clients are away, also once costs are known."""
    costs = PackCosts()
    packs = make_packs(1)
    costs.learn(packs, reports_of(packs, ranks_of(packs, 1)))
    assert costs.expected((), {}) == []


def test_places_better_than_tokens_do() -> None:
    costs = PackCosts()
    first = make_packs(3)
    costs.learn(first, reports_of(first, ranks_of(first, 3)))

    def slowest(expected: list[float], truth: list[float]) -> float:
        return max(sum(truth[index] for index in mine) for mine in place(expected, 4))

    by_tokens, by_model = [], []
    for seed in range(4, 24):
        packs = make_packs(seed)
        ranks = ranks_of(packs, seed)
        truth = totals(packs, ranks)
        by_tokens.append(slowest([float(pack.cost_tokens) for pack in packs], truth) / sum(truth) * 4)
        by_model.append(slowest(costs.expected(packs, ranks), truth) / sum(truth) * 4)
    assert np.mean(by_model) < np.mean(by_tokens)


def test_a_pack_with_a_lost_client_says_nothing() -> None:
    costs = PackCosts()
    packs = make_packs(5)
    ranks = ranks_of(packs, 5)
    whole = [report for report in reports_of(packs, ranks) if report.client_id % 3]
    costs.learn(packs, whole)
    assert costs.expected(packs, ranks) == [float(pack.cost_tokens) for pack in packs]


def test_measurements_that_mean_nothing_leave_the_tokens() -> None:
    costs = PackCosts()
    packs = make_packs(6)
    ranks = ranks_of(packs, 6)
    costs.learn(packs, [replace(report, seconds=0.0) for report in reports_of(packs, ranks)])
    assert costs.expected(packs, ranks) == [float(pack.cost_tokens) for pack in packs]


@pytest.mark.parametrize("local_steps", [7, 1])
def test_steps_are_those_of_the_client(local_steps: int) -> None:
    costs = PackCosts()
    packs = make_packs(7)
    ranks = ranks_of(packs, 7)

    def counted(pack: Pack) -> Pack:
        return Pack(
            pack.index, tuple(replace(job, local_epochs=None, local_steps=local_steps) for job in pack.jobs)
        )

    steps = [counted(pack) for pack in packs]
    costs.learn(
        steps, [make_report(job.client_id, seconds=0.5 * local_steps) for p in steps for job in p.jobs]
    )
    np.testing.assert_allclose(costs.expected(steps, ranks), [1.5 * local_steps] * len(steps), rtol=0.05)
