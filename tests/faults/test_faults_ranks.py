"""One rank fails or is killed, in every phase of a run: all ranks end, the reason is told, and the run can go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Injection, differences, outcome, run

DEADLINE_S = 240.0
"""Far below `comm.timeout_s` in these runs, and far above what a loaded machine needs for start-up and two rounds."""

LEARNING = ["training.optimizer.lr=0.05", "lora.dropout=0.1", "comm.timeout_s=600"]

PHASES: dict[str, Injection] = {
    "loading the base": Injection("fedsim.simulation.prepare:build_base", "raise", rank=1),
    "setting up": Injection("fedsim.simulation.entry:build_run", "raise", rank=1),
    "starting the records": Injection("fedsim.simulation.reporting:describe_environment", "raise", rank=0),
    "evaluation before the first round": Injection("fedsim.simulation.rounds:measure_global", "raise", rank=1),
    "training": Injection("fedsim.server.round:_train_packs", "raise", rank=1, call=2),
    "gathering reports": Injection("fedsim.server.round:gather_reports", "raise", rank=1, call=2),
    "gathering factors": Injection("fedsim.comm.exchange:_start_module", "raise", rank=1, call=6),
    "receiving factors on the server": Injection("fedsim.comm.exchange:_start_module", "raise", rank=0, call=6),
    "aggregation": Injection("fedsim.aggregation.fedavg:FedAvg.aggregate", "raise", rank=0, call=2),
    "broadcast": Injection("fedsim.server.aggregation:broadcast_state", "raise", rank=1, call=2),
    "evaluation": Injection("fedsim.evaluation.losses:LossEvaluator.measure", "raise", rank=1, call=3),
    "merging losses": Injection("fedsim.server.round:merge_batches", "raise", rank=1, call=3),
    "recording": Injection("fedsim.tracking.metrics:MetricsLog.append", "raise", rank=0, call=2),
    "checkpoint": Injection("fedsim.server.checkpoint:replace_folder", "raise", rank=0, call=2),
    "export": Injection("fedsim.simulation.export:save_peft_adapter", "raise", rank=0),
}  # fmt: skip
"""Phase -> what happens, in the second round where the phase has rounds."""

KILLED: dict[str, Injection] = {
    "a rank in training": Injection("fedsim.server.round:_train_packs", "kill", rank=1, call=2),
    "the server in a checkpoint": Injection("fedsim.server.checkpoint:replace_folder", "kill", rank=0, call=2),
    "a rank in the gather": Injection("fedsim.comm.exchange:_start_module", "kill", rank=1, call=6),
}  # fmt: skip


def goes_on(program: Any, twin: Callable[..., dict[str, Any]]) -> None:
    """The same command on one process ends with the same bits as a run without a fault."""
    assert program.run(*LEARNING) == 0
    assert differences(outcome(program.run_folder), twin(*LEARNING)) == []


@pytest.mark.parametrize("phase", PHASES)
def test_an_error_on_one_rank_ends_all(phase: str, program: Any, twin: Any) -> None:
    injection = PHASES[phase]
    ranks = run(program.arguments(LEARNING), 2, program.folder, [injection], DEADLINE_S)
    for rank, (code, errors) in enumerate((ended.code, ended.errors) for ended in ranks):
        assert code is not None, f"rank {rank} hangs:\n{errors}"
        assert code != 0, errors
    assert "was hurt on purpose" in ranks[injection.rank].errors
    goes_on(program, twin)


@pytest.mark.parametrize("case", KILLED)
def test_a_killed_rank_ends_the_others(case: str, program: Any, twin: Any) -> None:
    injection = KILLED[case]
    ranks = run(program.arguments(LEARNING), 2, program.folder, [injection], DEADLINE_S)
    assert ranks[injection.rank].code == -9
    other = ranks[1 - injection.rank]
    assert other.code not in (0, None), other.errors
    goes_on(program, twin)


def test_the_status_says_what_is_known(program: Any) -> None:
    """A run whose server was killed reads as running; the next start says in the history that it vanished."""
    run(program.arguments(LEARNING), 2, program.folder, [KILLED["the server in a checkpoint"]], DEADLINE_S)
    record: Callable[[], Any] = lambda: json.loads(Path(program.run_folder / "run.json").read_text())  # noqa: E731
    assert record()["status"] == "running"
    assert program.run(*LEARNING) == 0
    (vanished,) = record()["history"]
    assert (vanished["status"], vanished["world_size"]) == ("failed", 2)
