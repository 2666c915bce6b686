"""Bytes that a process holds, by what they are for.

Letters: R = rank rows of all slots, W = width of a row = sum over adapted modules of (in + out), T = tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsim.comm.exchange import AHEAD
from fedsim.estimate.trace import ModelCosts
from fedsim.models.head import LOGITS_BUDGET_BYTES

OPTIMIZER_BUFFERS = 4
"""Buffers of rank rows that exist while a pack trains: values, gradients, and two of the optimizer."""

STEP_BUFFERS = 3
"""Further ones at the height of an optimizer step, when no activation is held."""

WORKING_ACTIVATIONS = 3
"""Largest activations that exist at once besides what is kept for the backward pass: an output, its gradient, and one
between them."""


@dataclass(frozen=True, slots=True)
class TrainingShape:
    """What decides the memory of local training.

    Attributes:
        rank_rows: R.
        row_width: W.
        factor_bytes: bytes of a factor's value.
        term_buffers: further buffers of (R, W) values, for what plans add to a step.
        row_tokens: T of the largest row.
        label_tokens: of them, tokens with logits.
        checkpointed: whether each layer is computed again in the backward pass.
        padded: logits of all tokens at once, and kept; clients one after another.
        half: activations are in half precision.
        on_gpu: the process computes on a GPU.
    """

    rank_rows: int
    row_width: int
    factor_bytes: int
    term_buffers: float
    row_tokens: int
    label_tokens: int
    checkpointed: bool
    padded: bool
    half: bool
    on_gpu: bool


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes of one phase of a round beyond what stays resident, by what they are for."""

    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of the process that needs most.

    Attributes:
        resident: bytes that are always there, by what they are for.
        phases: name -> what comes on top in that phase.
    """

    resident: Mapping[str, int]
    phases: Mapping[str, Phase]

    @property
    def resident_bytes(self) -> int:
        """Sum of what is always there."""
        return sum(self.resident.values())

    @property
    def peak_phase(self) -> str:
        """The phase with the most."""
        return max(self.phases, key=lambda name: self.phases[name].num_bytes)

    @property
    def peak_bytes(self) -> int:
        """Most bytes at any time."""
        return self.resident_bytes + self.phases[self.peak_phase].num_bytes


def activation_bytes_per_token(costs: ModelCosts, checkpointed: bool) -> float:
    """What a token keeps until the backward pass; with checkpointing each layer's input, and one layer whole."""
    if not checkpointed:
        return costs.saved_bytes
    return costs.layer_input_bytes + costs.saved_bytes / costs.num_layers


def row_bytes(rank_rows: int, row_width: int, factor_bytes: int, term_buffers: float = 0.0) -> int:
    """Rank rows with their optimizer: the memory of slots."""
    return int(rank_rows * row_width * factor_bytes * (OPTIMIZER_BUFFERS + term_buffers))


def logits_bytes(tokens: int, vocab_size: int, half: bool, padded: bool, on_gpu: bool) -> int:
    """Logits that exist at once: a chunk of the frozen cross-entropy, or those of a whole padded batch.

    In half precision the float32 chunk stands beside the half-precision one it is made from.
    """
    whole = tokens * vocab_size * 4
    if padded:
        return whole * 3 + (whole if half else 0)
    return int(min(whole, LOGITS_BUDGET_BYTES["cuda" if on_gpu else "cpu"]) * (1.5 if half else 1.0))


def training(costs: ModelCosts, shape: TrainingShape) -> Phase:
    """A step at its worst: the end of the forward pass, or the optimizer's arithmetic."""
    slots = row_bytes(shape.rank_rows, shape.row_width, shape.factor_bytes, shape.term_buffers)
    step = shape.rank_rows * shape.row_width * shape.factor_bytes * STEP_BUFFERS
    kept = int(shape.row_tokens * activation_bytes_per_token(costs, shape.checkpointed))
    logits = logits_bytes(shape.label_tokens, costs.vocab_size, shape.half, shape.padded, shape.on_gpu)
    logits += int(2 * shape.label_tokens * costs.hidden_bytes)
    working = int(shape.row_tokens * costs.widest_bytes * WORKING_ACTIVATIONS)
    parts = {"adapters in slots, gradients, optimizer": slots}
    if kept + max(logits, working) >= step:
        parts["activations"] = kept
        parts["logits" if logits >= working else "working memory"] = max(logits, working)
    else:
        parts["optimizer step"] = step
    return Phase(parts)


def evaluation(
    costs: ModelCosts,
    adapter_rows: int,
    row_width: int,
    factor_bytes: int,
    batch_tokens: int,
    half: bool,
    padded: bool,
    on_gpu: bool,
) -> Phase:
    """A test batch without gradients, under adapters of `adapter_rows` rank rows together."""
    hidden = int(batch_tokens * (WORKING_ACTIVATIONS * costs.widest_bytes + 2 * costs.hidden_bytes))
    return Phase(
        {
            "adapters under test": adapter_rows * row_width * factor_bytes,
            "test batch": hidden,
            "logits": logits_bytes(batch_tokens, costs.vocab_size, half, padded, on_gpu),
        }
    )


def answers(costs: ModelCosts, batch_tokens: int, sequences: int, half: bool, generated: bool) -> Phase:
    """A batch of answers: the key-value cache of generation, or logits at every token for teacher forcing."""
    hidden = int(batch_tokens * (WORKING_ACTIVATIONS * costs.widest_bytes + 2 * costs.hidden_bytes))
    if not generated:
        size = 2 if half else 4
        return Phase({"test batch": hidden, "logits": batch_tokens * costs.vocab_size * size})
    return Phase(
        {
            "test batch": hidden,
            # the cache grows by concatenation: the old and the new one of a layer side by side
            "key-value cache": int(batch_tokens * costs.cache_bytes * (1 + 2 / costs.num_layers)),
            "logits": sequences * costs.vocab_size * 4 * 2,
        }
    )


def exchange(
    module_bytes: Sequence[int], longest_shares: Sequence[int], world_size: int, num_owners: int
) -> Phase:
    """The factors of the modules that travel at a time: what comes in, from every rank as long as the longest.

    Args:
        module_bytes: of each module, all that is sent.
        longest_shares: of each module, the bytes of the rank with most.
        world_size: number of processes.
        num_owners: processes that aggregate.
    """
    under_way = sum(sorted(longest_shares, reverse=True)[: AHEAD + 1])
    # the decomposition's float64 stack of a float32 cohort, and as much again in between
    stack = 4 * max(module_bytes, default=0)
    return Phase({"factors on their way": under_way * (world_size + num_owners), "aggregation": stack})


def slots_that_fit(
    free_bytes: float, rows_per_slot: int, row_width: int, factor_bytes: int, buffers: float
) -> int:
    """Slots whose rank rows, gradients and optimizer state fit `free_bytes`."""
    one = row_bytes(rows_per_slot, row_width, factor_bytes, buffers)
    return max(0, int(free_bytes // one))


def tokens_that_fit(free_bytes: float, costs: ModelCosts, checkpointed: bool) -> int:
    """Tokens of a row that fit `free_bytes`, with what exists besides what they keep."""
    per_token = activation_bytes_per_token(costs, checkpointed) + WORKING_ACTIVATIONS * costs.widest_bytes
    return max(0, int(free_bytes // per_token))
