"""Command lines whose mistakes are told as those of a configuration are."""

import argparse
import re
from typing import NoReturn

from fedsim.errors import ConfigError

LARGEST = 999_999


class Parser(argparse.ArgumentParser):
    """An argument parser that raises: one line, and no usage before it.

    Attributes:
        elsewhere: where options stand that it does not know, for its message about them.
    """

    elsewhere = ""

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
            ConfigError: always.
        """
        if message.startswith("unrecognized") and self.elsewhere:
            message = f"{message}; {self.elsewhere}"
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def positive(text: str) -> int:
    """A whole number in [1, 999999], as an argument.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number in [1, {LARGEST}], got {text!r}")
    return int(text)
