"""A real Slurm cluster on one machine, for tests: several nodes, no systemd, no cgroups, nothing in /etc/slurm.

    python tests/slurm/local_slurm.py up FOLDER [--nodes 2] [--cpus 4] [--gpus 2] [--plain-preemption]
    eval "$(python tests/slurm/local_slurm.py env FOLDER)"       # sbatch, srun and squeue talk to this cluster
    python tests/slurm/local_slurm.py status|reset|down FOLDER
    python tests/slurm/local_slurm.py crash|restore FOLDER NODE

Every node is one slurmd with a port of its own; all of them are this machine. Everything lives in FOLDER, apart from a
marked line in /etc/hosts for each node name. Which processes belong to a cluster is read from their environment, so no
process that happens to have got an old process id is ever ended.

Needs Slurm 22.05 or newer (Debian: munge slurmctld slurmd slurm-client) and the standard library only.
"""

import argparse
import contextlib
import fcntl
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "srun", "scontrol", "scancel", "squeue")
LONGEST_FOLDER = 70
"""Characters: the path of a unix socket must fit 108 bytes."""

ROLE = "LOCAL_SLURM_ROLE"
HOSTS = Path("/etc/hosts")
FOREIGN = re.compile(r"(SLURM|SLURMD|SLURMCTLD|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL)_")


class ClusterError(Exception):
    """The cluster cannot start here, or no longer does what it is asked; the text says why."""


@dataclass(frozen=True)
class Size:
    """What the nodes claim to have; it may exceed the machine."""

    nodes: int = 2
    cpus: int = 4
    gpus: int = 2
    memory_mb: int = 8192


