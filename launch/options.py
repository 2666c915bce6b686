"""Options of the commands that submit to Slurm, alone and together with a site profile."""

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError
from launch.arguments import positive
from launch.profile import SiteProfile, find_profile, load_profile
from launch.script import Container, Launcher, Resources, Restarts, Setup

DEFAULT_LEAD_S = 300
DEFAULT_MAX_FAILURES = 3


@dataclass(frozen=True)
class Job:
    """What every script of a submission has in common.

    Attributes:
        resources: see `Batch`.
        launcher: see `Batch`.
        container: see `Batch`.
        setup: see `Batch`.
        restarts: see `Batch`; without the name of a chain.
        dependency: of the first job, as sbatch reads it.
        chain: how many jobs, each after the one before.
    """

    resources: Resources
    launcher: Launcher
    container: Container | None
    setup: Setup
    restarts: Restarts
    dependency: str | None
    chain: int


def add_slurm_options(parser: argparse.ArgumentParser) -> "argparse._ArgumentGroup":
    """Add the options that say what to ask Slurm for; all of them are None, or empty, unless given."""
    group = parser.add_argument_group(
        "Slurm", "what is not given is left to the site profile, then to the site"
    )
    group.add_argument("--nodes", type=positive, metavar="N", help="default: 1")
    group.add_argument("--gpus-per-node", type=_count, metavar="G", help="one process a GPU is started")
    group.add_argument(
        "--processes-per-node", type=positive, metavar="P", help="default: the GPUs of a node, without any 1"
    )
    group.add_argument(
        "--cpus-per-task",
        type=positive,
        metavar="C",
        help="cores of a node's torchrun with all its processes or, with --launcher srun, of each process",
    )
    group.add_argument("--mem", type=_memory, metavar="SIZE", help="memory of a node, such as 64G")
    group.add_argument("--time", type=_time_limit, metavar="LIMIT", help="such as 04:00:00 or 3-00:00:00")
    for name in ("partition", "account", "qos", "constraint"):
        group.add_argument(f"--{name}", type=_text, metavar="NAME", help="as sbatch takes it")
    group.add_argument(
        "--launcher", choices=("torchrun", "srun"), help="torchrun (default), or one srun task a process"
    )
    group.add_argument("--container", type=_text, metavar="IMAGE", help="run inside this image")
    group.add_argument("--container-runtime", choices=("apptainer", "pyxis"), help="default: apptainer")
    group.add_argument("--profile", metavar="SITE", help="a site profile: a file, or a name to search for")
    group.add_argument(
        "--dependency", type=_text, metavar="D", help="as sbatch takes it, such as afterok:123"
    )
    group.add_argument(
        "--chain",
        type=positive,
        metavar="N",
        help="N jobs, each after the one before, instead of one that requeues itself",
    )
    group.add_argument(
        "--signal-lead",
        type=positive,
        metavar="S",
        help=f"seconds before the time limit at which the run is asked to stop; default: {DEFAULT_LEAD_S}",
    )
    group.add_argument(
        "--max-failures",
        type=_count,
        metavar="F",
        help=f"failures in a row without progress before the job gives up; default: {DEFAULT_MAX_FAILURES}",
    )
    group.add_argument(
        "--setup",
        type=Path,
        metavar="FILE",
        help="shell lines that the job sources last, before fedsim starts",
    )
    group.add_argument("--extra", type=_extra, metavar='"..."', help="more options of sbatch")
    group.add_argument(
        "--dry-run", action="store_true", help="print the script and the command; write nothing"
    )
    group.add_argument("--test", action="store_true", help="ask sbatch --test-only; write nothing")
    return group


