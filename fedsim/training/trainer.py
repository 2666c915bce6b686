"""What the round asks of local training."""

from collections.abc import Sequence
from typing import Protocol

from fedsim.lora.plan import ClientPlan
from fedsim.lora.updates import ClientUpdate
from fedsim.training.packs import Pack


class Trainer(Protocol):
    """Trains packs of clients on this process."""

    def train(self, pack: Pack, plans: Sequence[ClientPlan], round_index: int) -> list[ClientUpdate]:
        """Train each client of a pack as its own plan says.

        Each client ends where it would have ended alone: own data order, dropout, optimizer, schedule and clipping.

        Args:
            pack: the clients.
            plans: what each of them is told to do, in the pack's order; not written to.
            round_index: from 0; part of the key of every random stream.

        Returns:
            Updates in the pack's order, adapters on the base's device. A client that is not finite is missing where
            the trainer was told to leave it out.

        Raises:
            TrainingError: a client's loss or adapter is not finite.
            AdapterError: a plan does not fit the base, or itself.
        """
        ...
