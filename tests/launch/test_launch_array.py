"""`python -m launch sweep` on Slurm: manifest, arrays, offsets, what is sent again."""

import json
from pathlib import Path

import pytest
from filelock import FileLock

from fedsim.config.loader import load_config
from fedsim.errors import ConfigError
from launch import records
from launch.__main__ import main
from launch.manifest import Slice, make_slices, read_manifest
from tests.launch.cluster import Cluster, make_cluster
from tests.launch.test_launch_submit import leave_run

SWEEP = ["--grid", "lora.rank=2,4", "--seeds", "0,1"]
NAMES = ["s-rank_2-seed_0", "s-rank_2-seed_1", "s-rank_4-seed_0", "s-rank_4-seed_1"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return make_cluster(tmp_path, monkeypatch)


def sweep(cluster: Cluster, *more: str) -> int:
    return main(["sweep", f"run.output_dir={cluster.runs}", "run.name=s", *SWEEP, *more])


@pytest.mark.parametrize(
    ("num_elements", "largest", "expected"),
    [
        (0, 10, []),
        (1, 1001, [(0, 1)]),
        (1001, 1001, [(0, 1001)]),
        (1002, 1001, [(0, 501), (501, 501)]),
        (7, 3, [(0, 2), (2, 2), (4, 3)]),
        (3, 1, [(0, 1), (1, 1), (2, 1)]),
    ],
)
def test_slices_cover_every_line_once_within_the_limit(
    num_elements: int, largest: int, expected: list[tuple[int, int]]
) -> None:
    slices = make_slices(num_elements, largest)

    assert [(one.offset, one.size) for one in slices] == expected
    assert [one.offset + index for one in slices for index in range(one.size)] == list(range(num_elements))
    assert all(one.size <= largest for one in slices)


def test_an_array_option_counts_from_zero() -> None:
    assert Slice(500, 501).array_option(None) == "0-500"
    assert Slice(0, 3).array_option(2) == "0-2%2"
    assert Slice(9, 1).array_option(4) == "0%4"


def test_a_slurm_without_arrays_is_refused() -> None:
    with pytest.raises(ConfigError, match="MaxArraySize=0"):
        make_slices(3, 0)


def test_a_sweep_is_one_array_over_a_manifest(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(cluster, "--gpus-per-node", "2", "--parallel", "2") == 0

    folder = cluster.runs / "s.sweep"
    place = folder / "slurm" / "0001"
    assert capsys.readouterr().out == f"submitted 101: 4 of 4 runs of {folder}\n"
    assert cluster.calls("sbatch") == [f"[--parsable][--array=0-3%2][{place}/job.sbatch][0]"]
    elements = read_manifest(place / "manifest.jsonl")
    assert [element.name for element in elements] == NAMES
    assert elements[2].overrides == ("lora.rank=4", "run.seed=0")
    assert (folder / "manifest.jsonl").read_text() == (place / "manifest.jsonl").read_text()
    for index, element in enumerate(elements):
        config = load_config(Path(element.arguments[0]))
        assert (config.run.name, config.tracking.wandb.group) == (NAMES[index], "s")
        assert element.folder == cluster.runs / NAMES[index]
        assert records.submitted_jobs(element.folder) == [f"101_{index}"]
        assert records.read_submissions(element.folder)[0].logs == (f"{folder}/logs/101_{index}.out",)
    text = (place / "job.sbatch").read_text()
    assert f'#SBATCH --output="{folder}/logs/%A_%a.out"\n' in text
    assert f"fedsim_element '{place}/manifest.jsonl'\n" in text


def test_each_line_is_what_a_batch_script_reads(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(cluster, "--slurm")
    capsys.readouterr()
    manifest = cluster.runs / "s.sweep" / "slurm" / "0001" / "manifest.jsonl"

    assert main(["check", "--element", str(manifest), "3"]) == 0
    assert capsys.readouterr().out == f"{cluster.runs}/{NAMES[3]}: ready, round 0 of 8\n"


def test_an_option_of_zero_is_one_of_slurm(cluster: Cluster) -> None:
    assert sweep(cluster, "--gpus-per-node", "0") == 0
    assert cluster.calls("sbatch") != []


def test_a_group_that_is_set_stays(cluster: Cluster) -> None:
    sweep(cluster, "--slurm", "tracking.wandb.group=thesis")

    config = cluster.runs / NAMES[0] / "slurm" / "0001" / "config.yaml"
    assert load_config(config).tracking.wandb.group == "thesis"


def test_a_sweep_whose_name_looks_like_a_number_has_it_as_its_group(cluster: Cluster) -> None:
    main(["sweep", f"run.output_dir={cluster.runs}", "run.name='2024'", "--seeds", "0", "--slurm"])

    (path,) = cluster.runs.glob("2024-seed_0/slurm/0001/config.yaml")
    assert load_config(path).tracking.wandb.group == "2024"


def test_more_elements_than_an_array_holds_become_several(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_ARRAY", "3")

    sweep(cluster, "--slurm")

    script = cluster.runs / "s.sweep" / "slurm" / "0001" / "job.sbatch"
    assert cluster.calls("sbatch") == [f"[--parsable][--array=0-1][{script}][{offset}]" for offset in (0, 2)]
    assert [records.submitted_jobs(cluster.runs / name) for name in NAMES] == [
        ["101_0"], ["101_1"], ["102_0"], ["102_1"]
    ]  # fmt: skip


def test_with_a_limit_on_elements_several_arrays_go_one_by_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_ARRAY", "2")

    sweep(cluster, "--parallel", "1", "--chain", "2", "--dependency", "afterok:9")

    script = cluster.runs / "s.sweep" / "slurm" / "0001" / "job.sbatch"
    assert cluster.calls("sbatch") == [
        f"[--parsable][--array=0-1%1][--dependency={after}][{script}][{offset}]"
        for after, offset in (
            ("afterok:9", 0),
            ("afterok:9,afterany:101", 0),
            ("afterok:9,afterany:102", 2),
            ("afterok:9,afterany:103", 2),
        )
    ]
    assert records.submitted_jobs(cluster.runs / NAMES[3]) == ["103_1", "104_1"]


def test_resubmit_sends_what_has_not_finished_and_has_no_job(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(cluster, "--slurm")
    assert sweep(cluster, "--slurm") == 2
    assert "was submitted before; --resubmit sends what has not finished" in capsys.readouterr().err
    leave_run(cluster.runs / NAMES[0], "finished", rounds=8, **{"lora.rank": 2, "run.seed": 0})
    leave_run(cluster.runs / NAMES[1], "failed", rounds=3, **{"lora.rank": 2, "run.seed": 1})
    leave_run(cluster.runs / NAMES[2], "running", rounds=1, **{"lora.rank": 4, "run.seed": 0})
    cluster.queue("101_2|RUNNING|n1")

    with FileLock(cluster.runs / NAMES[2] / "run.lock"):
        assert sweep(cluster, "--resubmit") == 0

    folder = cluster.runs / "s.sweep"
    assert cluster.calls("sbatch")[1:] == [f"[--parsable][--array=0-1][{folder}/slurm/0002/job.sbatch][0]"]
    sent = read_manifest(folder / "slurm" / "0002" / "manifest.jsonl")
    assert [element.name for element in sent] == [NAMES[1], NAMES[3]]
    assert [element.name for element in read_manifest(folder / "manifest.jsonl")] == NAMES
    assert records.submitted_jobs(cluster.runs / NAMES[1]) == ["101_1", "102_0"]
    assert records.submitted_jobs(cluster.runs / NAMES[2]) == ["101_2"]


def test_nothing_is_sent_when_all_have_finished(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in enumerate(NAMES):
        leave_run(
            cluster.runs / name, "finished", 8, **{"lora.rank": [2, 2, 4, 4][index], "run.seed": index % 2}
        )

    assert sweep(cluster, "--slurm") == 0
    assert "of 4 runs none is left to submit" in capsys.readouterr().out
    assert cluster.calls("sbatch") == []


def test_where_slurm_refuses_an_array_nothing_is_left(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAX_ARRAY", "2")
    monkeypatch.setenv("LAST_JOB", "101")

    assert sweep(cluster, "--slurm") == 2
    assert "QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    assert cluster.calls("scancel") == ["[101]"]
    assert list(cluster.runs.iterdir()) == []


def test_dry_run_shows_script_commands_and_lines(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.remove("sbatch", "squeue", "scontrol")

    assert sweep(cluster, "--dry-run", "--nodes", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-5] == f"# sbatch --parsable --array=0-3 '{cluster.runs}/s.sweep/slurm/0001/job.sbatch' 0"
    assert lines[-1] == f"# line 3: {cluster.runs}/{NAMES[3]} lora.rank=4 run.seed=1"
    assert not cluster.runs.exists()


def test_test_asks_slurm_about_the_first_array(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(cluster, "--test") == 0
    assert capsys.readouterr().out == "Job 1 to start at noon\n"
    assert cluster.calls("sbatch") == ["[--test-only][--array=0-3]"]
    assert not cluster.runs.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--grid", "lora.rnk=1,2", "--slurm"], "unknown key lora.rnk; did you mean 'lora.rank'?"),
        (["--grid", "lora.dropout=0.1,7", "--time", "60"], "lora.dropout must be"),
        (["--jobs", "2", "--slurm"], "--jobs must be left out with --slurm, which chooses Slurm"),
        (
            ["--processes", "2", "--print", "--nodes", "2"],
            "--processes and --print must be left out with --nodes",
        ),
        (["--resubmit"], "--resubmit needs a sweep that was submitted before"),
        (["--profile", "nowhere"], "unknown profile 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert sweep(cluster, *words) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert cluster.calls("sbatch") == []
    assert not cluster.runs.exists()


def test_a_run_that_has_a_job_of_its_own_is_not_started_twice(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["submit", f"run.output_dir={cluster.runs}", f"run.name={NAMES[1]}", "run.seed=1"])
    cluster.queue("101|PENDING|(Priority)")

    assert sweep(cluster, "--slurm") == 2
    assert f"run {NAMES[1]} of this sweep has a job already (101)" in capsys.readouterr().err


def test_a_sweeps_folder_stands_for_its_runs(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(cluster, "--slurm")
    folder = cluster.runs / "s.sweep"
    cluster.queue("101_1|RUNNING|n1", "101_2|PENDING|(JobArrayTaskLimit)", "55_1|RUNNING|n2")
    capsys.readouterr()

    assert main(["status", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] != []
    assert "101_1" in lines[2]
    assert "RUNNING n1" in lines[2]
    assert "JobArrayTaskLimit" in lines[3]
    assert len(lines) == 5
    assert main(["status", str(cluster.runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["cancel", str(folder)]) == 0
    assert cluster.calls("scancel") == ["[101_1][101_2]"]
    assert main(["cancel", str(cluster.runs / NAMES[2])]) == 0
    assert cluster.calls("scancel")[1:] == ["[101_2]"]
    assert cluster.calls("squeue")[-1] == "[--noheader][--array][--jobs=101][--format=%i|%T|%R]"


def test_a_manifest_of_others_is_not_read_as_one_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps({"arguments": []}) + "\n")

    with pytest.raises(ConfigError, match="line 1, must be an element of a sweep"):
        read_manifest(path)


def test_without_an_option_of_slurm_the_runs_are_made_here(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(cluster, "--print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("run.name=")[2] for line in lines] == NAMES
    assert cluster.calls("sbatch") == []
