"""From a text in the configuration to a path, or the answer that it is none.

A value such as `data.source` is either a path or the id of a repository on the Hugging Face hub. The rule: what exists
on this machine is a path. A text such as `owner/name` that is both is taken for the path, which is logged;
`./owner/name` says so outright.
"""

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def local_path(text: str) -> Path:
    """The path that a text stands for; `~` is the home folder, and `~somebody` that of a user who exists."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such user
        return Path(text)


def is_there(path: Path) -> bool:
    """Whether a file or folder exists; no where a name is one that no file can have."""
    return os.path.exists(path)  # noqa: PTH110 - that of Path raises for a name that is too long


def note_lookalike(key: str, text: str, path: Path) -> None:
    """Say that a path was taken which a reader may hold for a repository on the hub."""
    if re.fullmatch(HUB_ID, text) and not text.startswith("."):
        logger.info(
            "%s=%s is %s on this machine, which goes before a Hugging Face repository of that name; write ./%s to say "
            "so, or start elsewhere to mean the repository",
            key,
            text,
            path.absolute(),
            text,
        )
