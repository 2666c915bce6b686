"""Settings for all tests: one thread, no network, a cache of their own, and how workers of pytest-xdist share them.

Nothing but what hangs fails by the clock: the limits of pytest-timeout and of tests are many times what they take.
"""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCH_CPP_LOG_LEVEL"] = (
    "ERROR"  # as fedsim.main does, for the server that test processes are forked from
)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.scheduler.protocol import Scheduling

torch.set_num_threads(1)

settings.register_profile("fedsim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedsim")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refresh-golden",
        action="store_true",
        help="write the results of this run into tests/golden; say in the commit why they moved",
    )
    parser.addoption(
        "--slurm-full",
        action="store_true",
        help="all cases of tests/slurm, which take a quarter of an hour, not only the two minutes of them",
    )
    parser.addoption(
        "--fault-seed",
        default="0",
        help="seed of the faults that tests/faults draws; another one tries other faults",
    )
    parser.addoption(
        "--fault-share",
        default="0.3",
        help="share of the faults of single ranks that are tried, drawn by the seed; 1 tries all",
    )


SLOW_FIRST = ("tests/slurm", "tests/faults", "tests/e2e")
"""Folders whose files take minutes: started last, one worker would be busy with them alone at the end."""


class ByFile(LoadFileScheduling):
    """A file's tests stay on one worker, and those of tests/slurm as well: they share a cluster."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/slurm" if nodeid.startswith("tests/slurm/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Deal tests out by file where `-n` asks for workers and `--dist` is `loadfile`, as in pyproject.toml."""
    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker for each core, of which four are enough; some tests start four processes."""
    return min(4, len(os.sched_getaffinity(0)))


@pytest.fixture
def refresh_golden(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be written instead of compared with."""
    return bool(request.config.getoption("--refresh-golden"))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache out of the tests, and the tests' entries out of the user's cache."""
    os.environ["FEDSIM_CACHE"] = str(tmp_path_factory.mktemp("fedsim-cache"))


@pytest.fixture(autouse=True)
def _logging_of_this_test() -> Iterator[None]:
    """What `fedsim.main` sets up on the logger of fedsim ends with the test."""
    root = logging.getLogger("fedsim")
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW_FIRST))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=[pytest.param("a GPU", marks=pytest.mark.gpu), "a pretend GPU"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A GPU where there is one, and in any case one of `tests.pretend_gpu`."""
    if request.param == "a GPU":
        yield torch.device("cuda", 0)
        return
    from tests.pretend_gpu import CUDA, pretend_gpu

    with monkeypatch.context() as patch, pretend_gpu(patch):
        yield CUDA


@pytest.fixture
def shared() -> Path:
    """The folder with real data and reference vectors beside the repository, which a clone does not have."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder ../shared with real data and reference vectors")
    return folder
