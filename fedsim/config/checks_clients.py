"""Rules about cohorts and unreliable clients that tie several keys together."""

from collections.abc import Iterator

from fedsim.config.clients_section import ClientsConfig, CohortConfig, over_selected
from fedsim.config.keys import show
from fedsim.config.model_section import LoraConfig
from fedsim.config.rules import exactly_one, unused_keys
from fedsim.config.run_section import RunConfig
from fedsim.config.schema import Config


def check_cohort(cohort: CohortConfig, num_clients: int) -> Iterator[str]:
    """How many clients a round has, and which."""
    limit = f"data.partition.num_clients={num_clients}"
    yield from exactly_one(
        "cohort", {"size": cohort.size, "fraction": cohort.fraction, "client_ids": cohort.client_ids}
    )
    if cohort.size is not None and cohort.size > num_clients:
        yield f"cohort.size must be in [1, {limit}], got {cohort.size}"
    if cohort.sampling != "fixed" and cohort.client_ids is not None:
        yield f"cohort.sampling must be fixed when cohort.client_ids is set, got {show(cohort.sampling)}"
    if cohort.client_ids is not None:
        outside = [client_id for client_id in cohort.client_ids if client_id >= num_clients]
        if outside:
            yield f"cohort.client_ids must be below {limit}, got {show(outside)}"
        twice = sorted({i for i in cohort.client_ids if cohort.client_ids.count(i) > 1})
        if twice:
            yield f"cohort.client_ids must name each client once, got {show(twice)} more than once"


def check_clients(config: Config) -> Iterator[str]:
    """Unreliable clients and the simulated clock."""
    clients, num_clients = config.clients, config.data.partition.num_clients
    yield from _clock(clients)
    yield from _devices(clients, config.lora)
    for index, outage in enumerate(clients.outages):
        where = f"clients.outages[{index}]"
        if outage.until_round <= outage.from_round:
            yield f"{where}.until_round must be above from_round={outage.from_round}, got {outage.until_round}"
        outside = [client_id for client_id in outage.client_ids if client_id >= num_clients]
        if outside:
            yield f"{where}.client_ids must be below data.partition.num_clients={num_clients}, got {show(outside)}"
        if outage.client_ids and outage.share != 1:
            yield f"{where}.share must stay at its default 1.0 when client_ids is set, got {show(outage.share)}"
    if clients.corruption.kind != "scaled":
        because = f"when clients.corruption.kind is {clients.corruption.kind}"
        yield from unused_keys("clients.corruption", clients.corruption, ("scale",), because)
    if clients.over_selection > 1:
        yield from _over_selection(config.cohort, clients.over_selection, num_clients)
    if config.cohort.sampling == "flexlora":
        because = "with cohort.sampling=flexlora, whose cohorts are those of the published code"
        yield from unused_keys("clients", clients, ("availability", "outages"), because)
    if config.strategy.name == "centralized" and clients != ClientsConfig():
        yield "clients must be left at its defaults with strategy.name=centralized, which has no clients to lose"


def _clock(clients: ClientsConfig) -> Iterator[str]:
    """Keys that need simulated times."""
    if clients.devices:
        return
    because = "when clients.devices is empty, without which there is no simulated clock"
    yield from unused_keys("clients", clients, ("over_selection", "deadline_s"), because)
    yield from unused_keys("clients.slowness", clients.slowness, ("name", "spread", "each_round"), because)


def _devices(clients: ClientsConfig, lora: LoraConfig) -> Iterator[str]:
    """One for all, or one for each resource tier, where the configuration alone tells how many there are."""
    if lora.distribution is not None or lora.rank_policy is not None:
        return
    num_tiers = max(1, len(lora.tiers))
    if len(clients.devices) not in (0, 1, num_tiers):
        yield (
            f"clients.devices must hold one device for all clients, or one for each of {num_tiers} resource tiers, got "
            f"{len(clients.devices)}"
        )


def _over_selection(cohort: CohortConfig, factor: float, num_clients: int) -> Iterator[str]:
    if cohort.sampling != "fixed" or cohort.client_ids is not None:
        yield (
            "clients.over_selection must be 1 unless a fixed number of clients is drawn (cohort.size or "
            f"cohort.fraction, cohort.sampling=fixed), got {show(factor)}"
        )
        return
    wanted = int(cohort.clients_a_round(num_clients))
    if over_selected(wanted, factor) > num_clients:
        yield (
            f"clients.over_selection times the cohort of {wanted} clients must be at most "
            f"data.partition.num_clients={num_clients}, got {show(factor)}"
        )


def check_published_cohorts(cohort: CohortConfig, run: RunConfig) -> Iterator[str]:
    """That code makes a seed of 32 bits from the round and its own seed (`server.cohort.published_seed`)."""
    largest = (2**32 - 1) // (20 * max(1, run.rounds - 1)) - 200
    if cohort.sampling == "flexlora" and run.seed > largest:
        yield (
            f"run.seed must be at most {largest} with cohort.sampling=flexlora and run.rounds={run.rounds}, whose "
            f"seeds have 32 bits, got {run.seed}"
        )
