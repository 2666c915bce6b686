"""Where and with what a run ran, as far as it can be found out without asking."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedsim

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "omegaconf",
    "wandb",
)

GIT_TIMEOUT_S = 10.0


def describe_environment(world_size: int, argv: Sequence[str]) -> dict[str, Any]:
    """Versions, source commit, hardware and command line, as JSON-like values for `run.json`.

    Never fails: what cannot be found out is None. The hardware is that of the machine it is called on.
    """
    return {
        "command_line": list(argv),
        "world_size": world_size,
        "versions": _versions(),
        "source": _source_commit(),
        "hardware": _hardware(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "fedsim": fedsim.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _source_commit() -> dict[str, Any]:
    """Commit of the checkout fedsim runs from, and whether files differ from it; None without one."""
    package = Path(fedsim.__file__).parent
    # An installed fedsim may lie inside somebody else's repository, in a virtual environment there.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = _git(package, "status", "--porcelain", "--", "..")
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": None if changes is None else changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None if it fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "cpu_cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": _memory_bytes(),
        "gpus": _gpus(),
    }


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[dict[str, Any]]:
    """Every GPU that this process sees."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError:  # a device that is listed and cannot be opened
            continue
        gpus.append({"name": properties.name, "memory_bytes": properties.total_memory})
    return gpus
