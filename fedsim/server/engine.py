"""Which trainer and which scorer a run uses."""

import logging
from typing import Any

from fedsim.comm.group import Group
from fedsim.config.schema import Config
from fedsim.data.tokens import TokenStore
from fedsim.errors import ModelError
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer, Scorer
from fedsim.models.adapted import AdaptedModel
from fedsim.models.base import BaseModel
from fedsim.models.cpu_linear import choose_cpu_linear, linear_shapes, prepack_frozen_linears
from fedsim.models.pack_check import alone_logits, packing_problem, undivided_randomness
from fedsim.models.sharding import ShardedHead, SharedBy, run_in_lockstep
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.training.packed import PackedTrainer
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.trainer import Trainer

logger = logging.getLogger(__name__)

MAX_TOKENS = {"cuda": 8192, "cpu": 2048}
"""`training.pack.max_tokens=null`: a GPU wants many tokens, a CPU's caches do not."""


def build_engine(
    config: Config, group: Group, base: BaseModel, store: TokenStore, changes_base: bool = False
) -> tuple[Trainer, Scorer, AdaptedModel | StackedModel]:
    """The trainer, the scorer, and what both work on: the base, which is changed in place.

    Args:
        config: the configuration.
        group: the processes.
        base: on this process's device.
        store: training examples.
        changes_base: whether the weights of the target modules will change; these are then not packed for oneDNN.

    Raises:
        ConfigError: a target module is not in the base.
        ModelError: `training.trainer=packed` with a base that cannot be packed, or `model.cpu_linear=onednn` where it
            is not to be had.
    """
    targets = find_targets(base.model, config.lora.target_modules)
    if base.sharding is not None:
        return _sharded(config, group, base, base.sharding, targets, store)
    skip = list(targets) if changes_base else []
    shapes = linear_shapes(base.model, skip)
    if choose_cpu_linear(config.model.cpu_linear, group.device, base.dtype, shapes):
        report = prepack_frozen_linears(base.model, skip)
        logger.info(
            "model.cpu_linear: %d frozen linear modules packed for oneDNN, %.0f MiB more memory a process",
            report.num_modules,
            report.extra_bytes / 2**20,
        )
    if config.training.trainer != "sequential":
        stacked, problem = _try_packed(config, group, base, targets)
        if stacked is not None:
            return _packed(config, group, stacked, store)
        if config.training.trainer == "packed":
            raise ModelError(
                f"training.trainer must be auto or sequential for {base.name}, got 'packed': {problem}"
            )
        logger.warning(
            "clients of a pack train one after another, not together: for %s, %s", base.name, problem
        )
        if config.training.gradient_checkpointing:
            logger.warning(
                "training.gradient_checkpointing has no effect on clients that train one after another"
            )
    adapted = AdaptedModel(base.model, targets, group.device)
    trainer = SequentialTrainer(
        adapted, store, base.pad_id, config.training.on_not_finite == "drop", process_rank=group.rank
    )
    return trainer, PaddedScorer(adapted, base.pad_id), adapted


def _sharded(
    config: Config,
    group: Group,
    base: BaseModel,
    sharding: SharedBy,
    targets: dict[str, tuple[int, int]],
    store: TokenStore,
) -> tuple[Trainer, Scorer, StackedModel]:
    """As `_packed`, on a base of which each process of a group has a part."""
    untyped: Any = base.model
    stacked = StackedModel(
        base.model,
        targets,
        group.device,
        ShardedHead(untyped.get_output_embeddings()),
        config.training.gradient_checkpointing,
    )
    run_in_lockstep(stacked, sharding, store)
    with stacked.unwrapped() as plain:
        alone = stacked.passes.run("test", lambda: alone_logits(plain, group.device, config.data.max_tokens))
    problem = stacked.passes.run("test", lambda: packing_problem(stacked, alone, config.data.max_tokens))
    if problem is not None:
        raise ModelError(f"model.sharding must be none for {base.name}, got 'zero3': {problem}")
    logger.info("model.sharding: the base is split over %d processes", sharding.size)
    return _packed(config, group, stacked, store)


def _try_packed(
    config: Config, group: Group, base: BaseModel, targets: dict[str, tuple[int, int]]
) -> tuple[StackedModel | None, str | None]:
    """The base set up for packed rows, or why it cannot be; in that case it is as it was."""
    if config.model.dropout == "as_config":
        problem = undivided_randomness(base.model)
        if problem is not None:
            return None, problem
    alone = alone_logits(base.model, group.device, config.data.max_tokens)
    try:
        stacked = StackedModel(
            base.model, targets, group.device, checkpoint_gradients=config.training.gradient_checkpointing
        )
    except ModelError as error:
        return None, str(error)
    problem = packing_problem(stacked, alone, config.data.max_tokens)
    if problem is not None:
        stacked.unwrap()
        return None, problem
    return stacked, None


def _packed(
    config: Config, group: Group, stacked: StackedModel, store: TokenStore
) -> tuple[Trainer, Scorer, StackedModel]:
    pack = config.training.pack
    max_tokens = pack.max_tokens or MAX_TOKENS[group.device.type]
    trainer = PackedTrainer(
        stacked,
        store,
        pack.max_slots,
        max_tokens,
        config.training.on_not_finite == "drop",
        process_rank=group.rank,
    )
    return trainer, PackedScorer(stacked), stacked