class LocalSlurm:
    """A cluster in `folder`. Two of them may run at the same time.

    Partitions: `main` (the default), whose jobs take nodes from those of `spot`. A job of `spot` that has to go is
    requeued after 10 s of grace.

    Args:
        size: of the nodes, named n1, n2, ...
        user_signal: a job that is preempted gets the signal it asked for with --signal, at once. False: only its
            steps are told, by SIGCONT and SIGTERM, which is Slurm's default.
    """

    def __init__(self, folder: Path, size: Size = Size(), user_signal: bool = True) -> None:
        self.folder = folder.resolve()
        self.size = size
        self.user_signal = user_signal
        self.conf = self.folder / "slurm.conf"
        self.nodes = [f"n{index + 1}" for index in range(size.nodes)]

    # ------------------------------------------------------------ start and end

    def up(self, owner: int | None = None) -> None:
        """Start all daemons and return when a job has run on every node.

        Args:
            owner: process id; the cluster is taken down when that process ends without having done so.

        Raises:
            ClusterError: a program is missing, the machine does not allow it, or a daemon does not start.
        """
        self._check_machine()
        if self.processes():
            raise ClusterError(f"a cluster is running in {self.folder}")
        for name in ("munge", "state", "log", "dev", "cgroup", *(f"spool-{node}" for node in self.nodes)):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        # jobs of any user must reach munge's socket
        self.folder.chmod(0o755)
        try:
            self._write_configuration()
            self._name_nodes()
            if owner is not None:
                self._start(
                    "guard", ["setsid", "-f", sys.executable, __file__, "guard", str(self.folder), str(owner)]
                )
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-i", "-f", str(self.conf)])
            for node in self.nodes:
                self.restore(node)
            # `sinfo` calls a node idle whose slurmd has died a moment ago; a job that has run is no opinion
            self._wait("all nodes to be idle", self._all_idle, 30)
            self.run("srun", "--quiet", f"--nodes={self.size.nodes}", "--immediate=20", "true", timeout_s=40)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """End everything that belongs to the cluster. What is down already stays so."""
        if self._pids(lambda process: process.name == "slurmctld"):
            self._cancel_all()
        # the controller first: it would wait for nodes that have gone
        self._end(lambda process: process.name == "slurmctld")
        self._end(lambda process: process.name == "slurmd")
        self._end(lambda process: process.role not in ("munged", "guard"), at_once=True)
        self._end(lambda process: True)
        self._forget_nodes()

    def reset(self) -> None:
        """Cancel all jobs, end what they left behind, and put drained nodes back: a clean cluster for the next test."""
        self._cancel_all()
        self._end(lambda process: process.is_job, at_once=True)
        for node in self.nodes:
            if not self._pids(lambda process, node=node: process.name == "slurmd" and process.role == node):
                self.restore(node)
        for node in set(self.run("sinfo", "-h", "-N", "-t", "drain,down,fail", "-o", "%N").split()):
            self.run("scontrol", "update", f"nodename={node}", "state=resume")
        self._wait("all nodes to be idle", self._all_idle, 60)

    def crash(self, node: str) -> None:
        """End a node without warning: its slurmd, its step daemons and every process of a job on it."""
        self._end(lambda process: process.role == node, at_once=True)

    def restore(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(node, ["slurmd", "-N", node, "-f", str(self.conf)])

    # ------------------------------------------------------------ use

    def environment(self) -> dict[str, str]:
        """This process's environment, with this cluster's Slurm in it and no other."""
        mine = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        system = os.pathsep.join([mine.get("PATH", ""), "/usr/sbin", "/sbin"])
        return mine | {"SLURM_CONF": str(self.conf), "PATH": system}

    def run(
        self,
        *command: str,
        extra: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60,
    ) -> str:
        """Standard output of a command that talks to the cluster.

        Raises:
            ClusterError: the command failed or took too long.
        """
        try:
            done = subprocess.run(
                command,
                env=self.environment() | dict(extra or {}),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"{shlex.join(command)} took more than {timeout_s} s") from error
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def processes(self) -> "list[Process]":
        """What runs of this cluster: daemons, step daemons and processes of jobs."""
        return list(_processes_of(self.conf))

    # ------------------------------------------------------------ inside

    def _check_machine(self) -> None:
        path = self.environment()["PATH"]
        missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
        if missing:
            raise ClusterError(f"{', '.join(missing)} not found")
        if len(str(self.folder)) > LONGEST_FOLDER:
            raise ClusterError(f"the path {self.folder} is longer than {LONGEST_FOLDER} characters")
        if not os.access(HOSTS, os.W_OK) and any(not _is_here(node) for node in self.nodes):
            raise ClusterError(f"{HOSTS} cannot be written, and the node names must resolve to this machine")

    def _write_configuration(self) -> None:
        for index in range(self.size.gpus):
            # slurmd sets CUDA_VISIBLE_DEVICES for character devices only, and one file may not count twice
            (self.folder / "dev" / f"gpu{index}").symlink_to("/dev/null")
        self.conf.write_text(self._slurm_conf(), encoding="utf-8")
        files = f"{self.folder}/dev/gpu[0-{self.size.gpus - 1}]"
        gpus = f"Name=gpu File={files}\n" if self.size.gpus else ""
        (self.folder / "gres.conf").write_text(gpus, encoding="utf-8")
        (self.folder / "cgroup.conf").write_text(self._cgroup_conf(), encoding="utf-8")
        (self.folder / "plugstack.conf").write_text("", encoding="utf-8")

    def _cgroup_conf(self) -> str:
        """slurmd starts its cgroup plugin though nothing asks for it, and ends if it cannot write to the hierarchy."""
        version = re.search(r"(\d+)\.(\d+)", self.run("slurmd", "-V"))
        if version is not None and (int(version[1]), int(version[2])) >= (24, 5):
            return "CgroupPlugin=disabled\n"
        # the first version with a mount point of its own touches nothing outside it
        return f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroup\n"

    def _slurm_conf(self) -> str:
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + self.size.nodes)
        keys = {
            "ClusterName": "local",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge",
            # a requeued job waits until its old credential has expired: 120 s by default, and 5 is the least
            "AuthInfo": f"socket={self.folder}/munge/socket,cred_expire=5",
            # programs derive ports from job ids: those of two clusters on one machine must differ
            "FirstJobId": random.randint(1, 9_000) * 100,
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
            "SlurmctldLogFile": self.folder / "log" / "slurmctld.log",
            "SlurmdLogFile": self.folder / "log" / "slurmd-%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/none",
            "MpiDefault": "none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "DefMemPerCPU": 256,
            "SlurmdParameters": "config_overrides",  # believe the node lines below, not the hardware
            "PropagateResourceLimits": "NONE",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "ReturnToService": 2,
            "SlurmdTimeout": 8,
            "KillWait": 5,
            "UnkillableStepTimeout": 20,
            "MinJobAge": 3600,  # seconds that `scontrol show job` still knows a finished job
        }
        if self.user_signal:
            keys["SlurmctldParameters"] = "preempt_send_user_signal"
        lines = [f"{key}={value}" for key, value in keys.items()]
        if self.size.gpus:
            lines.append("GresTypes=gpu")
        gres = f" Gres=gpu:{self.size.gpus}" if self.size.gpus else ""
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.size.cpus}"
            f" RealMemory={self.size.memory_mb}{gres} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        ]
        partition = "Nodes=ALL DefaultTime=10 MaxTime=60"
        lines.append(f"PartitionName=main {partition} Default=YES PriorityTier=10 PreemptMode=OFF")
        lines.append(f"PartitionName=spot {partition} PriorityTier=1 PreemptMode=REQUEUE GraceTime=10")
        return "\n".join(lines) + "\n"

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]
        # --force: the folder may lie below one that others may write to, such as /tmp
        self._start("munged", ["munged", "--force", *options])

    def _start(self, role: str, command: list[str]) -> None:
        """Call a daemon that goes to the background by itself; its environment says whose it is."""
        with (self.folder / "log" / f"{role}.out").open("ab") as output:
            code = subprocess.run(
                command,
                env=self.environment() | {ROLE: role},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=30,
                check=False,
            ).returncode
        if code != 0:
            raise ClusterError(f"{command[0]} ended with {code}: {self._log(role)}")

    def _log(self, role: str) -> str:
        """The last words of a daemon."""
        stems = {role, f"slurmd-{role}"}
        logs = [path for path in (self.folder / "log").iterdir() if path.stem in stems]
        lines = [
            line for path in logs for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        fatal = [line for line in lines if "fatal" in line]
        return (fatal or lines or ["it said nothing"])[-1]

    def _all_idle(self) -> bool:
        dead = self._dead()
        if dead:
            time.sleep(0.5)  # a daemon on its way to the background is not to be seen for a moment
            dead &= self._dead()
        if dead:
            raise ClusterError("; ".join(f"{role} has ended: {self._log(role)}" for role in sorted(dead)))
        try:
            states = set(self.run("sinfo", "-h", "-N", "-o", "%N %T", timeout_s=10).splitlines())
        except ClusterError:  # the controller does not answer yet
            return False
        return states == {f"{node} idle" for node in self.nodes}

    def _dead(self) -> set[str]:
        """Roles without their daemon."""
        alive = {process.role for process in self.processes() if process.name in ("slurmctld", "slurmd")}
        return {"slurmctld", *self.nodes} - alive

    def _cancel_all(self) -> None:
        with contextlib.suppress(ClusterError):
            jobs = self.run("squeue", "-h", "-o", "%A", timeout_s=10).split()
            if jobs:
                self.run("scancel", "--full", *sorted(set(jobs)), timeout_s=10)
            self._wait(
                "the queue to be empty", lambda: not self.run("squeue", "-h", timeout_s=10).strip(), 20
            )

    def _wait(self, what: str, is_done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {seconds} s for {what}")
            time.sleep(0.05)

    def _pids(self, which: "Callable[[Process], bool]") -> list[int]:
        return [process.pid for process in self.processes() if which(process)]

    def _end(self, which: "Callable[[Process], bool]", at_once: bool = False) -> None:
        """SIGTERM, five seconds, SIGKILL; or SIGKILL at once."""
        deadline = time.monotonic() + (0 if at_once else 5)
        unseen = 0
        signal_all(self._pids(which), signal.SIGTERM if not at_once else signal.SIGKILL)
        while unseen < 2:  # a process may fork while it is looked for
            pids = self._pids(which)
            unseen = 0 if pids else unseen + 1
            if time.monotonic() > deadline:
                signal_all(pids, signal.SIGKILL)
            if time.monotonic() > deadline + 10:
                raise ClusterError(f"processes {pids} do not end")
            time.sleep(0.02)

    def _name_nodes(self) -> None:
        if os.access(HOSTS, os.W_OK):
            lines = "".join(f"127.0.0.1\t{node} # local slurm {self.folder}\n" for node in self.nodes)
            _edit_hosts(lambda text: text + ("" if text.endswith("\n") else "\n") + lines)

    def _forget_nodes(self) -> None:
        mark = f"# local slurm {self.folder}\n"
        if os.access(HOSTS, os.W_OK) and mark in HOSTS.read_text(encoding="utf-8"):
            _edit_hosts(
                lambda text: "".join(
                    line for line in text.splitlines(keepends=True) if not line.endswith(mark)
                )
            )


@dataclass(frozen=True)
class Process:
    """A process of a cluster.

    Attributes:
        role: munged, slurmctld, guard, or the node it runs on.
        name: the program's, as the kernel has it.
        is_job: it was started by a job, as opposed to a daemon.
        environment: all of it.
    """

    pid: int
    role: str
    name: str
    is_job: bool
    environment: Mapping[str, str]


def _processes_of(conf: Path) -> Iterator[Process]:
    """Processes whose environment names this cluster. A zombie has no environment and does not count."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            name = (folder / "comm").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # it has ended, or is another user's
            continue
        environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        role = environment.get(ROLE, environment.get("SLURMD_NODENAME"))
        if environment.get("SLURM_CONF") == str(conf) and role and int(folder.name) != os.getpid():
            yield Process(int(folder.name), role, name, ROLE not in environment, environment)


def signal_all(pids: list[int], number: int) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that the kernel hands to outgoing connections."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 20_000), 1_000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ClusterError(f"fewer than {count} of 1000 ports were free")


def _is_here(node: str) -> bool:
    try:
        return socket.gethostbyname(node).startswith("127.")
    except OSError:
        return False


def _edit_hosts(change: Callable[[str], str]) -> None:
    """Rewrite /etc/hosts in place: in a container it is a mount that cannot be replaced. One cluster at a time."""
    with HOSTS.open("r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = change(file.read())
        file.seek(0)
        file.write(text)
        file.truncate()


def _guard(cluster: LocalSlurm, owner: int) -> None:
    """Take the cluster down when its owner has ended without having done so."""
    while Path(f"/proc/{owner}").exists():
        time.sleep(1)
    cluster.down()


def _exports(cluster: LocalSlurm) -> str:
    foreign = sorted(name for name in os.environ if FOREIGN.match(name) and name != "SLURM_CONF")
    return (
        "".join(f"unset {name}\n" for name in foreign)
        + f"export SLURM_CONF={shlex.quote(str(cluster.conf))}\n"
    )


def _known_nodes(folder: Path) -> int:
    """How many nodes the cluster in `folder` was started with."""
    conf = folder / "slurm.conf"
    return conf.read_text(encoding="utf-8").count("NodeName=") if conf.exists() else Size.nodes


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("up", "down", "env", "status", "reset", "crash", "restore", "guard"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", nargs="?", default="", help="the node, for crash and restore")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--cpus", type=int, default=Size.cpus)
    parser.add_argument("--gpus", type=int, default=Size.gpus)
    parser.add_argument(
        "--plain-preemption", action="store_true", help="SIGTERM to steps, not the job's own signal"
    )
    given = parser.parse_args()
    size = Size(given.nodes or _known_nodes(given.folder), given.cpus, given.gpus)
    cluster = LocalSlurm(given.folder, size, user_signal=not given.plain_preemption)
    try:
        match given.verb:
            case "up":
                cluster.up()
            case "down":
                cluster.down()
            case "env":
                sys.stdout.write(_exports(cluster))
            case "status":
                for process in cluster.processes():
                    sys.stdout.write(f"{process.role:10} {process.pid:8} {process.name}\n")
                sys.stdout.write(cluster.run("sinfo", "-N") + cluster.run("squeue"))
            case "reset":
                cluster.reset()
            case "guard":
                _guard(cluster, int(given.target))
            case "crash" | "restore" if given.target in cluster.nodes:
                getattr(cluster, given.verb)(given.target)
            case _:
                parser.error(f"{given.verb} needs one of the nodes {', '.join(cluster.nodes)}")
    except ClusterError as error:
        sys.stderr.write(f"local_slurm: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
