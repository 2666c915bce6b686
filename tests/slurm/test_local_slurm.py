"""The cluster the other tests run on: several of them at once, nodes that die, and nothing left behind."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import local_slurm
from tests.slurm.jobs import await_true
from tests.slurm.local_slurm import ClusterError, LocalSlurm, Size

pytestmark = pytest.mark.slurm

PROGRAM = Path(local_slurm.__file__)


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder with a short path, for a cluster's sockets."""
    with tempfile.TemporaryDirectory(prefix="fedsim-slurm-") as name:
        yield Path(name)


def test_two_clusters_do_not_see_each_other(cluster: LocalSlurm, folder: Path) -> None:
    other = LocalSlurm(folder, Size(nodes=1, gpus=0))
    other.up(owner=os.getpid())
    try:
        job = other.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 60").strip()
        assert (
            job in other.run("squeue", "-h", "-o", "%A").split()
        )  # twice where a busy controller answers late
        assert cluster.run("squeue", "-h", "-o", "%A").split() == []
        mine = {process.pid for process in cluster.processes()}
        await_true("the job", lambda: any(process.is_job for process in other.processes()))
        assert mine.isdisjoint(process.pid for process in other.processes())
    finally:
        other.down()
    assert other.processes() == []
    assert str(folder) not in Path("/etc/hosts").read_text()
    assert sorted(cluster.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME").split()) == ["n1", "n2"]


def test_pretend_gpus_and_node_names(cluster: LocalSlurm) -> None:
    shown = cluster.run(
        "srun", "--nodes=2", "--gpus-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    )
    assert sorted(shown.splitlines()) == ["n1 0,1", "n2 0,1"]


def test_crashed_node_comes_back(cluster: LocalSlurm) -> None:
    cluster.crash("n2")
    assert {process.role for process in cluster.processes() if process.name == "slurmd"} == {"n1"}
    with pytest.raises(ClusterError, match="n2 has ended"):
        cluster._all_idle()
    cluster.restore("n2")
    assert sorted(cluster.run("srun", "--nodes=2", "printenv", "SLURMD_NODENAME").split()) == ["n1", "n2"]


def test_cluster_ends_with_its_owner(cluster: LocalSlurm, folder: Path) -> None:
    """As when the tests themselves are killed."""
    script = f"import pathlib, sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); import local_slurm, os; " + (
        f"local_slurm.LocalSlurm(pathlib.Path({str(folder)!r})).up(os.getpid()); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    left = LocalSlurm(folder)
    await_true("the end of the cluster", lambda: not left.processes(), 30)
    await_true("a clean /etc/hosts", lambda: str(folder) not in Path("/etc/hosts").read_text(), 10)


def test_missing_program_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_slurm, "PROGRAMS", ("munged-of-nobody",))
    with pytest.raises(ClusterError, match="munged-of-nobody not found"):
        LocalSlurm(folder).up()
    assert list(folder.iterdir()) == []
