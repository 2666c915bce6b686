"""From a name in the configuration to a local folder with model or tokenizer files.

A hub repository is always fetched as a snapshot first and then read as a local folder. So only the wanted kinds of
file are downloaded, and an unreachable hub is noticed at once: `from_pretrained` retries each file for 20 s or more.
"""

import logging
import os
import re
from pathlib import Path

from fedsim.config.paths import HUB_ID, is_there, local_path, note_lookalike
from fedsim.errors import ConfigError, ModelError

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.*", "merges.txt", "spiece.*")
CONFIG_FILES = ("*.json",)
SAFETENSORS_FILES = ("*.safetensors",)
PICKLE_FILES = ("*.bin",)
CODE_FILES = ("*.py",)

UNUSED_FILES = ("*/*", "consolidated*", "training_args.bin", "optimizer.bin")
"""Subfolders and second copies of the weights in other layouts."""

HUB_TIMEOUT_S = 10.0

OFFLINE_REMEDY = (
    "give a local folder, or download it on a machine with network (a login node: `hf download {name}`) with "
    "HF_HOME on a file system that the compute nodes see, and set HF_HUB_OFFLINE=1 there"
)

logger = logging.getLogger(__name__)


def locate(key: str, name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder that holds the files of a model or tokenizer, downloaded first if `name` is a hub id.

    Args:
        key: the configuration key that `name` comes from, for messages.
        name: an existing folder, or the id of a hub repository.
        revision: branch, tag or commit on the hub; None for the main branch.
        patterns: file names to fetch from the hub; a local folder is taken as it is.

    Raises:
        ModelError: there is no such folder or repository, or the hub cannot be reached.
        ConfigError: a revision is given for a local folder.
    """
    folder = local_path(name)
    if is_there(folder) and folder.is_dir():
        note_lookalike(key, name, folder)
        if revision is not None:
            raise ConfigError(
                f"model.revision is for hub models only, got {revision!r} while {key} is the folder {name}"
            )
        return folder
    if not _is_hub_id(name):
        wrong = "is a file, not a folder" if is_there(folder) else "does not exist"
        raise ModelError(
            f"{key} must be a Hugging Face model id or an existing local folder, and {name!r} {wrong} "
            f"(looked from {Path.cwd()})"
        )
    return _download(key, name, revision, patterns)


def _is_hub_id(name: str) -> bool:
    looks_like_path = name.startswith((".", "/", "~", os.sep)) or is_there(Path(name))
    return not looks_like_path and re.fullmatch(HUB_ID, name) is not None


def _download(key: str, name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    unreachable = _why_unreachable(name, revision)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(UNUSED_FILES),
                local_files_only=unreachable is not None,
            )
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{key}={name} is gated: accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model.revision={revision} does not exist in the hub repository {name}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{key}={name} is neither a local folder (looked from {Path.cwd()}) nor a model that this account sees "
            "on the Hugging Face hub; check the spelling, or log in with `hf auth login` if it is private"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(
            f"{key} must be a Hugging Face model id or an existing local folder, got {name!r}"
        ) from error
    except _network_errors() as error:
        raise ModelError(
            f"{key}={name} is no local folder (looked from {Path.cwd()}), is not complete in the Hugging Face cache, "
            f"and the hub cannot be reached ({unreachable or _reason(error)}); {OFFLINE_REMEDY.format(name=name)}"
        ) from error


def _why_unreachable(name: str, revision: str | None) -> str | None:
    """None if the hub answers within `HUB_TIMEOUT_S`, be it with a refusal; else why not.

    `snapshot_download` itself waits without limit where a firewall drops packets, as on many compute nodes.
    """
    import huggingface_hub
    from huggingface_hub import errors

    logger.info("looking up %s on the Hugging Face hub", name)
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        return None
    except _network_errors() as error:
        logger.info("the hub cannot be reached (%s); taking %s from the cache", _reason(error), name)
        return _reason(error)
    return None


def _network_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: OSError, and errors of its network library, which differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _reason(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0]
