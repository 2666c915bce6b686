"""Classes and functions of the user's own, by name."""

import pkgutil
from typing import Any

from fedsim.errors import ConfigError


def import_own(key: str, name: str) -> Any:
    """What `package.module:object` names.

    Args:
        key: of the configuration, which names it.
        name: see above.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}={name} cannot be imported ({error}); the module must be installed, or lie below the folder "
            "in which the run is started or one in PYTHONPATH"
        ) from error


def shown(value: object) -> str:
    """What such a function answered, as an error names it: one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
