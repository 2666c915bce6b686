"""The one place that knows strategies by name."""

from collections.abc import Callable, Mapping

from fedsim.aggregation.averaging import ClientWeights
from fedsim.aggregation.centralized import Centralized
from fedsim.aggregation.fedavg import FedAvg
from fedsim.aggregation.local import LocalOnly
from fedsim.aggregation.strategy import Strategy
from fedsim.errors import ConfigError


def build_strategy(name: str, weighting: ClientWeights) -> Strategy:
    """The strategy called `name`.

    Args:
        name: as in `strategy.name`.
        weighting: as in `aggregation.client_weights`.

    Raises:
        ConfigError: there is no such strategy.
    """
    known: Mapping[str, Callable[[], Strategy]] = {
        "fedavg": lambda: FedAvg(weighting),
        "local": LocalOnly,
        "centralized": Centralized,
    }
    if name not in known:
        raise ConfigError(f"strategy.name must be one of {', '.join(known)}, got '{name}'")
    return known[name]()
