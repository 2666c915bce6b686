"""The packed trainer on a pretend GPU: what lies where, and how often the host waits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.comm.group import Group
from fedsim.lora.plan import ClientPlan
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import Pack
from tests.helpers import make_store, random_texts, run_ranks
from tests.pretend_gpu import CUDA, OnGpu, pretend_gpu
from tests.training.test_packed import FAMILIES, clients, starts_for, train_packed


@pytest.fixture(scope="module")
def store() -> Any:
    return make_store(random_texts(40, seed=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_on_a_pretend_gpu(family: str, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are the CPU's and stay on the GPU; the host waits twice a step, and for each client twice."""
    build, modules = FAMILIES[family]
    starts = starts_for(build(torch.float64), modules, torch.float64)
    jobs = clients(store)
    expected = train_packed(build(torch.float64), modules, jobs, starts, store)
    steps: list[int] = []
    step = PackedTrainer._step
    monkeypatch.setattr(PackedTrainer, "_step", lambda self, *args: steps.append(1) or step(self, *args))
    with monkeypatch.context() as patch, pretend_gpu(patch) as gpu:
        model = build(torch.float64).to(CUDA)
        engine = StackedModel(model, find_targets(model, modules), CUDA)
        gpu.waits.clear()
        found = PackedTrainer(engine, store, 3, 10_000, False, 0).train(
            Pack(0, jobs), [ClientPlan(start) for start in starts], 1
        )
        assert gpu.waits.total() <= 2 * len(steps) + 2 * len(jobs)
        for mine, theirs in zip(found, expected, strict=True):
            for module, factors in mine.adapter.items():
                assert isinstance(factors.A, OnGpu)
                for side, other in (
                    (factors.A, theirs.adapter[module].A),
                    (factors.B, theirs.adapter[module].B),
                ):
                    torch.testing.assert_close(side.cpu(), other, rtol=0, atol=1e-9)


def test_what_lies_in_the_wrong_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pretend_gpu(patch) as gpu:
        there = torch.ones(3, device=CUDA)
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
            there + torch.ones(3)
        here = torch.ones(3)
        where = torch.tensor([0, 2])
        for mixes in (
            lambda: here[where.to(CUDA)],
            lambda: there.__setitem__(there > 0, here),
            lambda: torch.tensor(1.0).add_(there.sum()),
            lambda: torch.stack([there.sum(), torch.tensor(1.0)]),
            lambda: torch.cat([there, here]),
        ):
            with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
                mixes()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        gpu.waits.clear()
        assert (there + torch.ones(3).to(CUDA) * torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]
        weight = torch.nn.Parameter(torch.ones(2, 3).to(CUDA))
        torch.nn.functional.linear(there, weight).sum().backward()
        assert isinstance(weight.grad, OnGpu)
        assert gpu.waits.total() == 1
        assert float(there.sum()) == 3.0
        assert there[where].tolist() == [1.0, 1.0]
        there[there > 0], there.nonzero(), torch.equal(there, there)
        assert gpu.waits.total() == 7


def exchange_on_gpus(group: Group) -> tuple[list[Any], str]:
    with pytest.MonkeyPatch.context() as patch, pretend_gpu(patch, group.rank, group.world_size):
        mine = torch.full((2,), float(group.rank), device=torch.device("cuda", group.rank))
        found = [tensor.tolist() for tensor in group.all_gather(mine)]
        try:
            group.all_gather(torch.ones(2))
        except RuntimeError as error:
            return found, str(error)
    return found, ""


def test_pretend_nccl_takes_tensors_of_the_gpu_alone(tmp_path: Path) -> None:
    for found, error in run_ranks(exchange_on_gpus, 2, tmp_path):
        assert found == [[0.0, 0.0], [1.0, 1.0]]
        assert "tensors must be CUDA" in error