def parse_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command with these options; the value of --extra may begin with dashes."""
    words: list[str] = []
    for word in arguments:
        if words and words[-1] == "--extra":
            words[-1] = f"--extra={word}"
        else:
            words.append(word)
    return parser.parse_intermixed_args(words)


def build_job(options: argparse.Namespace, environment: Mapping[str, str]) -> Job:
    """The options over the profile that they name.

    Raises:
        ConfigError: the profile or the file of --setup is not there or wrong, or options contradict each other.
    """
    site = SiteProfile()
    if options.profile is not None:
        site = load_profile(find_profile(options.profile, environment, Path.home()), environment)
    if options.dry_run and options.test:
        raise ConfigError(
            "--dry-run and --test must not be given together; --test asks Slurm, --dry-run nobody"
        )
    if options.setup is not None and not options.setup.is_file():
        raise ConfigError(f"--setup must be a file, and there is no {options.setup}")
    if options.container_runtime is not None and options.container is None and site.container is None:
        raise ConfigError("--container-runtime needs --container IMAGE, or a profile with one")
    resources = _resources(options, site)
    lead = _first(options.signal_lead, site.signal_lead, DEFAULT_LEAD_S)
    limit = None if resources.time is None else seconds(resources.time)
    if limit is not None and lead >= limit:
        raise ConfigError(
            f"--signal-lead must be shorter than --time, {resources.time} ({limit} s), got {lead} s; "
            "it must be longer than a round takes"
        )
    chain = options.chain or 1
    if chain > 1 and "?" in (options.dependency or ""):
        raise ConfigError(
            "--dependency must hold no '?' (one of several) with --chain, whose jobs also wait for the one before, got "
            f"{options.dependency!r}"
        )
    container = _container(options, site)
    return Job(
        resources=resources,
        launcher=_first(options.launcher, site.launcher, "torchrun"),
        container=container,
        setup=_setup(options, site, container is not None, environment),
        restarts=Restarts(
            lead,
            _first(options.max_failures, site.max_failures, DEFAULT_MAX_FAILURES),
            requeue=site.requeue and chain == 1,
        ),
        dependency=options.dependency,
        chain=chain,
    )


def seconds(limit: str) -> int | None:
    """A time limit of sbatch in seconds; None for one without an end.

    Raises:
        ConfigError: it is none.
    """
    if limit.upper() in ("INFINITE", "UNLIMITED"):
        return None
    days, dash, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", limit):
        raise ConfigError(
            f"--time must be minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, got '{limit}'"
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def _resources(options: argparse.Namespace, site: SiteProfile) -> Resources:
    def given(name: str) -> str | None:
        value = _first(getattr(options, name), getattr(site, name))
        if value is not None and not str(value).isprintable():
            raise ConfigError(f"{name} must be one line of printable text, got {value!r}")
        return None if value is None else str(value)

    time = given("time")
    if time is not None:
        seconds(time)
    extra = tuple(option for text in site.extra for option in _extra(text))
    return Resources(
        nodes=options.nodes or 1,
        gpus_per_node=_first(options.gpus_per_node, site.gpus_per_node),
        gpu_request=site.gpu_request,
        processes_per_node=options.processes_per_node,
        cpus_per_task=_first(options.cpus_per_task, site.cpus_per_task),
        mem=given("mem"),
        time=time,
        partition=given("partition"),
        account=given("account"),
        qos=given("qos"),
        constraint=given("constraint"),
        extra=(*extra, *(options.extra or ())),
    )


def _container(options: argparse.Namespace, site: SiteProfile) -> Container | None:
    image = options.container or (site.container and site.container.image)
    if not image:
        return None
    binds = site.container.binds if site.container else ()
    wrong = [bind for bind in binds if "," in bind]
    if wrong:
        raise ConfigError(f"container.binds must be folders without commas in their names, got {wrong[0]!r}")
    runtime = options.container_runtime or (site.container.runtime if site.container else "apptainer")
    return Container(image, runtime, tuple(binds))


def _setup(
    options: argparse.Namespace, site: SiteProfile, in_container: bool, around: Mapping[str, str]
) -> Setup:
    environment, lines = dict(site.environment), list(site.setup)
    if site.scratch is not None:
        scratch = Path(site.scratch)
        if around.get("HF_HOME"):  # where the user has downloaded what nodes without a network must find
            environment.setdefault("HF_HOME", around["HF_HOME"])
        for name, folder in {"FEDSIM_CACHE": "fedsim-cache", "HF_HOME": "huggingface"}.items():
            environment.setdefault(name, str(scratch / folder))
        lines.insert(0, 'mkdir -p "$FEDSIM_CACHE" "$HF_HOME"')
    elsewhere = in_container or site.venv or site.conda_env
    in_venv = sys.prefix != sys.base_prefix
    return Setup(
        python=None if elsewhere or in_venv else sys.executable,
        modules=site.modules,
        venv=sys.prefix if in_venv and not elsewhere else site.venv,
        conda_env=site.conda_env,
        environment=environment,
        lines=tuple(lines),
        file=None if options.setup is None else options.setup.absolute(),
    )


def _first(*values: Any) -> Any:
    """The first value that is given, else None."""
    return next((value for value in values if value is not None), None)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"must be one line of printable text, got {text!r}")
    return text


def _memory(text: str) -> str:
    if not re.fullmatch(r"[0-9]+[KMGTkmgt]?", text):
        raise argparse.ArgumentTypeError(f"must be a size such as 64G, got {text!r}")
    return text


def _time_limit(text: str) -> str:
    try:
        seconds(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--time ")) from error
    return text


def _extra(text: str) -> tuple[str, ...]:
    """Options in one text, each with its values, as they would stand in a script."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot be read as words ({error}), got {text!r}") from error
    options: list[str] = []
    for word in words:
        quoted = shlex.quote(word) if re.search(r"[\s\"'\\]", word) else word
        if word.startswith("-"):
            options.append(quoted)
        elif options:
            options[-1] += f" {quoted}"
        else:
            raise argparse.ArgumentTypeError(f"must begin with an option of sbatch, got {text!r}")
    return tuple(options)
