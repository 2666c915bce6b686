"""What the tests of faults share: the small program of the end-to-end tests, its twins, and what is drawn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import Program, corpus_file, model_folder, program, snapshot
from tests.faults.harness import outcome

__all__ = ["corpus_file", "model_folder", "program", "snapshot"]


DRAWN_FROM = ("test_an_error_on_one_rank_ends_all", "test_a_killed_rank_ends_the_others")
"""Tests with many cases of which a session runs --fault-share, drawn by --fault-seed."""


ALL_ONLY = ("test_torchrun_starts_the_ranks_again",)
"""Tests that need half a minute on two cores: only where all faults are tried."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if "/tests/faults/" in str(item.path)]
    for item in ours:
        item.add_marker(pytest.mark.faults)
        item.add_marker(pytest.mark.timeout(900))
    share = float(config.getoption("--fault-share"))
    left_out = {item for item in ours if share < 1 and item.name in ALL_ONLY}
    for name in DRAWN_FROM:
        cases = [item for item in ours if getattr(item, "originalname", None) == name]
        number = max(1, round(share * len(cases)))
        order = np.random.default_rng(int(config.getoption("--fault-seed"))).permutation(len(cases))
        left_out |= {cases[index] for index in order[number:]}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def outcomes() -> dict[tuple[str, ...], dict[str, Any]]:
    """Outcomes of runs without a fault, by their arguments."""
    return {}


@pytest.fixture
def twin(
    program: Program,
    outcomes: dict[tuple[str, ...], dict[str, Any]],
) -> Callable[..., dict[str, Any]]:
    """The outcome of the program with these arguments and without a fault; worked out once."""

    def of(*arguments: str) -> dict[str, Any]:
        if arguments not in outcomes:
            assert program.run(*arguments, "run.name=twin") == 0
            outcomes[arguments] = outcome(program.run_folder.with_name("twin"))
        return outcomes[arguments]

    return of


@pytest.fixture
def draw(request: pytest.FixtureRequest) -> np.random.Generator:
    """What is drawn at random in a test: by --fault-seed and the name of the test."""
    seed = int(request.config.getoption("--fault-seed"))
    return np.random.default_rng([seed, *request.node.name.encode()])
