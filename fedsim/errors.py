"""What a user, a cluster or a file can cause; `cache.CacheError` stands beside the cache, which is a leaf of its own.

A message names the dotted key or the identity, the rule, the value got and, where it is short, the remedy.
`main.py` prints such an error as one line and exits with code 2, or 1 where `is_user_error` denies that
a user caused it; anything else is a bug and keeps its traceback.
"""


class FedsimError(Exception):
    """Base of all errors that are not bugs in fedsim."""


class ConfigError(FedsimError):
    """A configuration value breaks a rule, alone or together with another one."""


class DataError(FedsimError):
    """A corpus cannot be read, or it cannot be partitioned as asked."""


class ModelError(FedsimError):
    """A base model or tokenizer cannot be loaded, or does not fit the rest of the run."""


class AdapterError(FedsimError):
    """LoRA factors do not fit each other, the model, or the file they come from."""


class AggregationError(FedsimError):
    """The updates of a cohort cannot be aggregated."""


class TrainingError(FedsimError):
    """Local training of a client cannot go on (for example its loss is not finite)."""


class RunFolderError(FedsimError):
    """A run folder cannot be written, or belongs to another run."""


class CheckpointError(FedsimError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class UnreadableError(CheckpointError):
    """A file of a checkpoint is there and cannot be read now: a disk or a network that failed, not damage."""


class SchedulerError(FedsimError):
    """The cluster's scheduler is not there, or refuses what it is asked for."""


class PeerError(FedsimError):
    """Work failed on some ranks, so every rank stops.

    Attributes:
        user_error: True if each failing rank failed with a `FedsimError`.
        failed_here: True on a rank whose own work failed.
    """

    def __init__(self, message: str, *, user_error: bool, failed_here: bool) -> None:
        super().__init__(message)
        self.user_error = user_error
        self.failed_here = failed_here


class LostRankError(FedsimError):
    """Other ranks no longer answer: they ended, hang, or cannot be reached. Nothing the user's configuration did.

    Attributes:
        failed_here: True if this rank's own work had failed as well.
    """

    def __init__(self, message: str, *, failed_here: bool = False) -> None:
        super().__init__(message)
        self.failed_here = failed_here


def is_user_error(error: BaseException) -> bool:
    """Whether the user can mend it, so that the same command would fail again; else a bug, or a machine that failed."""
    if isinstance(error, PeerError):
        return error.user_error
    return isinstance(error, FedsimError) and not isinstance(error, LostRankError | UnreadableError)
