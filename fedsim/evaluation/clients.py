"""Test losses of single clients."""

from collections.abc import Callable
from typing import Protocol, final

from fedsim.evaluation.losses import LossEvaluator
from fedsim.lora.factors import AdapterState


class ClientTest(Protocol):
    """Measures an adapter on the test set of a client."""

    def loss(self, adapter: AdapterState, client_id: int) -> float | None:
        """Test loss in nats per label token; None if the client has no test examples."""
        ...


@final
class CommonTest:
    """All clients are tested on one common test set, as the Plato framework does."""

    def __init__(self, evaluator: LossEvaluator) -> None:
        self._evaluator = evaluator
        self._last: tuple[AdapterState, float] | None = None

    def loss(self, adapter: AdapterState, client_id: int) -> float | None:  # noqa: ARG002
        """See `ClientTest`. An adapter that many clients start from is measured once."""
        if self._last is None or self._last[0] is not adapter:
            self._last = (adapter, self._evaluator.loss(adapter))
        return self._last[1]


@final
class OwnSplitTest:
    """Each client is tested on its own held-out examples."""

    def __init__(self, evaluator_of: Callable[[int], LossEvaluator | None]) -> None:
        self._evaluator_of = evaluator_of

    def loss(self, adapter: AdapterState, client_id: int) -> float | None:
        """See `ClientTest`."""
        evaluator = self._evaluator_of(client_id)
        return None if evaluator is None else evaluator.loss(adapter)


@final
class NoTest:
    """Clients are not tested."""

    def loss(self, adapter: AdapterState, client_id: int) -> float | None:  # noqa: ARG002
        """None."""
        return None
