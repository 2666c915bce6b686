"""`python -m launch submit`, `status`, `cancel`, `logs` and `check`, with fakes of Slurm's commands."""

import fcntl
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from fedsim.config.loader import load_config, to_yaml
from fedsim.errors import RunFolderError, SchedulerError
from fedsim.tracking.run_folder import check_new_folder
from launch import records, slurm
from launch.__main__ import main
from launch.logs import find_logs, follow, tail
from launch.submit import advice
from tests.launch.cluster import Cluster, make_cluster
from tests.launch.test_launch_script import job_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return make_cluster(tmp_path, monkeypatch)


def arguments(cluster: Cluster, *more: str) -> list[str]:
    return [f"run.output_dir={cluster.runs}", "run.name=mine", *more]


def leave_run(folder: Path, status: str, rounds: int, of: int = 8, **overrides: object) -> None:
    """What a run leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"run.output_dir={folder.parent}", f"run.name={folder.name}", f"run.rounds={of}"]
    config = load_config(None, [*settings, *(f"{name}={value}" for name, value in overrides.items())])
    (folder / "config.yaml").write_text(to_yaml(config))
    tree = {"status": status, "reason": None, "config": config.model_dump(mode="json"), "history": []}
    (folder / "run.json").write_text(json.dumps(tree, indent=1))
    if rounds:
        (folder / "checkpoints" / f"round_{rounds:06d}").mkdir(parents=True, exist_ok=True)


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_is_submitted_and_what_was_submitted_is_kept(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["submit", *arguments(cluster, "lora.rank=4"), "--time", "60", "--dependency", "afterok:7:8"])

    run = cluster.runs / "mine"
    place = run / "slurm" / "0001"
    assert code == 0
    assert capsys.readouterr().out == f"submitted 101: {run}\n"
    assert cluster.calls("sbatch") == [f"[--parsable][--dependency=afterok:7:8][{place}/job.sbatch]"]
    assert everything_below(run) == [
        f"slurm/0001/{name}" for name in ("config.yaml", "git.txt", "job.sbatch", "lib.sh", "submission.json")
    ]
    assert (run / "logs").is_dir()
    assert load_config(place / "config.yaml").lora.rank == 4
    assert (place / "lib.sh").read_text() == (ROOT / "slurm" / "lib.sh").read_text()
    assert (
        (place / "git.txt")
        .read_text()
        .startswith(("commit ", f"{ROOT / 'launch'} is not in a git repository"))
    )
    script = (place / "job.sbatch").read_text().splitlines()
    assert f"fedsim_job {shlex.quote(str(place / 'config.yaml'))}" in script
    assert f'#SBATCH --output="{run}/logs/%j.out"' in script
    (submission,) = records.read_submissions(run)
    assert (submission.jobs, submission.logs) == (("101",), (f"{run}/logs/101.out",))


def test_what_was_submitted_may_start_in_its_folder(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder holds the launcher's files by then, and no config.yaml of its own."""
    (cluster.runs / "mine").mkdir(parents=True)
    (cluster.runs / "mine" / "stop").touch()
    main(["submit", *arguments(cluster)])
    capsys.readouterr()

    assert main(["check", "--fields", str(cluster.runs / "mine" / "slurm" / "0001" / "config.yaml")]) == 0
    fields = capsys.readouterr().out.split("\0")
    assert fields[:4] == ["fedsim-check", str(cluster.runs / "mine"), "ready", "1"]
    check_new_folder(cluster.runs / "mine")
    (cluster.runs / "mine" / "notes").touch()
    with pytest.raises(RunFolderError, match="holds notes"):
        check_new_folder(cluster.runs / "mine")


def test_a_chain_is_so_many_jobs_each_after_the_one_before(cluster: Cluster) -> None:
    main(["submit", *arguments(cluster), "--chain", "3", "--dependency", "singleton"])

    script = cluster.runs / "mine" / "slurm" / "0001" / "job.sbatch"
    assert cluster.calls("sbatch") == [
        f"[--parsable][--dependency={after}][{script}]"
        for after in ("singleton", "singleton,afterany:101", "singleton,afterany:102")
    ]
    assert records.submitted_jobs(cluster.runs / "mine") == ["101", "102", "103"]
    text = script.read_text()
    assert "#SBATCH --no-requeue\n" in text
    assert "export FEDSIM_REQUEUE=no\nexport FEDSIM_CHAIN=0001-" in text


