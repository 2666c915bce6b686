"""Section `training`: what a client does in a round, and how packs of clients are worked off."""

from typing import Any, Literal

from pydantic import Field, model_validator

from fedsim.config.node import Node, key


class OptimizerConfig(Node):
    """The client's optimizer, fresh in each local run."""

    name: Literal["adamw", "sgd"] = key("adamw", "adamw (FedIT, CLLoRA) or sgd (FedAvg of arXiv 2402.11505)")
    lr: float = key(5e-3, "peak learning rate", ge=0)
    weight_decay: float = key(0.0, "decoupled for adamw, added to the gradient for sgd", ge=0)
    beta1: float = key(0.9, "adamw: decay of the gradient mean", ge=0, lt=1)
    beta2: float = key(0.999, "adamw: decay of the squared gradient mean", ge=0, lt=1)
    eps: float = key(1e-8, "adamw: added to the denominator", gt=0)
    momentum: float = key(0.0, "sgd: momentum", ge=0, lt=1)


class ScheduleConfig(Node):
    """The learning rate within one local run."""

    name: Literal["constant", "linear", "cosine"] = key(
        "linear", "after warm-up: constant, or decayed to 0 at the end of the local run"
    )
    warmup_steps: int = key(0, "steps from 0 to the peak learning rate", "steps", ge=0)


class PackConfig(Node):
    """How the cohort is cut into packs, the unit of work of a process, and how a pack is worked off."""

    num_packs: int = key(
        4,
        "packs of a round, never more than its clients; results depend on it (to rounding) and not on the number of "
        "processes, so set it to a multiple of the largest number of processes you use",
        "packs",
        gt=0,
    )
    max_slots: int = key(
        8,
        "most clients of a pack that train at the same time, fewer where LoRA ranks are very large; the others wait "
        "for a free slot",
        "clients",
        gt=0,
    )
    max_tokens: int | None = key(
        None,
        "most tokens that go through the base at once; null: 8192 on a GPU, 2048 on a CPU; a larger micro-batch of one "
        "client stays whole",
        "tokens",
        gt=0,
    )
    keep_updates_on: Literal["auto", "device", "cpu"] = key(
        "auto",
        "where trained adapters wait for the end of the round; auto: on the GPU up to a sixteenth of its memory, what "
        "is beyond in main memory; results do not depend on it",
    )


class LrPhaseConfig(Node):
    """The learning rate from a round on."""

    from_round: int = key(..., "first round of the phase, counted from 0", "rounds", ge=0)
    lr_scale: float = key(..., "factor on training.optimizer.lr, not on the factor of an earlier phase", gt=0)


class TrainingConfig(Node):
    """Local training of a client. Set local_epochs or local_steps."""

    local_epochs: int | None = key(
        1, "passes over the client's data in a round; null when local_steps is set", "epochs", gt=0
    )
    local_steps: int | None = key(None, "optimizer steps of a client in a round", "steps", gt=0)
    batch_size: int = key(8, "examples of a forward pass", "examples", gt=0)
    gradient_accumulation_steps: int = key(
        1, "forward passes of an optimizer step; the loss is the mean over all label tokens of the step", gt=0
    )
    trainer: Literal["auto", "packed", "sequential"] = key(
        "auto",
        "packed: the clients of a pack go through the base together; sequential: one after another; auto: packed, or "
        "sequential with a warning where the model cannot be packed",
    )
    gradient_checkpointing: bool = key(
        False, "packed trainer: compute activations again in the backward pass instead of keeping them"
    )
    on_not_finite: Literal["fail", "drop"] = key(
        "fail",
        "a client whose loss or adapter is not finite ends the run, or is left out of the round and counted",
    )
    max_update_norm: float | None = key(
        None,
        "largest norm of a client's update, over all its factors together; null: any that is finite",
        gt=0,
    )
    on_large_update: Literal["fail", "drop", "clip"] = key(
        "fail",
        "an update above max_update_norm ends the run, is left out of the round, or is scaled down to it; counted and "
        "logged",
    )
    max_grad_norm: float | None = key(
        1.0, "clip each client's gradient to this norm; null: do not clip", gt=0
    )
    proximal_mu: float = key(
        0.0,
        "FedProx (arXiv 1812.06127): adds mu/2 times the squared distance from the received factors",
        ge=0,
    )
    round_schedule: tuple[LrPhaseConfig, ...] = key(
        (),
        "learning rates of clients that change with the round, such as [{from_round: 15, lr_scale: 0.5}], which is "
        "what the code of arXiv 2402.11505 does; before the first phase, and when empty, the factor is 1",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    pack: PackConfig = Field(default_factory=PackConfig)

    @model_validator(mode="before")
    @classmethod
    def _epochs_give_way(cls, node: Any) -> Any:
        """The default local_epochs stands only while local_steps is not set."""
        if isinstance(node, dict) and "local_epochs" not in node and node.get("local_steps") is not None:
            return {**node, "local_epochs": None}
        return node
