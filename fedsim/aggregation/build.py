"""The one place that knows strategies by name."""

from collections.abc import Callable, Mapping
from typing import Any

from fedsim.aggregation.centralized import Centralized
from fedsim.aggregation.fedavg import FedAvg
from fedsim.aggregation.fedex import FedExLora
from fedsim.aggregation.fedsa import FedSaLora
from fedsim.aggregation.fedsvd import FedSVD
from fedsim.aggregation.ffa import FfaLora
from fedsim.aggregation.flexlora import FlexLora
from fedsim.aggregation.flexlora_delta import FlexLoraDelta
from fedsim.aggregation.flexlora_partitioned import FlexLoraPartitioned
from fedsim.aggregation.flora import Flora
from fedsim.aggregation.florist import Florist
from fedsim.aggregation.hetlora import HetLora, HetLoraNaive
from fedsim.aggregation.hlora import HLora
from fedsim.aggregation.local import LocalOnly
from fedsim.aggregation.private import PrivacySettings, Private
from fedsim.aggregation.rbla import Rbla
from fedsim.aggregation.rolora import RoLora
from fedsim.aggregation.scaffold import Scaffold
from fedsim.aggregation.server_optimizers import ServerOptimized, ServerOptimizerSettings
from fedsim.aggregation.slora import SLoRA
from fedsim.aggregation.strategy import Federation, Strategy
from fedsim.errors import ConfigError
from fedsim.own import import_own

MEMBERS = ("name", "traits", "sends", "download", "plan", "upload", "aggregate", "export")
"""What a class must have to be a `Strategy`."""


def build_strategy(
    name: str,
    federation: Federation,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    server_optimizer: ServerOptimizerSettings | None = None,
    privacy: PrivacySettings | None = None,
) -> Strategy:
    """The strategy called `name`, with differential privacy and a server optimizer around it if they are given.

    Args:
        name: as in `strategy.name`.
        federation: what the strategy may know about the run.
        arguments: the keys of the strategy's own section of the configuration.
        options: arguments of a class of the user's own.
        server_optimizer: as in `aggregation.server_optimizer`.
        privacy: as in `aggregation.privacy`.

    Raises:
        ConfigError: there is no such strategy, or it takes no server optimizer or no differential privacy.
    """
    if ":" in name:
        strategy = _own_class(name, federation, options or {})
    else:
        strategy = _known(name, federation, dict(arguments or {}))
    if privacy is not None:
        strategy = Private(strategy, federation, privacy)
    if server_optimizer is not None:
        strategy = ServerOptimized(strategy, server_optimizer)
    return strategy


def _known(name: str, federation: Federation, arguments: dict[str, Any]) -> Strategy:
    known: Mapping[str, Callable[[], Strategy]] = {
        "fedavg": lambda: FedAvg(federation),
        "local": lambda: LocalOnly(federation),
        "centralized": Centralized,
        "flexlora": lambda: FlexLora(federation),
        "flexlora_delta": lambda: FlexLoraDelta(federation),
        "flexlora_partitioned": lambda: FlexLoraPartitioned(federation),
        "hlora": lambda: HLora(federation),
        "hetlora": lambda: HetLora(federation, **arguments),
        "hetlora_naive": lambda: HetLoraNaive(federation),
        "rbla": lambda: Rbla(federation),
        "flora": lambda: Flora(federation),
        "fedex": lambda: FedExLora(federation),
        "ffa": lambda: FfaLora(federation),
        "rolora": lambda: RoLora(federation),
        "fedsa": lambda: FedSaLora(federation),
        "fedsvd": lambda: FedSVD(federation),
        "florist": lambda: Florist(federation, **arguments),
        "slora": lambda: _slora(federation, **arguments),
        "scaffold": lambda: Scaffold(federation),
    }
    if name not in known:
        raise ConfigError(
            f"strategy.name must be one of {', '.join(known)}, or package.module:Class, got '{name}'"
        )
    return known[name]()


def _slora(
    federation: Federation, then: str, then_arguments: Mapping[str, Any] | None = None, **arguments: Any
) -> SLoRA:
    """SLoRA, whose second stage is the strategy called `then`."""
    return SLoRA(federation, then=_known(then, federation, dict(then_arguments or {})), **arguments)


def _own_class(name: str, federation: Federation, options: Mapping[str, Any]) -> Strategy:
    """A class of the user's own, called with the federation and the options as keywords."""
    found = import_own("strategy.name", name)
    try:
        strategy: Strategy = found(federation, **options)
    except TypeError as error:
        raise ConfigError(
            f"strategy.name={name} must be a class that takes a Federation and the strategy.options {sorted(options)} "
            f"({error})"
        ) from error
    missing = [member for member in MEMBERS if member not in dir(strategy)]
    if missing:
        raise ConfigError(
            f"strategy.name={name} must have all members of Strategy; missing: {', '.join(missing)}"
        )
    return strategy
