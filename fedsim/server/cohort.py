"""Which clients take part in a round, and what each of them does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data.build import FederatedData
from fedsim.errors import ConfigError
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.seeding import numpy_generator
from fedsim.training.packs import ClientJob
from fedsim.training.settings import LocalSettings


@dataclass(frozen=True, slots=True)
class CohortPolicy:
    """How cohorts are chosen.

    Attributes:
        num_clients: all clients of the federation.
        size: clients of a round; the expected number where they are drawn independently.
        client_ids: the same clients in every round, or None to draw them.
        probability: with which each client is drawn by itself (Poisson sampling), or None for exactly `size` clients.
        as_published: draw what the code of arXiv 2402.11505 draws; see `published_seed`.
    """

    num_clients: int
    size: int
    client_ids: tuple[int, ...] | None = None
    probability: float | None = None
    as_published: bool = False


@dataclass(frozen=True, slots=True)
class LocalBudget:
    """How much a client trains in a round: exactly one of epochs and steps.

    Attributes:
        local_epochs: passes over its examples.
        local_steps: optimizer steps.
        examples_per_step: examples that an optimizer step sees; fewer at the end of a pass over them.
    """

    local_epochs: int | None
    local_steps: int | None
    examples_per_step: int

    def examples_seen(self, num_examples: int) -> int:
        """Examples that a client with `num_examples` processes in a round, repetitions counted."""
        if self.local_epochs is not None:
            return num_examples * self.local_epochs
        assert self.local_steps is not None
        passes, steps = divmod(self.local_steps, -(-num_examples // self.examples_per_step))
        return passes * num_examples + steps * self.examples_per_step


def check_warmup(warmup_steps: int, budget: LocalBudget, largest: int) -> None:
    """Check that some client comes to the end of its warm-up.

    Args:
        warmup_steps: `training.schedule.warmup_steps`.
        budget: of a client and round.
        largest: training examples of the largest client.

    Raises:
        ConfigError: none does.
    """
    if budget.local_epochs is None:
        return  # checked with the configuration
    steps = budget.local_epochs * -(-largest // budget.examples_per_step)
    if warmup_steps > steps:
        raise ConfigError(
            f"training.schedule.warmup_steps must be at most the {steps} steps that the largest client makes in a "
            f"round, or its learning rate never comes to training.optimizer.lr, got {warmup_steps}"
        )


def sample_cohort(
    policy: CohortPolicy, seed: int, round_index: int, available: NDArray[np.int64] | None = None
) -> tuple[int, ...]:
    """The clients of a round in ascending order, as `policy` says; none at all may come out of Poisson sampling.

    The draw depends on (seed, round) and on who is available.

    Args:
        policy: how cohorts are chosen.
        seed: of the run.
        round_index: from 0.
        available: clients that can be drawn, ascending; None for all. Where they are fewer than `policy` asks for, all
            of them are drawn.
    """
    if available is not None and len(available) < policy.num_clients:
        return _among(available, policy, seed, round_index)
    if policy.client_ids is not None:
        return tuple(sorted(policy.client_ids))
    if policy.probability is not None:
        tosses = numpy_generator(seed, "cohort", round_index).random(policy.num_clients)
        return tuple(np.flatnonzero(tosses < policy.probability).tolist())
    if policy.as_published:
        legacy = np.random.RandomState(published_seed(seed, round_index))
        return tuple(sorted(legacy.choice(policy.num_clients, size=policy.size, replace=False).tolist()))
    drawn = numpy_generator(seed, "cohort", round_index).choice(
        policy.num_clients, size=policy.size, replace=False, shuffle=False
    )
    return tuple(sorted(int(client_id) for client_id in drawn))


def _among(
    available: NDArray[np.int64], policy: CohortPolicy, seed: int, round_index: int
) -> tuple[int, ...]:
    """The cohort where some clients cannot be drawn."""
    if policy.client_ids is not None:
        return tuple(sorted(set(policy.client_ids) & set(available.tolist())))
    generator = numpy_generator(seed, "cohort", round_index)
    if policy.probability is not None:
        tosses = generator.random(policy.num_clients)
        return tuple(available[tosses[available] < policy.probability].tolist())
    size = min(policy.size, len(available))
    return tuple(np.sort(generator.choice(available, size=size, replace=False, shuffle=False)).tolist())


def published_seed(seed: int, round_index: int) -> int:
    """Seed of a round's cohort in the code of arXiv 2402.11505, for numpy's legacy generator.

    Its own seed, 42, does not enter, and round 0 has the same cohort whatever the seed.
    """
    return round_index if seed == 42 else round_index * (seed + 200) * 20


def client_jobs(
    cohort: Sequence[int], data: FederatedData, budget: LocalBudget, settings: LocalSettings
) -> tuple[ClientJob, ...]:
    """One job for each client of the cohort, in its order."""
    return tuple(
        _job(client_id, data.partition.train(client_id), data, budget, settings) for client_id in cohort
    )


def pooled_job(
    cohort: Sequence[int], data: FederatedData, budget: LocalBudget, settings: LocalSettings, round_index: int
) -> tuple[ClientJob, ...]:
    """One job for the virtual client with all clients' examples, with the budget of the cohort.

    It draws as many examples as the cohort would process, without replacement until the pool is used up, from the
    stream (seed, round). No job where the cohort is empty.
    """
    pool = np.sort(data.partition.train_indices)
    if not cohort:
        return ()
    wanted = sum(budget.examples_seen(len(data.partition.train(client_id))) for client_id in cohort)
    generator = numpy_generator(settings.seed, "pool", round_index)
    passes = [generator.permutation(pool) for _ in range(-(-wanted // len(pool)))]
    examples = np.concatenate(passes)[:wanted]
    once = LocalBudget(1, None, budget.examples_per_step)
    return (_job(POOLED_CLIENT, examples, data, once, settings),)


def _job(
    client_id: int,
    examples: np.ndarray[tuple[int], np.dtype[np.int64]],
    data: FederatedData,
    budget: LocalBudget,
    settings: LocalSettings,
) -> ClientJob:
    num_tokens = int(data.train.num_tokens[examples].sum())
    seen = budget.examples_seen(len(examples))
    return ClientJob(
        client_id=client_id,
        examples=examples,
        num_tokens=int(data.train.num_label_tokens[examples].sum()),
        local_epochs=budget.local_epochs,
        local_steps=budget.local_steps,
        cost_tokens=num_tokens * seen // len(examples),
        settings=settings,
    )
