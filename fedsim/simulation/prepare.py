"""Data, adapter, strategy and base, the same on every rank, before the first round."""

from fedsim.comm.agree import all_or_none, root_first, same_everywhere
from fedsim.comm.group import Group
from fedsim.comm.sharding import ShardingGroup
from fedsim.config.schema import Config
from fedsim.data.build import FederatedData, build_data
from fedsim.models.base import BaseModel, build_base, locate_base
from fedsim.models.description import BaseDescription, describe_base
from fedsim.models.tokenizer import build_tokenizer
from fedsim.server.build import build_initial_adapter, build_local_training, check_svd_device
from fedsim.server.build_clients import build_cohort_policy, build_participation, build_tiers
from fedsim.server.build_strategy import build_federated_strategy
from fedsim.server.cohort import check_warmup
from fedsim.server.summary import RunSummary


def prepare_data(config: Config, group: Group) -> tuple[RunSummary, FederatedData]:
    """Tokenizer, data, partition, and all checks that need no weights; the same on every rank."""

    def prepare() -> tuple[BaseDescription, FederatedData]:
        tokenizer = build_tokenizer(config.model)
        description = describe_base(
            config.model, config.lora.target_modules, tokenizer, config.data.max_tokens
        )
        return description, build_data(config.data, tokenizer, config.run.seed)

    description, data = root_first(group, "preparing the data", prepare)
    partitioner = config.data.partition.name
    made_by = f", which data.partition.name={partitioner} has made," if ":" in partitioner else ""
    same_everywhere(group, f"the data and its partition{made_by}", data.fingerprint)
    with all_or_none(group, "setting up the adapter"):
        check_svd_device(config.aggregation.svd_device, group.device)
        num_clients = data.partition.num_clients
        budget, local = build_local_training(config)
        check_warmup(local.warmup_steps, budget, int(data.partition.sizes.max()))
        tiers = build_tiers(config, description.targets, num_clients, data.partition.sizes)
        summary = RunSummary(
            description.name,
            description.num_parameters,
            build_initial_adapter(config, description.targets, tiers),
            data,
            build_cohort_policy(config.cohort, num_clients),
            tiers,
            build_federated_strategy(config, description.targets, tiers, num_clients),
            build_participation(config, tiers),
        )
    return summary, data


def load_base(config: Config, group: Group) -> BaseModel:
    """The base on every process, or each one's part of it."""
    if config.model.sharding == "none":
        return root_first(group, "loading the base model", lambda: build_base(config.model, group.device))
    root_first(group, "fetching the base model", lambda: locate_base(config.model))
    sharding = ShardingGroup(
        group, config.model.sharding_group_size, config.model.offload == "cpu", config.comm.timeout_s
    )
    base: BaseModel | None = None
    with all_or_none(group, "loading the base model"):
        base = build_base(config.model, group.device, sharding)
    assert base is not None
    return base


def input_fingerprints(base: BaseModel, summary: RunSummary) -> dict[str, str]:
    """What a resumed run must find as it was: data, weights and settings of the base."""
    return {"data": summary.data.fingerprint, "base": base.fingerprint, "base_settings": base.settings}
