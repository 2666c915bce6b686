"""The embedded quick start: what `fedsim.main` does without a single argument, made smaller."""

import json
import math
from pathlib import Path

import pytest
import torch

from fedsim.main import main
from fedsim.models.embedded import embedded_base_folder


def test_quick_start_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base of 60 steps instead of 900, so that the test takes seconds, and 2 of 20 clients."""
    monkeypatch.setattr("fedsim.models.base.embedded_base_folder", lambda: embedded_base_folder(steps=60))
    threads = torch.get_num_threads()
    small = ["run.rounds=1", "cohort.size=2", "evaluation.client_test=off", "tracking.progress=off"]
    assert main([*small, f"run.output_dir={tmp_path}", "tracking.wandb.mode=disabled"]) == 0
    torch.set_num_threads(threads)
    folder = tmp_path / "quickstart"
    (record,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert math.isfinite(record["test/loss"])
    assert record["test/loss"] < record["test/loss_initial"] < math.log(1024)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
