"""From a configuration to how clients are: LoRA ranks, cohorts, reliability, and what of their updates is taken."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedsim.config.clients_section import ClientsConfig, CohortConfig
from fedsim.config.schema import Config
from fedsim.errors import ConfigError
from fedsim.server.cohort import CohortPolicy
from fedsim.server.rank_policy import tiers_by_policy
from fedsim.server.screening import Corruption, Screening
from fedsim.server.tiers import (
    Tier,
    Tiers,
    check_ranks,
    distributed_types,
    draw_tiers,
    module_ranks,
    tiers_by_size,
    with_phases,
)
from fedsim.server.turnout import Device, Outage, Participation, Slowness

BYTES_PER_MBIT = 1e6 / 8


def build_tiers(
    config: Config,
    targets: Mapping[str, tuple[int, int]],
    num_clients: int,
    sizes: NDArray[np.int64] | None = None,
) -> Tiers:
    """The LoRA ranks of each client.

    Args:
        config: the configuration.
        targets: dotted module path -> (in features, out features).
        num_clients: of the federation.
        sizes: (num_clients,) training examples of each client; used by lora.distribution=by_size
            and lora.rank_policy only.

    Raises:
        ConfigError: a tier excepts a module that is not adapted, or the tiers do not fit the model.
    """
    tiers = _tiers_of_clients(config, targets, num_clients, sizes)
    return with_phases(tiers, [(phase.from_round, phase.scale) for phase in config.lora.rank_schedule])


def _tiers_of_clients(
    config: Config,
    targets: Mapping[str, tuple[int, int]],
    num_clients: int,
    sizes: NDArray[np.int64] | None,
) -> Tiers:
    lora = config.lora
    if lora.distribution == "by_size":
        assert sizes is not None, "lora.distribution=by_size needs the clients' sizes"
        return tiers_by_size(list(targets), sizes, lora.rank)
    if lora.rank_policy is not None:
        assert sizes is not None, "lora.rank_policy needs the clients' sizes"
        return tiers_by_policy(lora.rank_policy, targets, sizes, lora.rank, config.run.seed)
    if lora.distribution is not None:
        tiers = distributed_types(lora.distribution, targets, lora.rank_scale)
    elif lora.tiers:
        tiers = [
            Tier(
                f"lora.tiers[{index}]", module_ranks(list(targets), tier.rank, tier.module_ranks), tier.share
            )
            for index, tier in enumerate(lora.tiers)
        ]
        check_ranks(tiers, targets)
    else:
        ranks = dict.fromkeys(targets, lora.rank)
        return Tiers((ranks,), np.zeros(num_clients, dtype=np.int64))
    return draw_tiers(tiers, num_clients, config.run.seed)


def build_cohort_policy(config: CohortConfig, num_clients: int) -> CohortPolicy:
    """How cohorts are chosen among `num_clients`; a fraction is rounded down, to one client at least."""
    if config.client_ids is not None:
        return CohortPolicy(num_clients, len(config.client_ids), config.client_ids)
    expected = config.clients_a_round(num_clients)
    if config.sampling == "poisson":
        return CohortPolicy(num_clients, max(1, round(expected)), None, expected / num_clients)
    return CohortPolicy(num_clients, int(expected), as_published=config.sampling == "flexlora")


def build_participation(config: Config, tiers: Tiers) -> Participation | None:
    """How reliable clients are, and the simulated clock; None where all report back and there is no clock.

    Raises:
        ConfigError: there are neither one device nor as many as resource tiers.
    """
    clients = config.clients
    settings = clients.model_dump(exclude={"corruption"})
    if settings == ClientsConfig().model_dump(exclude={"corruption"}):
        return None
    if len(clients.devices) not in (0, 1, len(tiers.ranks)):
        raise ConfigError(
            f"clients.devices must hold one device for all clients, or one for each of {len(tiers.ranks)} resource "
            f"tiers, got {len(clients.devices)}"
        )
    return Participation(
        availability=clients.availability,
        outages=tuple(Outage(**outage.model_dump()) for outage in clients.outages),
        dropout=clients.dropout,
        over_selection=clients.over_selection,
        deadline_s=clients.deadline_s,
        devices=tuple(
            Device(
                device.tokens_per_s,
                device.uplink_mbps * BYTES_PER_MBIT,
                device.downlink_mbps * BYTES_PER_MBIT,
            )
            for device in clients.devices
        ),
        tier_of=tiers.tier_of,
        slowness=Slowness(**clients.slowness.model_dump()),
    )


def build_screening(config: Config) -> Screening | None:
    """Which updates the server takes; None for all finite ones."""
    training = config.training
    if training.max_update_norm is None and config.clients.corruption.probability == 0:
        return None  # the trainer itself sees to it that updates are finite
    return Screening(training.on_not_finite, training.max_update_norm, training.on_large_update)


def build_corruption(config: Config) -> Corruption | None:
    """Updates that arrive broken; None for none."""
    corruption = config.clients.corruption
    if corruption.probability == 0:
        return None
    return Corruption(corruption.probability, corruption.kind, corruption.scale, config.run.seed)
