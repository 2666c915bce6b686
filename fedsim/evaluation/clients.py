"""Test losses of single clients."""

from collections.abc import Callable, Sequence
from typing import Protocol, final

from fedsim.evaluation.losses import LossEvaluator, measure_together
from fedsim.lora.factors import AdapterState


class ClientTest(Protocol):
    """Measures adapters on the test sets of clients."""

    def losses(self, adapters: Sequence[AdapterState], client_ids: Sequence[int]) -> list[float | None]:
        """Test loss of each client under its adapter, in nats per label token; None if it has no test examples.

        The clients of a call may be measured together, so losses depend on it to rounding.
        """
        ...


@final
class CommonTest:
    """All clients are tested on one common test set, as the Plato framework does."""

    def __init__(self, test: LossEvaluator) -> None:
        self._test = test
        self._last: tuple[AdapterState, float] | None = None

    def losses(self, adapters: Sequence[AdapterState], client_ids: Sequence[int]) -> list[float | None]:  # noqa: ARG002
        """See `ClientTest`. An adapter from which all clients start is measured once."""
        if len({id(adapter) for adapter in adapters}) > 1:
            together = measure_together(adapters, [self._test] * len(adapters))
            return [sums.mean for sums in together]
        if self._last is None or self._last[0] is not adapters[0]:
            self._last = (adapters[0], measure_together(adapters[:1], [self._test])[0].mean)
        return [self._last[1]] * len(adapters)


@final
class OwnSplitTest:
    """Each client is tested on its own held-out examples.

    Args:
        test_of: the test of a client, None if it has no examples of its own for that.
    """

    def __init__(self, test_of: Callable[[int], LossEvaluator | None]) -> None:
        self._test_of = test_of

    def losses(self, adapters: Sequence[AdapterState], client_ids: Sequence[int]) -> list[float | None]:
        """See `ClientTest`."""
        tests = [self._test_of(client_id) for client_id in client_ids]
        pairs = [(adapter, test) for adapter, test in zip(adapters, tests, strict=True) if test is not None]
        if not pairs:
            return [None] * len(tests)
        together = measure_together([adapter for adapter, _ in pairs], [test for _, test in pairs])
        means = iter(sums.mean for sums in together)
        return [None if test is None else next(means) for test in tests]


@final
class NoTest:
    """Clients are not tested."""

    def losses(self, adapters: Sequence[AdapterState], client_ids: Sequence[int]) -> list[float | None]:  # noqa: ARG002
        """None for each."""
        return [None] * len(client_ids)
