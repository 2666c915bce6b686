"""What the server does with updates that are broken or too large, and how such updates are simulated."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from fedsim.errors import TrainingError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.seeding import numpy_generator

logger = logging.getLogger(__name__)

Policy = Literal["fail", "drop", "clip"]


@dataclass(frozen=True, slots=True)
class Corruption:
    """Updates that arrive broken.

    Attributes:
        probability: of an update.
        kind: "nan" or "inf": one value of each factor becomes that; "scaled": the update is multiplied by `scale`.
        scale: see there.
        seed: of the stream (seed, "client_corruption", round, client).
    """

    probability: float
    kind: Literal["nan", "inf", "scaled"]
    scale: float
    seed: int

    def hits(self, client_id: int, round_index: int) -> bool:
        """Whether a client's update of a round is broken."""
        toss = numpy_generator(self.seed, "client_corruption", round_index, client_id).random()
        return bool(toss < self.probability)

    def apply(self, start: AdapterState, trained: AdapterState) -> AdapterState:
        """The broken adapter; the arguments stay as they are."""
        if self.kind == "scaled":
            return scaled_update(start, trained, self.scale)
        return AdapterState({module: factors.map(self._break) for module, factors in trained.items()})

    def _break(self, factor: torch.Tensor) -> torch.Tensor:
        broken = factor.clone()
        broken.view(-1)[0] = float(self.kind)
        return broken


@dataclass(frozen=True, slots=True)
class Screening:
    """Which updates the server takes.

    Attributes:
        on_not_finite: an update with a value that is not finite ends the run, or is left out.
        max_norm: largest norm of an update, over all its factors together; None for any.
        on_large: a larger one ends the run, is left out, or is scaled down to `max_norm`.
    """

    on_not_finite: Literal["fail", "drop"]
    max_norm: float | None = None
    on_large: Policy = "fail"

    def screen(
        self, start: AdapterState, trained: AdapterState, client_id: int, round_index: int
    ) -> tuple[AdapterState | None, bool]:
        """(the adapter to go on with, whether it was scaled down); None instead of an adapter that is left out.

        Args:
            start: what the client started from.
            trained: what it returns; not written to.
            client_id: from 0.
            round_index: from 0.

        Raises:
            TrainingError: the update is not taken, and the policy is "fail".
        """
        norm = update_norm(start, trained)
        if not math.isfinite(norm):
            what = f"the update of client {client_id} must be finite, got a norm of {norm} in round {round_index}"
            return self._refuse(self.on_not_finite, f"{what}; or set training.on_not_finite=drop"), False
        if self.max_norm is None or norm <= self.max_norm:
            return trained, False
        what = (
            f"the norm of the update of client {client_id} must be at most training.max_update_norm="
            f"{self.max_norm:g}, got {norm:g} in round {round_index}"
        )
        if self.on_large == "clip":
            logger.warning("%s: scaled down", what)
            return scaled_update(start, trained, self.max_norm / norm), True
        return self._refuse(self.on_large, f"{what}; or set training.on_large_update to drop or clip"), False

    @staticmethod
    def _refuse(policy: Policy, what: str) -> None:
        if policy == "fail":
            raise TrainingError(what)
        logger.warning("%s: left out of the round", what.partition("; or ")[0])


def update_norm(start: AdapterState, trained: AdapterState) -> float:
    """Euclidean norm of trained - start over all factors, in float64; not finite if a value is not."""
    squares = [
        (after.double() - before.double()).square().sum()
        for before, after in zip(_tensors(start), _tensors(trained), strict=True)
    ]
    return math.sqrt(float(torch.stack(squares).sum()))


def scaled_update(start: AdapterState, trained: AdapterState, factor: float) -> AdapterState:
    """start + factor * (trained - start), in the dtype of `trained`, newly allocated."""
    return AdapterState(
        {
            module: LoraFactors(
                _scaled(start[module].A, after.A, factor),
                _scaled(start[module].B, after.B, factor),
                after.scaling,
            )
            for module, after in trained.items()
        }
    )


def _scaled(before: torch.Tensor, after: torch.Tensor, factor: float) -> torch.Tensor:
    origin = before.double()
    return (origin + factor * (after.double() - origin)).to(after.dtype)


def _tensors(adapter: AdapterState) -> Iterator[torch.Tensor]:
    for factors in adapter.values():
        yield factors.A
        yield factors.B
