"""A local Slurm for the tests of jobs, and a run of a few seconds for the jobs to do."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from fedsim.main import main
from tests.helpers import random_texts, tiny_opt, word_tokenizer
from tests.slurm.jobs import Result, Sbatch, Work, result_of
from tests.slurm.local_slurm import ClusterError, LocalSlurm

REQUIRED = "FEDSIM_TEST_SLURM"
"""Environment variable: `required` makes the tests fail, not skip, where no cluster can be started."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slurm-full"):
        return
    for item in items:
        if "slurm_full" in item.keywords:
            item.add_marker(
                pytest.mark.skip(reason="part of the full matrix: pytest tests/slurm --slurm-full")
            )


def start_cluster(user_signal: bool) -> Iterator[LocalSlurm]:
    """A cluster of two nodes, which ends with the tests whatever happens to them."""
    folder = Path(tempfile.mkdtemp(prefix="fedsim-slurm-"))
    cluster = LocalSlurm(folder, user_signal=user_signal)
    try:
        try:
            cluster.up(owner=os.getpid())
        except ClusterError:  # somebody else may have taken a port between the choice and its use
            cluster.up(owner=os.getpid())
    except ClusterError as error:
        shutil.rmtree(folder)
        if os.environ.get(REQUIRED) == "required":
            raise
        pytest.skip(f"needs a Slurm that starts on this machine: {error}")
    try:
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def _signalling() -> Iterator[LocalSlurm]:
    yield from start_cluster(user_signal=True)


@pytest.fixture(scope="session")
def _plain() -> Iterator[LocalSlurm]:
    yield from start_cluster(user_signal=False)


@pytest.fixture
def cluster(_signalling: LocalSlurm) -> Iterator[LocalSlurm]:
    """Two idle nodes; a job that is preempted gets the signal it asked for."""
    yield _signalling
    _signalling.reset()


@pytest.fixture
def plain_cluster(_plain: LocalSlurm) -> Iterator[LocalSlurm]:
    """The same with Slurm's defaults: when a job is preempted, SIGTERM goes to its steps, and nothing to its script."""
    yield _plain
    _plain.reset()


@pytest.fixture(scope="session")
def _small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_opt().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [json.dumps({"text": text}) for text in random_texts(200)]
    (folder / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    settings = {
        "run": {"device": "cpu"},
        "model": {"name_or_path": str(folder / "model")},
        "data": {
            "source": str(folder / "texts.jsonl"),
            "max_tokens": 24,
            "partition": {"num_clients": 6, "num_length_classes": 3},
        },
        "cohort": {"size": 4},
        "training": {"batch_size": 4, "optimizer": {"lr": 0.05}},
        "lora": {"dropout": 0.1},
        "tracking": {"progress": "off", "wandb": {"mode": "disabled"}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def _alone(_small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    runs = tmp_path_factory.mktemp("alone")

    def run(rounds: int, *overrides: str) -> Result:
        name = re.sub("[^a-z0-9.]+", "-", "-".join([f"rounds-{rounds}", *overrides]))
        threads = torch.get_num_threads()
        code = main(
            [
                str(_small_config),
                f"run.output_dir={runs}",
                f"run.name={name}",
                f"run.rounds={rounds}",
                *overrides,
            ]
        )
        torch.set_num_threads(threads)
        assert code == 0
        result = result_of(runs / name)
        assert len({record["test/loss"] for record in result.losses}) == rounds, (
            "a run that learns nothing proves nothing"
        )
        return result

    return cache(run)


@pytest.fixture
def work(_small_config: Path, _alone: Callable[..., Result], tmp_path: Path) -> Work:
    """The configuration, an empty folder for runs, and what the runs must give."""
    return Work(_small_config, tmp_path / "runs", _alone)


@pytest.fixture
def sbatch(work: Work) -> Sbatch:
    """Submit a job that runs fedsim."""
    return Sbatch(work)
