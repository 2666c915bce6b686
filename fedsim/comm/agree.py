"""Ranks fail together: an error on one ends all, each with the same message."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fedsim.comm.group import Group
from fedsim.errors import FedsimError, LostRankError, PeerError

T = TypeVar("T")
R = TypeVar("R")


def agree(group: Group, what: str, error: Exception | None) -> None:
    """Exchange how a piece of work ended; raise on every rank if it failed on any.

    With one process the error itself is raised, unchanged.

    Raises:
        PeerError: `what` failed somewhere; on a rank that failed it is raised from that rank's own error.
        LostRankError: some rank did not answer.
    """
    if group.world_size == 1:
        if error is not None:
            raise error
        return
    mine = None if error is None else (type(error).__name__, str(error), isinstance(error, FedsimError))
    try:
        outcomes = group.gather_objects(mine)
    except LostRankError as lost:
        if error is None:
            raise
        # what happened here is not to be lost with the others
        raise LostRankError(f"{lost}; here, {type(error).__name__}: {error}", failed_here=True) from error
    failures = [(rank, *outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failures:
        return
    told: dict[str, list[int]] = {}
    for rank, kind, text, _ in failures:
        told.setdefault(f"{kind}: {text}", []).append(rank)
    reasons = "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in told.items())
    raise PeerError(
        f"{what} failed on {len(failures)} of {group.world_size} ranks; {reasons}",
        user_error=all(user for *_, user in failures),
        failed_here=error is not None,
    ) from error


@contextmanager
def all_or_none(group: Group, what: str) -> Iterator[None]:
    """Run a block that can fail on one rank; when it did anywhere, every rank raises.

    The block must not contain a collective: a rank that failed would leave the others waiting in it. Those of a sharded
    base cannot be kept out; there the others end by the connection that breaks, or after `comm.timeout_s`.

    Raises:
        PeerError: see `agree`.
    """
    error: Exception | None = None
    group.note(what)
    try:
        yield
    except Exception as caught:
        error = caught
    agree(group, what, error)


def root_first(group: Group, what: str, function: Callable[[], T]) -> T:
    """Call `function` on rank 0, then on the others, which find in the cache what rank 0 made."""
    result: T | None = None
    with all_or_none(group, what):
        if group.rank == 0:
            result = function()
    with all_or_none(group, what):
        if group.rank != 0:
            result = function()
    assert result is not None
    return result


def on_root(group: Group, what: str, function: Callable[[], T]) -> T | None:
    """Call `function` on rank 0 only; the others get None. Every rank raises if it fails."""
    result: T | None = None
    with all_or_none(group, what):
        if group.rank == 0:
            result = function()
    return result


def consume_stream(
    group: Group, what: str, stream: Iterator[T], function: Callable[[Iterator[T]], R] | None
) -> R | None:
    """Let some ranks consume a stream whose items are exchanged by all ranks, one collective an item.

    The others take part in every exchange and drop what they receive. A rank whose function fails halfway goes on
    exchanging, so that nobody waits for it, and then every rank raises. A rank whose stream itself fails cannot go on
    exchanging: it raises at once and leaves, which the others notice. What the stream refuses with a `FedsimError`, it
    refuses on every rank.

    Args:
        group: the processes.
        what: is done, for messages.
        stream: the same items, in the same order, on every rank.
        function: consumes it on this rank, whole or in part; None on a rank that has nothing to do with it.

    Returns:
        What `function` returned; None without one.
    """
    result: R | None = None
    error: Exception | None = None
    watched = _Watched(stream)
    group.note(what)
    if function is not None:
        try:
            result = function(watched)
        except LostRankError:
            raise
        except Exception as caught:
            error = caught
    try:
        for _ in watched:
            pass
    except LostRankError:
        raise
    except Exception as caught:
        error = error or caught
    if watched.broken_by is not None and not isinstance(watched.broken_by, FedsimError):
        raise watched.broken_by
    agree(group, what, error)
    return result


class _Watched(Iterator[T]):
    """A stream that remembers by what it was broken."""

    def __init__(self, stream: Iterator[T]) -> None:
        self._stream = stream
        self.broken_by: Exception | None = None

    def __next__(self) -> T:
        try:
            return next(self._stream)
        except StopIteration:
            raise
        except Exception as error:
            self.broken_by = error
            raise


def same_everywhere(group: Group, what: str, value: str) -> None:
    """Check that every rank computed the same fingerprint.

    Raises:
        PeerError: the values differ; the message shows which rank has which.
    """
    group.note(f"comparing {what}")
    values = group.gather_objects(value)
    if len(set(values)) > 1:
        shown = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(values))
        raise PeerError(
            f"{what} must be the same on every rank, got {shown}; give all nodes the same files and versions",
            user_error=True,
            failed_here=True,
        )


def first_reason(group: Group, mine: str | None) -> str | None:
    """A reason that some rank has, the same on every rank; None if none has any.

    Args:
        group: the processes.
        mine: this rank's reason, in a few words.
    """
    group.note_part("asking whether to stop")
    reasons = group.gather_objects(mine)
    found = next((reason for reason in reasons if reason is not None), None)
    if found is None or None not in reasons:
        return found
    return f"{found} on {_ranks([rank for rank, reason in enumerate(reasons) if reason == found])}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
