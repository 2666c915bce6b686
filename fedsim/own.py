"""Classes and functions of the user's own, by name."""

import contextlib
import inspect
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
    except (ImportError, AttributeError, ValueError) as error:  # the last for a name that can be none
        raise ConfigError(
            f"{key}={name} cannot be imported ({error}); the module must be installed, or lie below the folder "
            "in which the run is started or one in PYTHONPATH"
        ) from error


def call_own(key: str, name: str, parameters: str, *arguments: Any) -> Any:
    """What a function of the user's own answers; errors within it are not caught.

    Args:
        key: of the configuration, which names it.
        name: `package.module:function`.
        parameters: what it takes, in words.
        arguments: these.

    Raises:
        ConfigError: it cannot be imported, is no function, or takes other arguments.
    """
    function = import_own(key, name)
    if not callable(function):
        raise ConfigError(f"{key} must name a function, and {name} is none")
    with contextlib.suppress(ValueError):  # of some built-in functions it is not known
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError as error:
            raise ConfigError(f"{key}={name} must be a function of ({parameters}): {error}") from error
    return function(*arguments)


def shown(value: object) -> str:
    """What such a function answered, as an error names it: one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
