"""What a federated method is, to the rest of fedsim.

Strategies are small final classes without inheritance among them; what two share is a function. They are pure: tensors
in, new tensors out, no process group, clock or global generator, and nothing is written into an argument.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport

FactorStream = Iterator[tuple[str, tuple[LoraFactors, ...]]]
"""(module, the cohort's factors of that module in client_id order), one module after another."""


class Strategy(Protocol):
    """A federated method.

    Attributes:
        name: as in `strategy.name`.
        reduce: "sum" if the server needs only weighted sums of the factors, "stack" if it needs all of them.
        trains_pool: the cohort's clients are replaced by one virtual client with the pooled data of all clients.
        has_global_model: False if there is no adapter that speaks for all clients; the global test loss is then the
            mean over the cohort's own adapters.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def reduce(self) -> Literal["sum", "stack"]: ...  # noqa: D102

    @property
    def trains_pool(self) -> bool: ...  # noqa: D102

    @property
    def has_global_model(self) -> bool: ...  # noqa: D102

    def download(self, state: ServerState, client_id: int) -> AdapterState:
        """The adapter from which a client starts its local run."""
        ...

    def aggregate(
        self, state: ServerState, reports: Sequence[ClientReport], factors: FactorStream
    ) -> ServerState:
        """The state of the next round.

        Args:
            state: before the round.
            reports: K reports in client_id order.
            factors: the same K clients' factors, streamed module by module.

        Raises:
            AggregationError: the updates cannot be combined.
        """
        ...

    def export(self, state: ServerState, client_id: int | None = None) -> AdapterState:
        """The adapter to use after training: the global one, or that of a client."""
        ...
