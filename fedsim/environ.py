"""From what Slurm says about a process to the variables that torch, accelerate and DeepSpeed read.

torchrun and `accelerate launch` export RANK, WORLD_SIZE, MASTER_ADDR and so on; `srun` exports its own names. Without a
mapping, N tasks of a step would be N runs of one process each, all writing to one folder. It needs no `scontrol`, which
containers lack, and must be called before any library reads these variables.
"""

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence

from fedsim.errors import ConfigError

FIRST_PORT = 20000
NUM_PORTS = 9000
"""Ports for the processes of a step to meet at: below those that systems hand out by themselves, and not torchrun's."""

PORTS_PER_JOB = 97
"""Steps of a job that get ports of their own; prime to `NUM_PORTS`, so that neighbouring jobs do not meet either."""

MPIRUN_SIZES = ("OMPI_COMM_WORLD_SIZE",)
"""Number of processes of an `mpirun` that starts its own helpers by srun: the variables of that step are not ours."""

MPI_SIZES = (*MPIRUN_SIZES, "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Number of processes, as MPI's launchers export it; srun sets some of these too."""

REMEDY = (
    "start one task for each process with `srun python -m fedsim.main`, or one torchrun for each node with "
    "`srun --ntasks-per-node=1 torchrun --nnodes N --nproc_per_node M --rdzv_backend c10d --rdzv_endpoint HOST:PORT "
    "-m fedsim.main`; to have separate runs on purpose, unset SLURM_STEP_ID"
)


def map_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give the tasks of a Slurm step RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Where a launcher has set RANK and WORLD_SIZE they stand, as MASTER_ADDR and MASTER_PORT always do. Only values of
    the step count: those of the job (SLURM_NTASKS) are also set in a batch script or an interactive shell, where one
    process runs.

    Raises:
        ConfigError: the processes that were started together would not run together; or Slurm's variables contradict
            each other.
    """
    tasks = _tasks_of_step(environment)
    if "RANK" in environment and "WORLD_SIZE" in environment:
        _refuse_separate_worlds(environment, tasks)
    elif tasks > 1:
        _refuse_mpi(environment, MPIRUN_SIZES)
        _map_step(environment, tasks)
    elif "RANK" not in environment and "WORLD_SIZE" not in environment:
        _refuse_mpi(environment, MPI_SIZES)


def _tasks_of_step(environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm step that this process is one of; 1 outside of a step."""
    if "SLURM_STEP_ID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return 1
    return _number(environment, "SLURM_STEP_NUM_TASKS")


def _map_step(environment: MutableMapping[str, str], tasks: int) -> None:
    by_node = tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    hosts = host_names(_text(environment, "SLURM_STEP_NODELIST"))
    node = _number(environment, "SLURM_NODEID")
    if sum(by_node) != tasks or len(hosts) != len(by_node) or node >= len(by_node):
        names = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_NODEID")
        shown = ", ".join(f"{name}={environment[name]}" for name in names)
        raise ConfigError(f"the variables of a Slurm step must fit each other, got {shown}; {REMEDY}")
    found = {
        "RANK": _number(environment, "SLURM_PROCID"),
        "LOCAL_RANK": _number(environment, "SLURM_LOCALID"),
        "WORLD_SIZE": tasks,
        "LOCAL_WORLD_SIZE": by_node[node],
    }
    port = step_port(_number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID"))
    environment.update({name: str(value) for name, value in found.items()})
    environment.setdefault("MASTER_ADDR", hosts[0])
    environment.setdefault("MASTER_PORT", str(port))


def step_port(job_id: int, step_id: int) -> int:
    """A port for the processes of a step; another one for the next steps of the job and for the next jobs."""
    return FIRST_PORT + (job_id * PORTS_PER_JOB + step_id) % NUM_PORTS


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node, from SLURM_STEP_TASKS_PER_NODE: `2(x3),1` is [2, 2, 2, 1].

    Raises:
        ConfigError: the text is of another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:\(x(\d{1,7})\))?", part.strip())
        if match is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE must read like 2(x3),1, got '{text}'; {REMEDY}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def host_names(text: str) -> list[str]:
    """Host names of a Slurm node list, in its order: `n[01-03,7],login` is [n01, n02, n03, n7, login].

    Raises:
        ConfigError: the text is no node list.
    """
    # entries end at commas outside of brackets
    entries = re.findall(r"(?:[^\[\],]|\[[^\[\]]*\])+", text)
    if not entries or ",".join(entries) != text:
        raise ConfigError(f"a Slurm node list must read like n[01-03,7],login, got '{text}'; {REMEDY}")
    return [host for entry in entries for host in _expand(entry, text)]


def _expand(entry: str, whole: str) -> list[str]:
    """Hosts of an entry with any number of bracketed ranges; the last one counts fastest."""
    hosts = [""]
    for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", entry):
        endings = [plain] if plain else [item for part in ranges.split(",") for item in _range(part, whole)]
        hosts = [host + ending for host in hosts for ending in endings]
    return hosts


def _range(part: str, whole: str) -> list[str]:
    """`08-10` is [08, 09, 10]; `7` is [7]."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip())
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise ConfigError(f"a Slurm node list must read like n[01-03,7],login, got '{whole}'; {REMEDY}")
    first, last = int(match[1]), int(match[2] or match[1])
    return [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]


def _refuse_separate_worlds(environment: Mapping[str, str], tasks: int) -> None:
    """Each task of a step has set up a world of its own: a torchrun that knows nothing of the other nodes."""
    names = ("WORLD_SIZE", "GROUP_WORLD_SIZE")  # all processes, and torchrun's own: one for each node
    alone = [f"{name}=1" for name in names if environment.get(name, "").strip() == "1"]
    if tasks > 1 and alone:
        raise ConfigError(
            f"the {tasks} tasks of this Slurm step must form one run, and each would be a run of its own "
            f"({', '.join(alone)}); {REMEDY}"
        )


def _refuse_mpi(environment: Mapping[str, str], sizes: Sequence[str]) -> None:
    for name in sizes:
        if environment.get(name, "1").strip() not in ("", "1"):
            raise ConfigError(
                f"the processes of an MPI launcher must be told their RANK and WORLD_SIZE, got {name}="
                f"{environment[name]} alone, and each would be a run of its own; start with torchrun or srun instead"
            )


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ConfigError(f"Slurm must set {name} in a step of several tasks, got nothing; {REMEDY}")
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not re.fullmatch(r"\d{1,12}", text.strip()):
        raise ConfigError(f"Slurm must set {name} to a whole number, got '{text}'; {REMEDY}")
    return int(text)