def test_what_was_asked_for_goes_before_variables_of_sbatch() -> None:
    """sbatch itself would let the variables win, so that another account paid."""
    script = (
        "#!/bin/bash\n#SBATCH --account=right\n#SBATCH --time=04:00:00\n#SBATCH --requeue\n#SBATCH --mem=8G\n"
    )
    around = {
        "SBATCH_ACCOUNT": "other",
        "SBATCH_TIMELIMIT": "10",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_MEM_PER_CPU": "1G",
    }
    kept = {"SBATCH_PARTITION": "usual", "PATH": "/bin"}

    assert slurm.environment_for(script, around | kept) == kept


def test_where_slurm_refuses_a_job_nothing_is_left(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAST_JOB", "102")

    assert main(["submit", *arguments(cluster), "--chain", "3"]) == 2
    assert (
        "SchedulerError: sbatch refused the job: sbatch: error: QOSMaxSubmitJobPerUserLimit"
        in capsys.readouterr().err
    )
    assert cluster.calls("scancel") == ["[101][102]"]
    assert not (cluster.runs / "mine").exists()


def test_where_neither_works_the_jobs_that_stay_are_named(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAST_JOB", "102")

    def refuse(jobs: Sequence[str]) -> None:
        raise SchedulerError("scancel: error: Unable to contact slurm controller")

    monkeypatch.setattr(slurm, "cancel", refuse)

    assert main(["submit", *arguments(cluster), "--chain", "3"]) == 2
    told = capsys.readouterr().err
    assert "QOSMaxSubmitJobPerUserLimit" in told
    assert "jobs 101, 102 were submitted before and could not be cancelled (scancel: error" in told
    assert not (cluster.runs / "mine").exists()


def test_a_job_inherits_nothing_of_a_job_that_submits_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cluster.fakes / "sbatch").write_text('#!/usr/bin/env bash\nenv >"$FAKES/seen.txt"; echo 101\n')
    given = {
        "SLURM_CPUS_PER_TASK": "9",
        "SRUN_CPUS_PER_TASK": "9",
        "RANK": "0",
        "SLURM_CONF": "/c",
        "SBATCH_QOS": "q",
    }
    for name, value in {"SLURM_JOB_ID": "5", **given}.items():
        monkeypatch.setenv(name, value)

    main(["submit", *arguments(cluster)])

    seen = (cluster.fakes / "seen.txt").read_text().splitlines()
    assert sorted(line for line in seen if line.partition("=")[0] in given) == [
        "SBATCH_QOS=q",
        "SLURM_CONF=/c",
    ]


def test_dry_run_shows_script_and_command_and_writes_nothing(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.remove("sbatch", "squeue")

    assert main(["submit", *arguments(cluster), "--dry-run", "--nodes", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/usr/bin/env bash\n")
    assert "#SBATCH --nodes=2\n" in out
    assert out.splitlines()[-1] == f"# sbatch --parsable '{cluster.runs}/mine/slurm/0001/job.sbatch'"
    assert not cluster.runs.exists()


def test_test_asks_slurm_and_writes_nothing(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *arguments(cluster), "--test", "--nodes", "2"]) == 0
    assert capsys.readouterr().out == "Job 1 to start at noon\n"
    assert cluster.calls("sbatch") == ["[--test-only]"]
    assert "#SBATCH --nodes=2\n" in (cluster.fakes / "tested.txt").read_text()
    monkeypatch.setenv("TEST_CODE", "1")
    assert main(["submit", *arguments(cluster), "--test"]) == 2
    assert "sbatch would refuse the job" in capsys.readouterr().err
    assert not cluster.runs.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["lora.rnk=4"], "ConfigError: unknown key lora.rnk; did you mean 'lora.rank'?"),
        (["cohort.size=50"], "ConfigError: cohort.size must be in"),
        (["no-such-file.yaml"], "configuration file 'no-such-file.yaml' does not exist"),
        (["--", "--dry-run"], "--dry-run of fedsim.main cannot be submitted"),
        (["--", "--no-such"], "unknown option '--no-such'"),
        (["--", "--estimate"], "--estimate cannot be submitted"),
        (["--profile", "nowhere"], "ConfigError: unknown profile 'nowhere': no nowhere.yaml in "),
        (["--profile", "./no/where.yaml"], "there is no file ./no/where.yaml"),
        (["--dry-run", "--test"], "--dry-run and --test must not be given together"),
        (["--setup", "/no/where"], "--setup must be a file, and there is no /no/where"),
        (["--container-runtime", "pyxis"], "--container-runtime needs --container IMAGE"),
        (
            ["--time", "00:05:00", "--signal-lead", "300"],
            "--signal-lead must be shorter than --time, 00:05:00 (300 s)",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(["submit", *arguments(cluster), *words]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert cluster.calls("sbatch") == []
    assert not cluster.runs.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--nodes", "0"], "--nodes: must be a whole number in [1, 999999], got '0'"),
        (["--gpus-per-node", "-1"], "--gpus-per-node"),
        (
            ["--time", "tomorrow"],
            "--time: must be minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, got 'tomorrow'",
        ),
        (["--mem", "lots"], "--mem: must be a size such as 64G, got 'lots'"),
        (["--launcher", "mpirun"], "--launcher: invalid choice: 'mpirun'"),
        (["--partition", "a\nb"], "--partition: must be one line of printable text"),
        (["--extra", "exclusive"], "--extra: must begin with an option of sbatch, got 'exclusive'"),
        (["--extra", "--comment 'x"], "--extra: cannot be read as words"),
        (["--no-such"], "unrecognized arguments: --no-such"),
        (["--max-failures", "some"], "--max-failures: must be a whole number >= 0, got 'some'"),
    ],
)
def test_wrong_options_are_said_before_anything_is_submitted(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], words: list[str], complaint: str
) -> None:
    assert main(["submit", *arguments(cluster), *words]) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert len(told.splitlines()) == 1
    assert not cluster.runs.exists()


@pytest.mark.parametrize("missing", ["sbatch", "squeue"])
def test_without_slurm_it_says_so(cluster: Cluster, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    main(["submit", *arguments(cluster)])
    cluster.remove(missing)
    capsys.readouterr()

    assert main(["submit", *arguments(cluster)]) == 2
    assert f"launch: SchedulerError: {missing} must be on PATH, and is not" in capsys.readouterr().err
    assert not (cluster.runs / "mine" / "slurm" / "0002").exists()


class TestFolder:
    """A run folder that cannot take this run."""

    def refused(self, cluster: Cluster, capsys: pytest.CaptureFixture[str], *words: str) -> str:
        assert main(["submit", *arguments(cluster, *words)]) == 2
        assert cluster.calls("sbatch") == []
        return " ".join(capsys.readouterr().err.split())

    def test_finished(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        leave_run(cluster.runs / "mine", "finished", rounds=8)

        assert "is finished after 8 rounds, nothing to submit" in self.refused(cluster, capsys)
        assert main(["submit", *arguments(cluster, "run.rounds=9")]) == 0

    def test_stopped_early(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        """More patience goes on with it, as `fedsim.main` would."""
        rule = ["early_stopping.metric=test_loss", "early_stopping.patience=2"]
        leave_run(cluster.runs / "mine", "finished", rounds=5, **dict(word.split("=") for word in rule))

        refused = self.refused(cluster, capsys, *rule)
        assert "after 5 rounds, nothing to submit; a larger early_stopping.patience extends it" in refused
        assert main(["submit", *arguments(cluster, rule[0], "early_stopping.patience=3")]) == 0

    def test_in_use(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        leave_run(cluster.runs / "mine", "running", rounds=3)
        (cluster.runs / "mine" / "run.owner.json").write_text('{"host": "n1", "pid": 77, "since": "then"}')

        with FileLock(cluster.runs / "mine" / "run.lock"):
            assert "is in use (host n1, pid 77)" in self.refused(cluster, capsys)
        assert main(["submit", *arguments(cluster)]) == 0

    def test_of_another_configuration(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        leave_run(cluster.runs / "mine", "preempted", rounds=3, **{"lora.rank": 4})

        assert "another configuration (lora.rank: 4 -> 2)" in self.refused(cluster, capsys)
        assert main(["submit", *arguments(cluster, "lora.rank=4", "tracking.progress=plain")]) == 0

    def test_of_something_else(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        (cluster.runs / "mine").mkdir(parents=True)
        (cluster.runs / "mine" / "thesis.tex").touch()

        assert "must be new, empty or that of a run, and holds thesis.tex" in self.refused(cluster, capsys)

    def test_that_is_a_file(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        cluster.runs.mkdir()
        (cluster.runs / "mine").touch()

        assert "must be a folder, and is a file" in self.refused(cluster, capsys)

    def test_with_a_job(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        main(["submit", *arguments(cluster)])
        leave_run(cluster.runs / "mine", "running", rounds=1)
        cluster.queue("101|RUNNING|n1", "999|RUNNING|n1")

        with FileLock(cluster.runs / "mine" / "run.lock"):
            assert main(["submit", *arguments(cluster)]) == 2
        assert (
            "has a job already: 101 (RUNNING); wait for it, or `python -m launch cancel"
            in capsys.readouterr().err
        )
        assert cluster.calls("squeue") == ["[--noheader][--array][--jobs=101][--format=%i|%T|%R]"]
        cluster.queue()
        assert main(["submit", *arguments(cluster)]) == 0
        assert records.submitted_jobs(cluster.runs / "mine") == ["101", "102"]


def test_what_is_hardly_meant_is_noted() -> None:
    config = load_config(None, ["run.device=cuda"])

    assert advice(config, job_of(["--nodes", "3", "--processes-per-node", "2"])) == [
        "6 processes share out 4 packs a round, so that 2 will idle; raise training.pack.num_packs or cohort.size",
        "run.device is cuda, and no GPU is asked for; give --gpus-per-node",
    ]
    assert advice(config, job_of(["--nodes", "2", "--gpus-per-node", "2"])) == []


class TestStatus:
    """squeue, then sacct, then the run's own files."""

    def lines(self, capsys: pytest.CaptureFixture[str], *folders: Path) -> list[list[str]]:
        capsys.readouterr()
        assert main(["status", *map(str, folders)]) == 0
        return [line.split("  ") for line in capsys.readouterr().out.splitlines()]

    def cells(self, capsys: pytest.CaptureFixture[str], folder: Path) -> list[str]:
        (line,) = self.lines(capsys, folder)[1:]
        return [cell.strip() for cell in line if cell.strip()][1:]

    def test_waiting_running_and_done(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        main(["submit", *arguments(cluster, "run.rounds=12")])
        run = cluster.runs / "mine"
        cluster.queue("101|PENDING|(Resources)")
        assert self.cells(capsys, run) == ["101", "PENDING (Resources)", "submitted", "0 of 12"]

        leave_run(run, "running", rounds=3, of=12)
        cluster.queue("101|RUNNING|n[1-2]")
        assert self.cells(capsys, run) == ["101", "RUNNING n[1-2]", "running", "3 of 12"]

        (run / "metrics.jsonl").write_text('{"round_index": 0}\n{"round_index": 4}\n')
        assert self.cells(capsys, run)[-1] == "5 of 12"

        leave_run(run, "finished", rounds=12, of=12)
        cluster.queue()
        assert self.cells(capsys, run) == ["101", "-", "finished", "12 of 12"]
        cluster.accounts("101|COMPLETED|0:0", "102|FAILED|1:0")
        assert self.cells(capsys, run) == ["101", "COMPLETED code 0:0", "finished", "12 of 12"]

    def test_a_run_whose_job_is_gone_was_cut_off(
        self, cluster: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        main(["submit", *arguments(cluster)])
        leave_run(cluster.runs / "mine", "running", rounds=3)
        cluster.queue()
        assert self.cells(capsys, cluster.runs / "mine")[:3] == ["101", "-", "cut off"]
        cluster.accounts("101|CANCELLED by 0|0:15")

        assert self.cells(capsys, cluster.runs / "mine")[:4] == [
            "101",
            "CANCELLED code 0:15",
            "cut off",
            "3 of 8",
        ]

    def test_without_slurm_the_files_speak(
        self, cluster: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        leave_run(cluster.runs / "mine", "preempted", rounds=2)
        cluster.remove("squeue", "sacct")

        assert self.cells(capsys, cluster.runs / "mine") == ["-", "-", "preempted", "2 of 8"]

    def test_a_folder_of_runs_stands_for_them(
        self, cluster: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("b", "a"):
            leave_run(cluster.runs / name, "finished", rounds=8)
        (cluster.runs / "notes").mkdir()

        lines = self.lines(capsys, cluster.runs, cluster.runs / "a")

        assert [line[0].strip() for line in lines] == [
            "run",
            str(cluster.runs / "a"),
            str(cluster.runs / "b"),
        ]

    @pytest.mark.parametrize("command", ["status", "cancel", "logs"])
    def test_a_folder_without_runs_is_refused(
        self, cluster: Cluster, capsys: pytest.CaptureFixture[str], command: str
    ) -> None:
        assert main([command, str(cluster.fakes)]) == 2
        assert "is no run, no sweep, and holds none" in capsys.readouterr().err
        assert main([command, "no-such-folder"]) == 2
        assert "there is no folder no-such-folder" in capsys.readouterr().err

    def test_a_queue_that_is_down_is_said(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        main(["submit", *arguments(cluster)])
        (cluster.fakes / "squeue").write_text(
            "#!/usr/bin/env bash\necho 'Unable to contact slurm controller' >&2; exit 1"
        )

        capsys.readouterr()
        assert main(["status", str(cluster.runs / "mine")]) == 0
        told = capsys.readouterr()
        assert "squeue failed: Unable to contact slurm controller" in told.err
        assert "submitted" in told.out, "what the run folder itself says"


def test_cancel_ends_the_jobs_that_live_and_says_which(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["submit", *arguments(cluster), "--chain", "3"])
    cluster.queue("102|RUNNING|n1", "103|PENDING|(Dependency)")
    capsys.readouterr()

    assert main(["cancel", str(cluster.runs / "mine")]) == 0
    assert cluster.calls("scancel") == ["[102][103]"]
    assert capsys.readouterr().out == f"{cluster.runs}/mine: cancelled 102 (was RUNNING), 103 (was PENDING)\n"
    cluster.queue()
    assert main(["cancel", str(cluster.runs / "mine")]) == 0
    assert capsys.readouterr().out == f"{cluster.runs}/mine: no job waits or runs\n"


class TestLogs:
    """The newest output first of all."""

    def run(self, cluster: Cluster) -> Path:
        main(["submit", *arguments(cluster)])
        return cluster.runs / "mine"

    def test_the_newest_log_is_shown(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        run = self.run(cluster)
        assert main(["logs", str(run)]) == 2
        assert "has no log yet" in capsys.readouterr().err
        (run / "logs" / "rank_1.log").write_text("peer\n")
        assert main(["logs", str(run)]) == 0
        assert capsys.readouterr().out == f"==> {run}/logs/rank_1.log <==\npeer\n"
        (run / "logs" / "101.out").write_text("".join(f"line {number}\n" for number in range(100)))
        os.utime(run / "logs" / "101.out", (1, 1))

        assert main(["logs", str(run), "--lines", "2"]) == 0
        assert capsys.readouterr().out == f"==> {run}/logs/101.out <==\nline 98\nline 99\n"
        assert main(["logs", str(run), "--lines", "1", "--all"]) == 0
        job, peer = f"==> {run}/logs/101.out <==\nline 99\n", f"==> {run}/logs/rank_1.log <==\npeer\n"
        assert capsys.readouterr().out == job + peer

    def test_what_is_written_later_follows(self, cluster: Cluster) -> None:
        run = self.run(cluster)
        log, other = run / "logs" / "101.out", run / "logs" / "rank_1.log"
        log.write_text("before\n")
        steps = iter([(log, "a", "one\n"), (other, "w", "two\n"), None, (log, "w", "new\n")])

        def pause() -> None:
            step = next(steps)
            if step is not None:
                path, mode, text = step
                with path.open(mode) as file:
                    file.write(text)

        texts = []
        for text in follow(lambda: find_logs([run]), pause):
            texts.append(text)
            if text.endswith("new\n"):
                break

        assert texts == ["one\n", f"==> {other} <==\ntwo\n", f"==> {log} <==\nnew\n"]

    def test_a_long_log_is_read_from_its_end(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_bytes(b"x" * (3 << 20) + b"\nlast \xff\n")

        assert tail(path, 1) == "last �\n"


class TestCheck:
    """What batch scripts ask."""

    def test_the_lines_of_a_manifest(
        self, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        manifest = tmp_path / "my manifest"
        json_line = json.dumps({"arguments": arguments(cluster, "lora.target_modules=[q_proj, k_proj]")})
        manifest.write_text(
            f"run.name=first 'run.output_dir={cluster.runs}'\n\n{json_line}\nrun.nme=x\n'\n{{}}\n"
        )

        def fields(index: str) -> list[str]:
            assert main(["check", "--fields", "--element", str(manifest), index]) == 0
            return capsys.readouterr().out.split("\0")[1:-1]

        assert fields("0") == [
            f"{cluster.runs}/first",
            "ready",
            "1",
            "run.name=first",
            f"run.output_dir={cluster.runs}",
        ]
        assert fields("1")[3:] == arguments(cluster, "lora.target_modules=[q_proj, k_proj]")
        for index, complaint in {
            "2": "unknown key run.nme",
            "3": "line 4 cannot be read (No closing quotation)",
            "4": "line 5 cannot be read (no list 'arguments')",
            "5": "has the lines 0 to 4, got 5; change sbatch's --array",
            "x": "has the lines 0 to 4, got x",
        }.items():
            assert main(["check", "--fields", "--element", str(manifest), index]) == 2
            assert complaint in " ".join(capsys.readouterr().err.split())

    def test_a_finished_run_is_told(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        leave_run(cluster.runs / "mine", "finished", rounds=8)

        main(["check", *arguments(cluster)])
        assert capsys.readouterr().out == f"{cluster.runs}/mine: finished, round 8 of 8\n"
        main(["check", *arguments(cluster, "run.rounds=9")])
        assert capsys.readouterr().out == f"{cluster.runs}/mine: ready, round 8 of 9\n"

    def test_the_folder_is_below_the_home_folder_as_for_the_run(
        self, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(cluster.runs))
        leave_run(cluster.runs / "kept" / "mine", "finished", rounds=8)

        main(["check", "run.output_dir=~/kept", "run.name=mine"])
        assert capsys.readouterr().out == f"{cluster.runs}/kept/mine: finished, round 8 of 8\n"

    def test_a_run_that_stopped_before_its_last_round_can_be_finished(
        self, cluster: Cluster, capsys: pytest.CaptureFixture[str]
    ) -> None:
        leave_run(cluster.runs / "mine", "finished", rounds=5)

        main(["check", *arguments(cluster)])
        assert capsys.readouterr().out.endswith("finished, round 5 of 8\n")

    def test_it_takes_no_lock_away(self, cluster: Cluster) -> None:
        leave_run(cluster.runs / "mine", "running", rounds=1)
        lock = cluster.runs / "mine" / "run.lock"
        lock.touch()

        assert main(["check", *arguments(cluster)]) == 0
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert main(["check", *arguments(cluster)]) == 2


def test_the_configuration_that_is_kept_is_the_one_that_was_checked(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "my config.yaml"
    path.write_text("lora: {rank: 3}\n")

    main(["submit", str(path), f"run.output_dir={cluster.runs}"])

    kept = cluster.runs / "my-config" / "slurm" / "0001" / "config.yaml"
    path.write_text("lora: {rank: 30}\n")
    assert yaml.safe_load(kept.read_text())["lora"]["rank"] == 3
    assert load_config(kept).run.name == "my-config"
