"""What a batch script decides (slurm/lib.sh), with fakes of srun, scontrol and of the run itself."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "slurm" / "lib.sh"

SRUN = """\
#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKES/srun.txt"
env >"$FAKES/step.env"
batch=$PPID
say() {
    printf '{\\n "status": "%s",\\n "reason": "%s",\\n' "$1" "${2:-}" >"$RUN/run.json"
    printf ' "start": "%s",\\n' "$RANDOM$RANDOM" >>"$RUN/run.json"
    [[ -z $3 ]] || printf ' "user_error": %s,\\n' "$3" >>"$RUN/run.json"
    printf ' "config": {\\n  "status": "finished"\\n },\\n' >>"$RUN/run.json"
    printf ' "history": [\\n  {\\n   "status": "finished"\\n  }\\n ]\\n}\\n' >>"$RUN/run.json"
}
round() { mkdir -p "$RUN/checkpoints/$(printf 'round_%06d' "$1")"; }
until_asked() { for _ in {1..200}; do [[ -e $FEDSIM_STOP_FILE ]] && return; sleep 0.05; done; exit 99; }
source "$FAKES/step.sh"
"""

SCONTROL = """\
#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKES/scontrol.txt"
case "$1 $2" in
    "show hostnames") echo n1; echo n2 ;;
    "show job") [[ -z $UNREACHABLE ]] || exit 1; cat "$FAKES/job.txt" 2>/dev/null; true ;;
    requeue*) [[ -z $REFUSED ]] || { echo "presently disabled" >&2; exit 1; }; kill -TERM "$PPID" ;;
