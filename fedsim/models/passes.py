"""How passes through the base are run: freely, or together with other processes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, Protocol, TypeVar, final

T = TypeVar("T")

Kind = Literal["test", "train"]
"""A forward pass alone, or one with a backward pass."""


class Passes(Protocol):
    """How passes through the base are run."""

    def run(self, kind: Kind, work: Callable[[], T]) -> T:
        """One pass through all of the base's body, and back if `kind` is "train"."""
        ...

    def phase(self) -> contextlib.AbstractContextManager[None]:
        """Around work that may contain passes, any number of them on each rank; all ranks enter it together."""
        ...


@final
class FreePasses:
    """Each process has the whole base, and runs its passes when it likes."""

    def run(self, kind: Kind, work: Callable[[], T]) -> T:  # noqa: ARG002
        """Run it."""
        return work()

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """Nothing to wait for."""
        yield
