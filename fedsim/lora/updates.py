"""What a client hands back after local training."""

from dataclasses import dataclass

from fedsim.lora.factors import AdapterState

POOLED_CLIENT = -1
"""client_id of the one virtual client that holds the pooled data of all clients."""


@dataclass(frozen=True, slots=True)
class ClientReport:
    """Everything about a client's local run but its factors. Cheap to exchange between processes.

    Attributes:
        client_id: from 0, or `POOLED_CLIENT`.
        num_examples: training examples of the client.
        num_tokens: label tokens of one pass over them.
        lora_rank: largest LoRA rank among the modules of its adapter.
        steps: optimizer steps taken.
        train_loss_first: loss of the first step, in nats per label token.
        train_loss_last: loss of the last step.
        train_loss_mean: mean over the steps.
        trained_tokens: label tokens seen in the whole local run.
        trained_parameters: values of its adapter that are trained.
        lr_sum: sum of the learning rates of its steps.
        uplink_bytes: what it sends.
        downlink_bytes: what it received.
        pack: index of its pack in the round.
        process_rank: process that trained it.
        seconds: wall time of its local run, tests not included.
        pack_occupancy: share of the slot-steps of its pack in which a client trained.
        pack_padding: padded rows in attention per token of its pack, minus 1.
        test_loss_before: test loss of the adapter it received, in nats per label token; None if not measured.
        test_loss_after: test loss of the adapter it returns; None if not measured.
        simulated_s: from the server's first byte to its own last one, on the simulated clock; None without one.
    """

    client_id: int
    num_examples: int
    num_tokens: int
    lora_rank: int
    steps: int
    train_loss_first: float
    train_loss_last: float
    train_loss_mean: float
    trained_tokens: int
    trained_parameters: int
    lr_sum: float
    uplink_bytes: int
    downlink_bytes: int
    pack: int
    process_rank: int
    seconds: float
    pack_occupancy: float = 1.0
    pack_padding: float = 0.0
    test_loss_before: float | None = None
    test_loss_after: float | None = None
    simulated_s: float | None = None


@dataclass(frozen=True, slots=True)
class ClientUpdate:
    """A client's report and the adapter it trained."""

    report: ClientReport
    adapter: AdapterState
