"""The workload that `benchmarks/peers.py` hands to the peers, and what the plainest of them makes of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fedsim.comm.group import SoloGroup
from fedsim.config.loader import load_config
from fedsim.data.build import build_data
from fedsim.models.tokenizer import build_tokenizer
from fedsim.server.build import build_local_training
from fedsim.server.cohort import client_jobs
from fedsim.simulation.entry import simulate
from tests.helpers import random_texts, tiny_opt, word_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 2


def load_driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_peers", ROOT / "benchmarks" / "peers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("peers") / "workload"
    model = folder.parent / "base"
    tiny_opt(dropout=0.0, attention_dropout=0.0).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    texts = folder.parent / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in random_texts(60)]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    extra = (f"model.name_or_path={model}", f"data.source={texts}", "data.max_tokens=32")
    keys = load_driver().write_workload(folder, 3, 5, False, rounds=ROUNDS, extra=extra)
    return folder, keys


def test_written_batches_are_those_of_fedsim(workload: tuple[Path, list[str]]) -> None:
    folder, keys = workload
    config = load_config(None, keys)
    data = build_data(config.data, build_tokenizer(config.model), config.run.seed)
    jobs = client_jobs(range(3), data, *build_local_training(config))
    written = json.loads((folder / "batches.json").read_text(encoding="utf-8"))
    assert [len(clients) for clients in written] == [3] * ROUNDS
    for round_index, clients in enumerate(written):
        for job, steps in zip(jobs, clients, strict=True):
            flat = [sequence for step in steps for sequence in step]
            order = [int(i) for step in job.batches(round_index) for part in step for i in part]
            assert [len(step) for step in steps] == [4, 1]
            assert len(flat) == len(order) == 5
            for sequence, index in zip(flat, order, strict=True):
                assert sequence == data.train.sequence(index).tolist()
    assert written[0] != written[1], "the order is drawn anew each round"


def test_plain_peer_ends_with_the_adapter_of_fedsim(workload: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, keys = workload
    simulate(load_config(None, [*keys, f"run.output_dir={tmp_path}", "run.name=run"]), SoloGroup())
    out = tmp_path / "plain"
    out.mkdir()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"),
        *(str(ROOT / "benchmarks/peers/plain_peft.py"), str(folder), str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    driver = load_driver()
    ours: dict[str, Any] = driver._adapter("fedsim", tmp_path)
    theirs: dict[str, Any] = driver._adapter("plain_peft", out)
    assert (out / "rounds.txt").read_text(encoding="utf-8") == "round\n" * ROUNDS
    assert driver.difference(ours, theirs) < 1e-4
    moved = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in ours.items()}
    assert driver.difference(ours, moved) > 1e-2, "without training it would not"
