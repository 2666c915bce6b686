"""Runs of several methods, killed at a moment that is drawn, and gone on with on another number of processes.

`python benchmarks/soak.py` does this a hundred times and more.
"""

import time
from typing import Any

import numpy as np
import pytest

from tests.faults.harness import Injection, differences, outcome, start

METHODS: dict[str, list[str]] = {
    "fedadam": ["aggregation.server_optimizer.name=fedadam"],
    "flexlora": ["strategy.name=flexlora", "lora.tiers=[{rank: 2}, {rank: 4}, {rank: 8}]"],
    "fedsa": ["strategy.name=fedsa"],
    "scaffold": [
        "strategy.name=scaffold", "training.optimizer.name=sgd", "training.max_grad_norm=null",
        "aggregation.client_weights=uniform",
    ],
    "private": [
        "aggregation.privacy.clip_norm=0.3", "aggregation.privacy.noise_multiplier=2.0", "cohort.sampling=poisson",
        "aggregation.client_weights=uniform",
    ],
}  # fmt: skip
"""Each keeps something besides the adapter: moments, clients' own factors, control variates, an accountant."""

COMMON = ["training.optimizer.lr=0.05", "lora.dropout=0.1", "run.rounds=4", "training.pack.num_packs=2"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_as_if_nothing_had_happened(
    method: str, program: Any, twin: Any, draw: np.random.Generator
) -> None:
    command = [*METHODS[method], *COMMON]
    in_a_checkpoint = Injection(
        "fedsim.server.checkpoint:save_checkpoint",
        "kill_later",
        call=int(draw.integers(2, 4)),
        value=float(draw.uniform(0.0, 0.02)),
    )
    ranks = start(program.arguments(command), 2, program.folder, [in_a_checkpoint]).wait(300.0)
    assert [ended.code for ended in ranks if ended.code in (0, None)] == [], ranks
    ranks = start(program.arguments(command), 1, program.folder, [])
    time.sleep(float(draw.uniform(0.0, 4.0)))
    ranks.signal(9)
    ranks.wait(60.0)

    assert program.run(*command) == 0

    assert differences(outcome(program.run_folder), twin(*command)) == []


def test_a_kill_between_the_last_checkpoint_and_the_deletion_of_an_old_one(program: Any, twin: Any) -> None:
    before_it_is_deleted = Injection("fedsim.server.checkpoint:prune_checkpoints", "kill", call=4)
    (ended,) = start(program.arguments(COMMON), 1, program.folder, [before_it_is_deleted]).wait(300.0)
    assert ended.code == -9
    left = sorted(path.name for path in (program.run_folder / "checkpoints").glob("round_*"))
    assert left[-1] == "round_000004"
    assert len(left) > len(twin(*COMMON)["checkpoints"]), "the old one is still there"

    assert program.run(*COMMON) == 0

    assert differences(outcome(program.run_folder), twin(*COMMON)) == []
