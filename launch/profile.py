"""What differs from cluster to cluster: a site profile in YAML, checked key by key."""

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsim.errors import ConfigError

VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
Words = tuple[Annotated[str, Field(min_length=1)], ...]


class Node(BaseModel):
    """A node of a profile."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ContainerProfile(Node):
    """The container that jobs run in."""

    image: str = Field(min_length=1)
    runtime: Literal["apptainer", "pyxis"] = "apptainer"
    binds: Words = ()


class SiteProfile(Node):
    """A cluster's ways. Every key may be left out; an option on the command line wins over its key.

    Attributes:
        partition: and account, qos, constraint, time, mem, gpus_per_node, cpus_per_task: options of sbatch.
        gpu_request: how GPUs are asked for: --gpus-per-node, or --gres=gpu: where only that is known.
        launcher: torchrun or srun.
        modules: loaded in this order.
        venv: a virtual environment.
        conda_env: a conda environment.
        environment: variables for the job.
        scratch: a folder with room: FEDSIM_CACHE and HF_HOME are put there unless `environment` sets them, or HF_HOME
            is set where the job is submitted.
        container: the image, and what it sees.
        setup: lines of shell that the job runs before fedsim.
        extra: more options of sbatch.
        requeue: false where jobs may not requeue themselves.
        signal_lead: seconds before the time limit at which a run is asked to stop.
        max_failures: failures in a row without progress that are forgiven.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    gpus_per_node: int | None = Field(None, ge=0)
    cpus_per_task: int | None = Field(None, gt=0)
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    launcher: Literal["torchrun", "srun"] | None = None
    modules: Words = ()
    venv: str | None = None
    conda_env: str | None = None
    environment: Mapping[Annotated[str, Field(pattern=f"^{VARIABLE}$")], str] = Field(default_factory=dict)
    scratch: str | None = None
    container: ContainerProfile | None = None
    setup: Words = ()
    extra: Words = ()
    requeue: bool = True
    signal_lead: int | None = Field(None, gt=0)
    max_failures: int | None = Field(None, ge=0)


def find_profile(name: str, environment: Mapping[str, str], home: Path) -> Path:
    """The file of a profile: `name` itself if it looks like a path, else NAME.yaml in a folder of profiles.

    Args:
        name: as the user gave it.
        environment: FEDSIM_SITES in it lists folders, with colons between them; they are searched first.
        home: its .config/fedsim/sites is searched last.

    Raises:
        ConfigError: there is no such file.
    """
    folders = [Path(folder) for folder in environment.get("FEDSIM_SITES", "").split(":") if folder]
    folders.append(home / ".config" / "fedsim" / "sites")
    if "/" in name or name.endswith((".yaml", ".yml")):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"--profile must be a file or a profile's name, and there is no file {name}")
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    nearest = get_close_matches(name, known, n=1)
    remedy = (
        f"; did you mean '{nearest[0]}'?" if nearest else f"; known are {', '.join(known)}" if known else ""
    )
    searched = ", ".join(str(folder) for folder in folders)
    raise ConfigError(f"unknown profile '{name}': no {name}.yaml in {searched}{remedy}")


def load_profile(path: Path, environment: Mapping[str, str]) -> SiteProfile:
    """Read and check a profile; $NAME and ${NAME} in its paths and values become what `environment` says.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, a value is wrong, or a variable is not set.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"profile {path} cannot be read: {reason}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"profile {path} must hold keys such as 'partition: gpu', got {tree!r}")
    try:
        profile = SiteProfile.model_validate(_with_tuples(tree))
    except ValidationError as error:
        problems = "; ".join(_plain(entry) for entry in error.errors(include_url=False)[:5])
        raise ConfigError(f"profile {path}: {problems}") from error
    return _expanded(profile, path, environment)


def _plain(entry: Any) -> str:
    """One problem that pydantic found, in words."""
    name = ".".join(str(part) for part in entry["loc"])
    if entry["type"] != "extra_forbidden":
        return f"{name}: {entry['msg'][0].lower()}{entry['msg'][1:]}, got {entry['input']!r}"
    node = ContainerProfile if len(entry["loc"]) > 1 else SiteProfile
    nearest = get_close_matches(str(entry["loc"][-1]).replace("-", "_"), list(node.model_fields), n=1)
    known = f"did you mean '{nearest[0]}'?" if nearest else f"keys are {', '.join(node.model_fields)}"
    return f"unknown key {name}; {known}"


def _expanded(profile: SiteProfile, path: Path, environment: Mapping[str, str]) -> SiteProfile:
    def expand(text: str) -> str:
        def value(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name not in environment:
                raise ConfigError(f"profile {path} uses ${name}, and that variable is not set")
            return environment[name]

        text = re.sub(rf"\$(?:({VARIABLE})|\{{({VARIABLE})\}})", value, text)
        return os.path.expanduser(text)  # noqa: PTH111 - of the part before the first slash only

    container = profile.container
    if container is not None:
        binds = tuple(expand(bind) for bind in container.binds)
        container = container.model_copy(update={"image": expand(container.image), "binds": binds})
    return profile.model_copy(
        update={
            "environment": {name: expand(value) for name, value in profile.environment.items()},
            "scratch": None if profile.scratch is None else expand(profile.scratch),
            "venv": None if profile.venv is None else expand(profile.venv),
            "container": container,
        }
    )


def _with_tuples(value: Any) -> Any:
    """Strict pydantic models want tuples where YAML has lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value