esac
"""

PYTHON = """\
#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKES/python.txt"
[[ -z $MISTAKE ]] || { echo "launch: ConfigError: cohort.size must be ..." >&2; exit "$MISTAKE"; }
shift 4
echo "an image greets"
printf 'fedsim-check\\0%s\\0%s\\0%s\\0' "$RUN" "${STATE:-ready}" 3
(($# == 0)) || printf '%s\\0' "$@"
"""

REQUEUED = -signal.SIGTERM  # the fake of scontrol ends the batch shell, as Slurm does


@dataclass
class Ended:
    """A job that has ended: its exit code, what it said, and the commands it gave."""

    code: int
    text: str
    steps: list[str]
    requeues: list[str]


@dataclass
class Job:
    """A job on a fake cluster; `start` runs it once."""

    fakes: Path
    run: Path

    def start(self, step: str, body: str = 'fedsim_job "$@"', *arguments: str, **variables: str) -> Ended:
        """Run a batch script whose step does `step`."""
        for name in ("srun.txt", "scontrol.txt", "python.txt"):
            (self.fakes / name).unlink(missing_ok=True)
        (self.fakes / "step.sh").write_text(step)
        environment = {
            "PATH": f"{self.fakes}:/usr/bin:/bin",
            "FAKES": str(self.fakes),
            "RUN": str(self.run),
            "REFUSED": "",
            "UNREACHABLE": "",
            "FEDSIM_RETRY_S": "0",
            "MISTAKE": "",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            **variables,
        }
        done = subprocess.run(
            ["bash", "-c", f"source '{LIB}'\n{body}", "job", *arguments],
            env={name: value for name, value in environment.items() if value is not None},
            cwd=self.fakes,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        commands = self.lines("scontrol.txt")
        requeues = [line.removeprefix("requeue ") for line in commands if line.startswith("requeue")]
        return Ended(done.returncode, done.stdout + done.stderr, self.lines("srun.txt"), requeues)

    def lines(self, name: str) -> list[str]:
        path = self.fakes / name
        return path.read_text().splitlines() if path.exists() else []

    def step_variables(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.lines("step.env") if "=" in line)

    def notes(self) -> list[str]:
        return sorted(path.name for path in (self.run / "slurm").iterdir())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    return Job(fakes, tmp_path / "a run")


USR1 = 'kill -USR1 "$batch"; until_asked; round 1; say preempted; exit 1'
PREEMPTED = (
    "JobId=4711 JobState=RUNNING StartTime=2026-01-02T10:00:00 "
    "PreemptEligibleTime=2026-01-02T09:00:00 PreemptTime={} Restarts=1"
)

TABLE = [
    # what the step does, what Slurm says of the job, exit code, whether it is requeued
    ("finished", "say finished; exit 0", "", 0, False),
    ("finished, and torchrun then stumbles", "say finished; exit 1", "", 0, False),
    ("stopped as the job asked", USR1, "", REQUEUED, True),
    ("stopped by run.max_minutes", "round 1; say preempted 'run.max_minutes=9: 8 ...'; exit 75", "", REQUEUED, True),
    ("stopped by a person", "say preempted; exit 75", "", 0, False),
    ("SIGTERM to a process alone", "say preempted 'SIGTERM on rank 1, after round 4'; exit 75", "", REQUEUED, True),
    ("preempted by Slurm, stopped in time", "say preempted; exit 1", "2026-01-02T10:05:00", REQUEUED, True),
    ("preempted by Slurm, cut off", "say running; exit 143", "2026-01-02T10:05:00", REQUEUED, True),
    ("preempted in an earlier start, now by a person", "say preempted; exit 1", "2026-01-02T09:59:00", 0, False),
    ("scancel", 'kill -TERM "$batch"; until_asked; say preempted; exit 0', "", 143, False),
    ("scancel, and the step is killed", 'kill -TERM "$batch"; sleep 0.2; exit 9', "", 9, False),
    ("asked, then scancel", 'kill -USR1 "$batch"; until_asked; kill -TERM "$batch"; sleep 0.2; exit 7', "", 7, False),
    ("end of the grace time", 'kill -TERM "$batch"; sleep 0.2; exit 9', "2026-01-02T10:05:00", 9, False),
    ("finished while it is asked", 'kill -USR1 "$batch"; until_asked; say finished; exit 0', "", 0, False),
    ("a process was killed", "say running; exit 137", "", REQUEUED, True),
    ("failed", "say failed; exit 1", "", REQUEUED, True),
    ("failed without a word, code 0", "say running; exit 0", "", REQUEUED, True),
    ("died before it wrote anything", "exit 1", "", REQUEUED, True),
    ("failed while it was asked", 'kill -USR1 "$batch"; until_asked; say failed; exit 1', "", REQUEUED, True),
    ("a mistake, by its exit code", "exit 2", "", 2, False),
    ("a mistake, by its record", "say failed 'ModelError: ...' true; exit 1", "", 2, False),
    ("no mistake, by its record", "say failed 'RuntimeError: ...' false; exit 1", "", REQUEUED, True),
    ("nothing to do", "exit 0", "", 0, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "preempted", "code", "requeued"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_the_job_decides_as_the_table_says(
    job: Job, step: str, preempted: str, code: int, requeued: bool
) -> None:
    (job.fakes / "job.txt").write_text(PREEMPTED.format(preempted or "None"))

    ended = job.start(step)

    assert (ended.code, ended.requeues) == (code, ["4711"] if requeued else []), ended.text
    assert not [name for name in job.notes() if name.startswith("stop-")]


def test_processes_hear_of_scancel_before_the_script_does(job: Job) -> None:
    (job.fakes / "job.txt").write_text("JobId=4711 JobState=CANCELLED PreemptTime=None")

    ended = job.start("say preempted 'SIGTERM, after round 4'; exit 75")

    assert (ended.code, ended.requeues) == (0, []), ended.text


def test_what_an_earlier_start_wrote_does_not_count(job: Job) -> None:
    assert job.start("say preempted; exit 75").code == 0

    ended = job.start("exit 75")

    assert (ended.code, len(ended.requeues)) == (REQUEUED, 1)
    assert "failure 1 of at most 3" in ended.text


def test_it_gives_up_when_nothing_moves_and_not_before(job: Job) -> None:
    def fail(step: str) -> Ended:
        return job.start(f"{step}; say failed; exit 13", FEDSIM_MAX_FAILURES="2")

    assert fail(":").code == REQUEUED
    assert fail(":").code == REQUEUED
    assert fail("round 1").code == REQUEUED  # a new checkpoint: the count begins anew
    assert fail(":").code == REQUEUED
    last = fail(":")
    assert (last.code, last.requeues) == (13, [])
    assert "giving up: failure 3 in a row at round 1" in last.text
    assert fail(":").code == REQUEUED  # started again by a person


def test_a_time_limit_that_is_too_short_for_a_round_does_not_go_on_for_ever(job: Job) -> None:
    step = 'kill -USR1 "$batch"; until_asked; say preempted; exit 1'

    ends = [job.start(step, FEDSIM_MAX_FAILURES="1") for _ in range(2)]

    assert [(end.code, len(end.requeues)) for end in ends] == [(REQUEUED, 1), (75, 0)]
    assert "no round was done before it had to stop: is the time limit long enough?" in ends[0].text


def test_a_stop_that_comes_before_the_step_starts_none(job: Job) -> None:
    # the signal goes to the batch shell, whose subshell is the parent of the check
    asking = PYTHON.replace("shift 4", 'kill -USR1 "$(ps -o ppid= -p $PPID)"; shift 4')
    (job.fakes / "python").write_text(asking)

    ended = job.start("say finished")

    assert (ended.code, ended.steps, ended.requeues) == (REQUEUED, [], ["4711"])


def test_a_round_number_with_zeros_is_decimal(job: Job) -> None:
    job.start("round 8; round 9; round 10; say failed; exit 1")

    assert (job.run / "slurm" / "failures-4711").read_text() == "1 10\n"


def test_progress_forgives_earlier_failures(job: Job) -> None:
    for number in range(6):
        assert job.start(f"round {number + 1}; say failed; exit 1", FEDSIM_MAX_FAILURES="1").code == REQUEUED
    job.start("say finished")
    assert job.notes() == []


def test_a_run_that_is_finished_starts_nothing(job: Job) -> None:
    ended = job.start("exit 1", STATE="finished")

    assert (ended.code, ended.steps) == (0, [])
    assert "is finished; nothing to do" in ended.text


@pytest.mark.parametrize("code", ["2", "1"])
def test_a_wrong_configuration_ends_the_job_before_a_step(job: Job, code: str) -> None:
    ended = job.start("exit 0", MISTAKE=code)

    assert (ended.code, ended.steps, ended.requeues) == (int(code), [], [])
    assert "ConfigError" in ended.text
    assert ("is fedsim's environment set up?" in ended.text) == (code == "1")


def test_an_interpreter_that_is_missing_is_said(job: Job) -> None:
    ended = job.start("exit 0", FEDSIM_PYTHON="no-such-python")

    assert (ended.code, ended.steps) == (127, [])
    assert "'no-such-python -m launch check' failed" in ended.text


def test_an_element_of_an_array_requeues_itself_alone(job: Job) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "5", "SLURM_JOB_ID": "4711"}

    ended = job.start(USR1, 'fedsim_element "my list.jsonl"', FEDSIM_ARRAY_OFFSET="1000", **array)

    assert ended.requeues == ["4711_5"]
    assert job.lines("python.txt") == ["-m launch check --fields --element my list.jsonl 1005"]


def test_an_element_needs_an_array(job: Job) -> None:
    ended = job.start("exit 0", "fedsim_element manifest.jsonl")

    assert (ended.code, ended.steps) == (2, [])
    assert "give sbatch --array" in ended.text


def test_where_a_requeue_is_refused_the_code_says_that_work_is_left(job: Job) -> None:
    assert job.start(USR1, REFUSED="1").code == 75
    ended = job.start("say failed; exit 3", REFUSED="1")
    assert (ended.code, len(ended.requeues)) == (3, 6)
    assert "the requeue was refused" in ended.text


def test_where_a_requeue_is_forbidden_none_is_asked_for(job: Job) -> None:
    stopped, failed = job.start(USR1, FEDSIM_REQUEUE="no"), job.start("exit 3", FEDSIM_REQUEUE="no")

    assert [(end.code, end.requeues) for end in (stopped, failed)] == [(75, []), (3, [])]
    assert "the same command goes on where the run stopped" in stopped.text


class TestChain:
    """Jobs behind each other, for sites that forbid a requeue."""

    def test_a_stop_of_the_job_leaves_the_rest_to_the_next(self, job: Job) -> None:
        chain = {"FEDSIM_CHAIN": "c1"}

        first = job.start(USR1, **chain)
        second = job.start("say finished", SLURM_JOB_ID="4712", **chain)

        assert (first.code, first.requeues, second.code, len(second.steps)) == (0, [], 0, 1)

    def test_a_stop_by_a_person_holds_for_the_whole_chain(self, job: Job) -> None:
        chain = {"FEDSIM_CHAIN": "c1"}

        job.start("say preempted; exit 75", **chain)
        second = job.start("say finished", SLURM_JOB_ID="4712", **chain)
        other = job.start("say finished", FEDSIM_CHAIN="c2")

        assert (second.code, second.steps) == (0, [])
        assert "an earlier job of this chain was stopped on request" in second.text
        assert len(other.steps) == 1

    def test_failures_are_counted_over_its_jobs(self, job: Job) -> None:
        chain = {"FEDSIM_CHAIN": "c1", "FEDSIM_MAX_FAILURES": "1"}

        ends = [job.start("say failed; exit 3", SLURM_JOB_ID=str(number), **chain) for number in (1, 2, 3)]

        assert [(end.code, len(end.steps), end.requeues) for end in ends] == [
            (3, 1, []),
            (3, 1, []),
            (0, 0, []),
        ]
        assert "gave up after 2 failures" in ends[2].text


class TestStep:
    """The command that starts the run, and its environment."""

    def test_torchrun_on_one_node(self, job: Job) -> None:
        ended = job.start("say finished", 'fedsim_job "$@"', "my config.yaml", "lora.target_modules=[a, b]")

        assert ended.steps == [
            "--nodes=1 --kill-on-bad-exit=1 --ntasks=1 --ntasks-per-node=1 python -m torch.distributed.run --nnodes 1 "
            "--nproc_per_node 2 --max_restarts 0 --standalone -m fedsim.main my config.yaml lora.target_modules=[a, b]"
        ]

    def test_torchrun_on_several_nodes_meets_on_the_first(self, job: Job) -> None:
        ended = job.start("say finished", SLURM_JOB_NUM_NODES="2", SLURM_RESTART_COUNT="3")

        assert ended.steps == [
            "--nodes=2 --kill-on-bad-exit=1 --ntasks=2 --ntasks-per-node=1 python -m torch.distributed.run --nnodes 2 "
            "--nproc_per_node 2 --max_restarts 0 --rdzv_backend c10d --rdzv_endpoint n1:24711 --rdzv_id 4711.3 "
            "-m fedsim.main"
        ]

    def test_a_port_that_is_taken_is_left_alone(self, job: Job) -> None:
        with contextlib.ExitStack() as servers:
            for number in itertools.count(4711):
                with contextlib.suppress(OSError):
                    servers.enter_context(socket.create_server(("127.0.0.1", 20000 + number)))
                    break
            (step,) = job.start("say finished", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID=str(number)).steps
        (port,) = re.findall(r"--rdzv_endpoint n1:(\d+) ", step)
        assert 20000 <= int(port) < 30000
        assert int(port) != 20000 + number

    def test_plain_srun(self, job: Job) -> None:
        ended = job.start(
            "say finished", SLURM_JOB_NUM_NODES="2", FEDSIM_LAUNCHER="srun", FEDSIM_PROCESSES="4"
        )

        assert ended.steps == [
            "--nodes=2 --kill-on-bad-exit=1 --cpus-per-task=1 --ntasks=8 --ntasks-per-node=4 python -m fedsim.main"
        ]
        seen = job.step_variables()
        assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("n1", "24711")

    def test_one_process_needs_no_agent(self, job: Job) -> None:
        ended = job.start("say finished", SLURM_GPUS_ON_NODE="", FEDSIM_PROCESSES="1")

        assert ended.steps == [
            "--nodes=1 --kill-on-bad-exit=1 --ntasks=1 --ntasks-per-node=1 python -m fedsim.main"
        ]

    @pytest.mark.parametrize(
        ("variables", "processes"),
        [
            ({"SLURM_GPUS_ON_NODE": "4"}, 4),
            ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "a100:3"}, 3),
            ({"SLURM_GPUS_ON_NODE": "", "SLURM_NTASKS_PER_NODE": "3"}, 1),
            ({"SLURM_GPUS_ON_NODE": "", "SLURM_NTASKS_PER_NODE": "3", "FEDSIM_LAUNCHER": "srun"}, 3),
            ({"SLURM_GPUS_ON_NODE": "4", "FEDSIM_PROCESSES": "2"}, 2),
        ],
    )
    def test_the_number_of_processes(self, job: Job, variables: dict[str, str], processes: int) -> None:
        ended = job.start("say finished", **variables)

        assert f"1 x {processes} processes" in ended.text

    def test_a_step_sees_what_it_needs(self, job: Job) -> None:
        job.start("say finished", SLURM_CPUS_PER_TASK="6", SLURM_RESTART_COUNT="2", NCCL_SOCKET_IFNAME="ib0")

        seen = job.step_variables()
        assert seen["FEDSIM_STOP_FILE"] == str(job.run / "slurm" / "stop-4711-2")
        expected = {
            "OMP_NUM_THREADS": "3",
            "NCCL_DEBUG": "WARN",
            "PYTHONFAULTHANDLER": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "SLURM_EXPORT_ENV": "ALL",
            "NCCL_SOCKET_IFNAME": "ib0",
        }
        assert {name: seen.get(name) for name in expected} == expected
        assert "GLOO_SOCKET_IFNAME" not in seen

    def test_cores_that_were_meant_for_a_torchrun_are_shared_out_to_tasks(self, job: Job) -> None:
        job.start("say finished", FEDSIM_LAUNCHER="srun", SLURM_CPUS_PER_TASK="16", SLURM_CPUS_ON_NODE="16")
        assert " --cpus-per-task=8 " in job.lines("srun.txt")[0]
        job.start("say finished", FEDSIM_LAUNCHER="srun", SLURM_CPUS_PER_TASK="4", SLURM_NTASKS_PER_NODE="2")
        assert " --cpus-per-task=4 " in job.lines("srun.txt")[0]

    def test_too_few_cores_are_told(self, job: Job) -> None:
        assert "a node has 4 cores for 2 processes of 3 threads" in job.start("", SLURM_CPUS_ON_NODE="4").text
        assert "a node has" not in job.start("", SLURM_CPUS_ON_NODE="6").text

    @pytest.mark.parametrize(
        ("variables", "complaint"),
        [
            ({"FEDSIM_LAUNCHER": "mpirun"}, "FEDSIM_LAUNCHER must be torchrun or srun, got mpirun"),
            ({"FEDSIM_PROCESSES": "four"}, "FEDSIM_PROCESSES must be a whole number > 0, got four"),
            (
                {"FEDSIM_CONTAINER": "x.sif", "FEDSIM_CONTAINER_RUNTIME": "docker"},
                "must be apptainer or pyxis, got docker",
            ),
            ({"FEDSIM_CONTAINER": "x.sif"}, "neither apptainer nor singularity was found"),
        ],
    )
    def test_a_wrong_setting_is_said_and_not_repeated(
        self, job: Job, variables: dict[str, str], complaint: str
    ) -> None:
        ended = job.start("exit 0", **variables)

        assert (ended.code, ended.steps, ended.requeues) == (2, [], [])
        assert complaint in ended.text


class TestContainer:
    """srun stays outside, the interpreter goes in."""

    def test_apptainer(self, job: Job) -> None:
        (job.fakes / "apptainer").write_text(
            '#!/usr/bin/env bash\nuntil [[ $1 == python ]]; do shift; done; "$@"\n'
        )
        (job.fakes / "apptainer").chmod(0o755)

        ended = job.start("say finished", FEDSIM_CONTAINER="/img/f.sif", FEDSIM_BINDS="/data,/a b:/b")

        binds = f"--bind {job.fakes} --bind /data --bind /a b:/b --bind {job.run.parent}"
        assert (
            f"{job.fakes}/apptainer exec --pwd {job.fakes} --nv {binds} /img/f.sif python -m torch.distributed.run"
            in ended.steps[0]
        )
        assert job.lines("python.txt") == ["-m launch check --fields"]

    def test_pyxis(self, job: Job) -> None:
        # the check is a step of its own there
        step = 'if [[ $* == *"launch check"* ]]; then "${@: -5}"; else say finished; fi'

        ended = job.start(
            step, FEDSIM_CONTAINER="/img/f.sqsh", FEDSIM_CONTAINER_RUNTIME="pyxis", FEDSIM_BINDS="/data"
        )

        image = f"--container-image=/img/f.sqsh --container-workdir={job.fakes} --container-mounts="
        mounts = f"{job.fakes}:{job.fakes},/data:/data"
        assert ended.steps[0].startswith(f"--nodes=1 --ntasks=1 {image}{mounts} python -m launch check")
        assert f"{image}{mounts},{job.run.parent}:{job.run.parent} --ntasks=1" in ended.steps[1]


class TestEnvironment:
    """fedsim_env."""

    def test_modules_conda_and_a_file_of_ones_own(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "set up.sh").write_text("echo set up $UNSET; export MINE=1\n")
        body = (
            'set -eu\nmodule() { echo "module $*"; }\n'
            "conda() { if [[ $1 == shell.bash ]]; then echo ':'; else echo \"conda $*\"; fi; }\n"
            'fedsim_env\necho "$MINE $-"'
        )

        ended = job.start(
            "",
            body,
            FEDSIM_MODULES="cuda/12 python",
            FEDSIM_CONDA_ENV="fed",
            FEDSIM_SETUP=f"{tmp_path}/set up.sh",
        )

        lines = ended.text.splitlines()
        assert lines[:4] == ["module load cuda/12", "module load python", "conda activate fed", "set up"]
        assert {"e", "u"} <= set(lines[4])

    def test_the_virtual_environment_of_the_folder_is_taken(self, job: Job) -> None:
        path = job.fakes / ".venv" / "bin"
        path.mkdir(parents=True)
        (path / "python").symlink_to("/bin/true")

        ended = job.start("", 'fedsim_env; command -v python; echo "$VIRTUAL_ENV"')

        assert ended.text.splitlines() == [str(path / "python"), str(path.parent)]

    @pytest.mark.parametrize(
        ("variables", "complaint"),
        [
            ({"FEDSIM_VENV": "/no/where"}, "there is no /no/where/bin/python"),
            ({"FEDSIM_SETUP": "/no/where"}, "FEDSIM_SETUP must be a readable file"),
            ({"FEDSIM_CONDA_ENV": "x"}, "conda was not found"),
            ({"FEDSIM_MODULES": "cuda", "MODULESHOME": "/no/where"}, "module load cuda failed"),
        ],
    )
    def test_what_cannot_be_set_up_ends_the_job(
        self, job: Job, variables: dict[str, str], complaint: str
    ) -> None:
        ended = job.start("exit 0", "fedsim_env; fedsim_job", **variables)

        assert (ended.code, ended.steps) == (2, [])
        assert complaint in ended.text


def test_the_real_check_answers_what_the_library_reads(job: Job, tmp_path: Path) -> None:
    (job.fakes / "python").unlink()
    arguments = [
        f"run.output_dir={tmp_path / 'all runs'}",
        "run.name=a",
        "lora.target_modules=[q_proj, v_proj]",
    ]
    variables = {
        "FEDSIM_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "HOME": os.environ.get("HOME", "/"),
    }
    job.run = tmp_path / "all runs" / "a"

    ended = job.start("say finished", 'fedsim_job "$@"', *arguments, **variables)

    assert ended.code == 0
    assert ended.steps[0].endswith(f"-m fedsim.main {' '.join(arguments)}")
    assert json.loads((job.run / "run.json").read_text())["status"] == "finished"

    wrong = job.start("say finished", 'fedsim_job "$@"', "lora.rnk=3", **variables)

    assert (wrong.code, wrong.steps) == (2, [])
    assert "unknown key lora.rnk; did you mean 'lora.rank'?" in wrong.text


class TestWhatHappensOnRealClusters:
    """Found by reading beside Slurm's manual: each of these once lost work, or did what nobody asked for."""

    def test_a_signal_while_the_environment_is_set_up_is_no_end(self, job: Job, tmp_path: Path) -> None:
        slow = tmp_path / "setup.sh"
        slow.write_text("kill -USR1 $$\n")
        ended = job.start("exit 1", 'fedsim_env; fedsim_job "$@"', FEDSIM_SETUP=str(slow))

        assert ended.code != -signal.SIGUSR1
        assert "SIGUSR1: the run is asked to stop" in ended.text

    def test_a_controller_that_does_not_answer_is_asked_again(self, job: Job) -> None:
        ended = job.start("round 1; say failed; exit 1", REFUSED="yes")

        assert ended.requeues == ["4711"] * 6
        assert "the requeue was refused" in ended.text

    def test_a_run_that_got_sigterm_goes_on_where_slurm_says_nothing(self, job: Job) -> None:
        """Taken for a wish of the user, it would end with 0, work left undone."""
        ended = job.start("round 1; say preempted 'SIGTERM, after round 1 of 9'; exit 1", UNREACHABLE="yes")

        assert ended.requeues == ["4711"]
        assert "stopped on request" not in ended.text

    def test_a_stop_file_counts_though_the_time_limit_is_near(self, job: Job) -> None:
        reason = "the stop file $RUN/stop, after round 1 of 9"
        ended = job.start(
            f'kill -USR1 "$batch"; until_asked; round 1; say preempted "{reason}"; exit 1', FEDSIM_CHAIN="c"
        )

        assert (ended.code, ended.requeues) == (0, [])
        assert "stopped on request" in ended.text
        assert "over-c" in job.notes()

    def test_a_strict_batch_script_starts(self, job: Job) -> None:
        ended = job.start("say finished", 'set -euo pipefail; fedsim_job "$@"')

        assert (ended.code, len(ended.steps)) == (0, 1), ended.text

    def test_a_check_that_fails_for_a_while_is_made_again(self, job: Job) -> None:
        job.start("say finished", MISTAKE="1")
        assert len(job.lines("python.txt")) == 3
        job.start("say finished", MISTAKE="2")
        assert len(job.lines("python.txt")) == 1, "a mistake stays one"

    def test_agents_leave_their_processes_the_time_that_slurm_allows(self, job: Job) -> None:
        job.start("say finished")
        assert job.step_variables()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "3600"
        job.start("say finished", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
        assert job.step_variables()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "60"
