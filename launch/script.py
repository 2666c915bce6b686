"""The text of a batch script. Pure: what is asked for, as plain values, in; text out."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Launcher = Literal["torchrun", "srun"]


@dataclass(frozen=True)
class Resources:
    """What to ask sbatch for; None leaves it to the site.

    Attributes:
        nodes: of the job.
        gpus_per_node: GPUs on each.
        gpu_request: name of the option that asks for them.
        processes_per_node: of fedsim on each node; None: one a GPU.
        cpus_per_task: cores of a Slurm task: of a node's torchrun with all its processes, or of a process under srun.
        mem: memory of a node.
        time: limit, as sbatch reads it.
        partition: as sbatch reads it.
        account: as sbatch reads it.
        qos: as sbatch reads it.
        constraint: as sbatch reads it.
        extra: more options, each a line of the header.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    processes_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Container:
    """Where the interpreter lives, if not on the node itself.

    Attributes:
        image: a file, or what pyxis takes for an image.
        runtime: what starts it.
        binds: folders that it sees besides the working folder and the run folder.
    """

    image: str
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    binds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What a job does before fedsim.

    Attributes:
        python: the interpreter; None: `python`, as the environment below finds it.
        modules: to load.
        venv: a virtual environment.
        conda_env: a conda environment.
        environment: variables.
        lines: of shell.
        file: sourced last.
    """

    python: str | None = None
    modules: tuple[str, ...] = ()
    venv: str | None = None
    conda_env: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    file: Path | None = None


@dataclass(frozen=True)
class Restarts:
    """When a job ends early and what it does then.

    Attributes:
        signal_lead: seconds before the time limit at which the run is asked to stop; more than a round takes.
        max_failures: failures in a row without progress that are forgiven.
        requeue: whether the job requeues itself.
        chain: what the jobs of a chain share; None: there is no chain.
    """

    signal_lead: int = 300
    max_failures: int = 3
    requeue: bool = True
    chain: str | None = None


@dataclass(frozen=True)
class Batch:
    """A batch script.

    Attributes:
        name: of the job.
        folder: where it runs, absolute.
        library: the copy of slurm/lib.sh that it sources, absolute.
        log: its output, absolute; Slurm's patterns, such as %j, are kept.
        arguments: of fedsim.main; empty for an array.
        manifest: of the array, absolute; None for a single run.
        resources: see there.
        launcher: torchrun or srun.
        container: None: fedsim runs on the node itself.
        setup: see there.
        restarts: see there.
    """

    name: str
    folder: Path
    library: Path
    log: str
    arguments: tuple[str, ...] = ()
    manifest: Path | None = None
    resources: Resources = Resources()
    launcher: Launcher = "torchrun"
    container: Container | None = None
    setup: Setup = Setup()
    restarts: Restarts = Restarts()


def render_script(batch: Batch) -> str:
    """The script, whole. What is None or empty is not written, so that the site's defaults rule."""
    settings = [f"export {name}={shlex.quote(value)}" for name, value in _variables(batch).items()]
    if batch.manifest is None:
        call = f"fedsim_job {shlex.join(batch.arguments)}".rstrip()
    else:
        settings.append("export FEDSIM_ARRAY_OFFSET=${1:-0}")
        call = f"fedsim_element {shlex.quote(str(batch.manifest))}"
    lines = [
        "#!/usr/bin/env bash",
        "# Written by `python -m launch`; fedsim's slurm/README.md says what each line is for.",
        "",
        *(f"#SBATCH {option}" for option in _header(batch)),
        "",
        f"cd {shlex.quote(str(batch.folder))} || exit 2",
        "# shellcheck source=/dev/null",
        f"source {shlex.quote(str(batch.library))} || exit 2",
        "",
        *settings,
        *batch.setup.lines,
        "fedsim_env",
        call,
    ]
    return "\n".join(lines) + "\n"


def slurm_path(path: Path) -> str:
    """A path as --output takes it: a percent sign would begin a pattern."""
    return str(path).replace("%", "%%")


def _header(batch: Batch) -> list[str]:
    """Options of sbatch, as they stand behind #SBATCH."""
    asked, restarts = batch.resources, batch.restarts
    tasks = _processes(asked) or 1 if batch.launcher == "srun" else 1
    options: dict[str, object] = {
        "job-name": batch.name,
        "nodes": asked.nodes,
        "ntasks-per-node": tasks,
        **_gpus(asked),
        "cpus-per-task": asked.cpus_per_task,
        "mem": asked.mem,
        "time": asked.time,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "output": batch.log,
        "open-mode": "append",
        "signal": f"B:USR1@{restarts.signal_lead}",
    }
    given = [f"--{name}={_header_word(str(value))}" for name, value in options.items() if value is not None]
    return [*given, "--requeue" if restarts.requeue else "--no-requeue", *asked.extra]


def _gpus(asked: Resources) -> dict[str, object]:
    if not asked.gpus_per_node:
        return {}
    if asked.gpu_request == "gres":
        return {"gres": f"gpu:{asked.gpus_per_node}"}
    return {"gpus-per-node": asked.gpus_per_node}


def _processes(asked: Resources) -> int | None:
    return asked.processes_per_node or asked.gpus_per_node or None


def _header_word(value: str) -> str:
    """A value as sbatch reads it in a script: in double quotes if it holds blanks or quotes."""
    if re.fullmatch(r"[^\s\"'\\#]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _variables(batch: Batch) -> dict[str, str]:
    """Variables of the job: the library's settings, then the site's own."""
    setup, restarts, container = batch.setup, batch.restarts, batch.container
    processes = batch.resources.processes_per_node
    values: dict[str, object] = {
        "FEDSIM_LAUNCHER": batch.launcher,
        "FEDSIM_PROCESSES": processes,
        "FEDSIM_MAX_FAILURES": restarts.max_failures,
        "FEDSIM_REQUEUE": None if restarts.requeue else "no",
        "FEDSIM_CHAIN": restarts.chain,
        "FEDSIM_MODULES": " ".join(setup.modules) or None,
        "FEDSIM_VENV": setup.venv,
        "FEDSIM_CONDA_ENV": setup.conda_env,
        "FEDSIM_SETUP": setup.file,
        "FEDSIM_PYTHON": setup.python,
        "FEDSIM_CONTAINER": container and container.image,
        "FEDSIM_CONTAINER_RUNTIME": container and container.runtime,
        "FEDSIM_BINDS": (container and ",".join(container.binds)) or None,
    }
    return {name: str(value) for name, value in values.items() if value is not None} | dict(setup.environment)
