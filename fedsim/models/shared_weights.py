"""One copy of the weights for all processes of a node that run on its CPUs.

Tensors of a safetensors file are mapped into memory, so that processes which load the same file share its pages. They
do not where the file has another type than the one that is wanted, since each process then converts for itself: OPT's
files are float16, a CPU wants float32. So the weights are converted once, into the cache, and mapped from there.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fedsim.cache import CacheError, cache_root, cached_folder
from fedsim.models.embedded import package_versions
from fedsim.models.quiet import quiet_transformers

FORMAT = 1
"""Raised whenever the same files would have to be converted to others."""

ROOM = 2.0
"""Times the bytes of the converted weights that must be free on the cache's disk."""

NAMES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of floating-point types in safetensors files."""

logger = logging.getLogger(__name__)


def shared_folder(folder: Path, dtype: torch.dtype, load: Callable[[], nn.Module]) -> Path:
    """The folder from which processes of this node map weights of `dtype`; made first if it is not in the cache.

    `folder` itself if its files have that type, if other processes of the node are not said to be there, and, with a
    warning, if the cache cannot take the converted weights.

    Args:
        folder: with weights in safetensors format.
        dtype: that is wanted.
        load: the model of the folder, its weights of that type.
    """
    if _processes_of_node() == 1:
        return folder
    try:
        values, converted = _count_values(folder, dtype)
    except (SafetensorError, OSError):
        return folder  # whoever loads it says what is wrong
    if not converted:
        return folder
    needed = values * dtype.itemsize
    try:
        free = _free_bytes(cache_root())
        if free < ROOM * needed:
            raise CacheError(
                f"{cache_root()} has {free / 1e9:.1f} GB free, {ROOM * needed / 1e9:.1f} are wanted"
            )
        entry = cached_folder("converted-weights", _content(folder, dtype), lambda into: _save(load(), into))
    except (CacheError, SafetensorError, OSError) as error:
        logger.warning(
            "%s: each process converts its weights to %s and holds a copy of %.1f GB of its own, since the cache could "
            "not take one for all: %s",
            folder,
            dtype,
            needed / 1e9,
            error,
        )
        return folder
    logger.info("%s: weights in %s are shared by the processes of the node, in %s", folder, dtype, entry)
    return entry


def _processes_of_node() -> int:
    """As torchrun, accelerate and `fedsim.environ` say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _count_values(folder: Path, dtype: torch.dtype) -> tuple[int, bool]:
    """Floating-point values in the files; whether any has another type than `dtype`."""
    values, converted = 0, False
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_slice(name)
                kind = NAMES.get(tensor.get_dtype())
                values += torch.Size(tensor.get_shape()).numel() if kind is not None else 0
                converted = converted or kind not in (None, dtype)
    return values, converted


def _content(folder: Path, dtype: torch.dtype) -> dict[str, object]:
    """What decides the converted files: the files, by name, size and time, and who converts them."""
    files = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        facts = path.stat()
        files[path.name] = [facts.st_size, facts.st_mtime_ns]
    return {
        "format": FORMAT,
        "folder": str(folder.resolve()),
        "files": files,
        "dtype": str(dtype),
        "versions": package_versions("torch", "transformers", "safetensors"),
    }


def _save(model: nn.Module, folder: Path) -> None:
    untyped: object = model
    with quiet_transformers():
        untyped.save_pretrained(folder)  # type: ignore[attr-defined]


def _free_bytes(folder: Path) -> int:
    """On the disk of a folder that need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
