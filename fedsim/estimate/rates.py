"""From work to seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.estimate.trace import ModelCosts
from fedsim.estimate.workload import Work


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of some work, a product and a sum counted as two.

    Attributes:
        base: products with the frozen base, output head included.
        attention: products of queries, keys and values, each sequence a full square.
        adapters: products with rank rows.
    """

    base: float
    attention: float
    adapters: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.base + self.attention + self.adapters


def work_flops(
    costs: ModelCosts, work: Work, row_width: int, trains: bool, checkpointed: bool = False
) -> Flops:
    """The operations of some work.

    Forward and input gradients of frozen weights, none for the weights themselves: 4 a weight and token, or 6 where the
    forward pass is done twice.

    Args:
        costs: of the model.
        work: what is computed.
        row_width: sum over adapted modules of (in + out).
        trains: with a backward pass.
        checkpointed: the layers' forward pass is computed again.
    """
    forwards = 1 + (trains and checkpointed)
    base = work.tokens * costs.forward_flops * forwards + work.label_tokens * costs.head_flops
    attention = work.squares * costs.attention_flops * forwards
    adapters = 2.0 * work.rank_tokens * row_width * forwards
    if trains:
        base += work.tokens * costs.backward_flops + work.label_tokens * costs.head_flops
        attention += work.squares * costs.attention_backward_flops
        adapters += 4.0 * work.rank_tokens * row_width
    return Flops(base, attention, adapters)


@dataclass(frozen=True, slots=True)
class Rate:
    """Seconds of one kind of work.

    Attributes:
        seconds_per_flop: of its arithmetic.
        seconds_per_pass: of each row, whatever its size.
        overlapped: the host starts operations while the device computes, so the slower of the two counts; else both.
    """

    seconds_per_flop: float
    seconds_per_pass: float
    overlapped: bool = False

    def seconds(self, flops: float, passes: int) -> float:
        """Seconds for so many operations in so many rows."""
        compute, start = flops * self.seconds_per_flop, passes * self.seconds_per_pass
        return max(compute, start) if self.overlapped else compute + start


def fit_rate(samples: Sequence[tuple[float, int, float]]) -> Rate:
    """The rate that explains measured seconds best; neither of its parts is negative.

    Args:
        samples: (operations, rows, seconds) of each measurement, at least one.
    """
    flops, passes, seconds = (np.array(column, dtype=np.float64) for column in zip(*samples, strict=True))
    only_flops = float((flops * seconds).sum() / (flops * flops).sum())
    if len(samples) == 1:
        return Rate(only_flops, 0.0)
    # relative errors count, so that a short measurement says as much as a long one
    scaled = np.stack((flops, passes), axis=1) / seconds[:, None]
    (per_flop, per_pass), *_ = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)
    if per_flop <= 0:
        return Rate(0.0, float(seconds.sum() / passes.sum()))
    if per_pass <= 0:
        return Rate(float(seconds.sum() / flops.sum()), 0.0)
    return Rate(float(per_flop), float(per_pass))
