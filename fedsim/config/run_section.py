"""Sections `run`, `comm`, `checkpoint` and `tracking`: how a run goes and what it leaves behind."""

from typing import Annotated, Literal

from pydantic import Field

from fedsim.config.node import NAME_PATTERN, Node, key


class RunConfig(Node):
    """What to run, where its files go, and on what."""

    name: str = key(
        "quickstart",
        "folder of this run below run.output_dir; default: the name of the configuration file",
        pattern=NAME_PATTERN,
    )
    output_dir: str = key("runs", "folder that holds the run folders", min_length=1)
    rounds: int = key(
        8, "federated rounds; a finished run can be extended by a larger number", "rounds", gt=0
    )
    seed: int = key(
        0,
        "seed of everything random: partition, cohorts, initial adapter, data order, dropout",
        ge=0,
        lt=2**63,
    )
    max_minutes: float | None = key(
        None,
        "wall time of one start: stop, to be resumed, before the round that would exceed it, judged by the longest "
        "so far; leave room for the last checkpoint; null: no limit",
        "minutes",
        gt=0,
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda where a GPU is visible, else cpu")
    merged_model: bool = key(
        False,
        "besides the adapter, write model/: the base with everything that was learned merged in, for transformers",
    )
    threads_per_process: int = key(
        1,
        "CPU threads of each process; at equal threads the results are equal bits, whatever the number of "
        "processes",
        "threads",
        gt=0,
        le=1024,
    )


class CommConfig(Node):
    """How processes talk to each other."""

    backend: Literal["auto", "gloo", "nccl"] = key("auto", "auto: nccl on GPUs, gloo on CPUs")
    timeout_s: float = key(
        1800.0,
        "a collective that takes longer ends the run; longest imbalance of a round",
        "seconds",
        gt=0,
        le=1e7,
    )
    join_timeout_s: float = key(
        600.0,
        "how long a process waits for the others at the start, and no longer than timeout_s",
        "seconds",
        gt=0,
    )


class CheckpointConfig(Node):
    """Resumable state on disk."""

    every_rounds: int = key(
        1, "write a checkpoint after every so many rounds, and after the last", "rounds", gt=0
    )
    keep_last: int = key(
        2,
        "how many of the newest checkpoints to keep, besides the best with early_stopping",
        "checkpoints",
        gt=0,
    )


class WandbConfig(Node):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = key(
        "offline",
        "offline needs no account: upload later with `wandb sync`; online without a login is recorded "
        "offline",
    )
    project: str = key("fedsim", "project", min_length=1)
    entity: str | None = key(None, "team or user; null: the account's default", min_length=1)
    group: str | None = key(None, "group of runs, for example one sweep", min_length=1)
    name: str | None = key(None, "name shown for the run; null: run.name", min_length=1)
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = key((), "tags of the run")
    log_adapter: bool = key(True, "store the final adapter as an artifact")


class TrackingConfig(Node):
    """What is shown and recorded while the run goes on."""

    progress: Literal["auto", "live", "plain", "off"] = key(
        "auto", "auto: a live display in a terminal, plain lines elsewhere"
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig)
