"""From a configuration to an estimate."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedsim.comm.group import Group
from fedsim.config.model_section import ModelConfig
from fedsim.config.schema import Config
from fedsim.data.batches import length_batches
from fedsim.errors import ConfigError, ModelError
from fedsim.estimate.advice import Plan, advise
from fedsim.estimate.devices import Device, find_gpu, recognise_gpu
from fedsim.estimate.facts import Facts, Settings
from fedsim.estimate.probe import build_probe
from fedsim.estimate.report import Estimate
from fedsim.estimate.trace import ModelCosts, rough_costs, trace_model
from fedsim.estimate.workload import CountingScorer, Limits, Workload, sampled_rounds
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import Client, ClientPlan
from fedsim.lora.state import ServerState
from fedsim.models.base import choose_dtype
from fedsim.models.cpu_linear import choose_cpu_linear
from fedsim.models.description import build_empty_base
from fedsim.models.packing import HAS_VARLEN
from fedsim.models.quantized import Quantization, weight_bytes
from fedsim.models.rows import MAX_ROW_VALUES
from fedsim.models.stacked import DENSE_ROWS_AT_LEAST, DENSE_SHARE
from fedsim.server.build import build_local_training
from fedsim.server.build_tests import build_tests, sample_examples
from fedsim.server.engine import MAX_TOKENS
from fedsim.server.summary import RunSummary
from fedsim.server.waiting import most_waiting_bytes
from fedsim.training.memory import peak_memory_bytes

logger = logging.getLogger(__name__)


def build_device(config: Config, group: Group, gpu: str | None, processes: int | None, probe: bool) -> Device:
    """The device that the options of the command line ask about.

    Args:
        config: the configuration.
        group: the processes that make the estimate.
        gpu: name of a GPU to plan for; None for what this machine has.
        processes: to plan for; None for as many as `group` has.
        probe: whether something will be measured.

    Raises:
        ConfigError: the options contradict each other or the configuration.
    """
    if group.world_size > 1 and processes not in (None, group.world_size):
        raise ConfigError(
            f"--processes must be {group.world_size}, the number of processes that were started, or be left out, got "
            f"{processes}; start one process to plan for another number"
        )
    world_size = processes or group.world_size
    if gpu is not None:
        sheet = find_gpu(gpu)
        if probe:
            raise ConfigError(
                f"--gpu must be left out with --probe, which measures the device at hand, got {gpu!r}"
            )
        if config.run.device == "cpu":
            raise ConfigError("run.device must be auto or cuda with --gpu, got 'cpu'")
        return Device("cuda", f"each with one {sheet.name}", sheet, sheet.memory_bytes, world_size)
    if group.device.type == "cuda":
        facts = torch.cuda.get_device_properties(group.device)
        sheet_here = recognise_gpu(facts.name, facts.total_memory)
        return Device("cuda", f"each with one {facts.name}", sheet_here, facts.total_memory, world_size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "on a CPU of this kind", None, memory // world_size, world_size)


def build_estimate(
    config: Config, group: Group, summary: RunSummary, device: Device, probe: bool
) -> Estimate:
    """What the run will cost. Collective with `probe`; else each rank works out the same by itself.

    Raises:
        PeerError, FedsimError: the run could not start.
    """
    dtype = choose_dtype(config.model.dtype, torch.device(device.kind))
    targets = {module: (f.A.shape[1], f.B.shape[0]) for module, f in summary.adapter.items()}
    in_half = dtype in (torch.bfloat16, torch.float16)
    has_kernel = HAS_VARLEN and (
        device.gpu is None or device.gpu.has_bfloat16
    )  # both since the same generation
    varlen = device.kind == "cuda" and in_half and has_kernel
    costs, problem = _costs(config, dtype, targets, copies_attention=not varlen)
    costs = _split(config.model, _quantized(config.model.quantization, costs, dtype), device, dtype)
    padded = config.training.trainer == "sequential" or problem is not None
    plans = _plans(summary)
    workload = _workload(config, summary, device, targets, padded, _shares_start(summary, plans))
    loads = [workload.round_work(index, device.world_size) for index in sampled_rounds(config.run.rounds)]
    facts = Facts(
        _settings(config, summary, device, dtype, costs, padded),
        device,
        summary.adapter,
        targets,
        costs,
        workload,
        plans,
        tuple(loads),
    )
    traffic = [facts.traffic(load) for load in loads]
    resident = peak_memory_bytes(torch.device("cpu"))  # before a probe adds to the process
    memory = facts.memory(resident, traffic)
    slots, amounts = facts.slots(memory), facts.amounts(traffic)
    probed = build_probe(config, group, summary, workload, facts.flops) if probe else None
    times = facts.times(probed, traffic)
    plan = Plan(
        config.training.pack.num_packs,
        config.training.trainer == "sequential",
        config.training.gradient_checkpointing,
        problem,
        _left_out(config),
    )
    return Estimate(
        device=device.text,
        world_size=device.world_size,
        on_gpu=device.kind == "cuda",
        memory=memory,
        capacity=device.capacity,
        measured_bytes=None if probed is None else probed.peak_bytes,
        slots=slots,
        amounts=amounts,
        times=times,
        advice=tuple(advise(plan, facts, memory, slots, amounts, times)),
    )


def _settings(
    config: Config,
    summary: RunSummary,
    device: Device,
    dtype: torch.dtype,
    costs: ModelCosts,
    padded: bool,
) -> Settings:
    answers = config.evaluation.answers
    return Settings(
        dtype=dtype,
        checkpointed=config.training.gradient_checkpointing and not padded,
        proximal=config.training.proximal_mu > 0,
        server_moments={"none": 0, "fedavgm": 1}.get(config.aggregation.server_optimizer.name, 2),
        most_waiting_bytes=most_waiting_bytes(
            config.training.pack.keep_updates_on, device.capacity if device.kind == "cuda" else None
        ),
        packed_bytes=_packed_bytes(config, summary, device, dtype, costs),
        sharded=config.aggregation.svd_placement == "sharded",
        answer_batches=_answer_batches(config, summary),
        generated=answers.metric == "generated",
        max_new_tokens=answers.max_new_tokens,
    )


def _packed_bytes(
    config: Config, summary: RunSummary, device: Device, dtype: torch.dtype, costs: ModelCosts
) -> int:
    place = torch.device(device.kind)
    shapes = costs.linear_shapes
    if config.model.quantization != "none":
        shapes = tuple(shape for shape in shapes if shape[0] == costs.vocab_size)
    if not choose_cpu_linear(config.model.cpu_linear, place, dtype, shapes):
        return 0
    skipped = costs.target_bytes if summary.strategy.traits.changes_base else 0
    return 2 * (sum(o * i for o, i in shapes) * 4 - skipped)


def _quantized(quantization: Quantization, costs: ModelCosts, dtype: torch.dtype) -> ModelCosts:
    """Costs of a base whose linear modules but the head are kept in fewer bits, and dequantized one at a time."""
    shapes = [shape for shape in costs.linear_shapes if shape[0] != costs.vocab_size]
    if quantization == "none" or not shapes:
        return costs
    saved = sum(o * i * dtype.itemsize - weight_bytes(quantization, o, i) for o, i in shapes)
    largest = max(o * i for o, i in shapes) * dtype.itemsize
    return replace(costs, parameter_bytes=costs.parameter_bytes - saved, dequantized_bytes=largest)


def _split(model: ModelConfig, costs: ModelCosts, device: Device, dtype: torch.dtype) -> ModelCosts:
    """Costs of a base of which each process of a group has a part, and its largest module while that is used.

    With `model.offload=cpu` a GPU holds that module only.
    """
    if model.sharding == "none":
        return costs
    size = model.sharding_group_size or device.world_size
    largest = max((o * i for o, i in costs.linear_shapes), default=0) * dtype.itemsize
    part = 0 if model.offload == "cpu" and device.kind == "cuda" else -(-costs.parameter_bytes // size)
    return replace(costs, parameter_bytes=part + largest)


def _left_out(config: Config) -> tuple[str, ...]:
    """What a run will do and the figures do not count."""
    found = []
    if config.strategy.name == "slora":
        found.append(
            "the first stage of strategy.name=slora, whose clients train masked weights of full rank: its slots take "
            "more memory than said here, and its bytes are those of the masked values"
        )
    if config.early_stopping.metric.startswith("validation"):
        found.append(
            f"the validation of early_stopping.metric={config.early_stopping.metric}, in time and memory"
        )
    if config.model.offload == "cpu":
        found.append("the base's parts in main memory (model.offload=cpu), and the time in which they travel")
    return tuple(found)


def _answer_batches(config: Config, summary: RunSummary) -> tuple[tuple[int, int], ...]:
    """(sequences, longest) of each batch of the test of answers."""
    answers, store = config.evaluation.answers, summary.data.test
    if answers.metric == "off" or store.answers is None or not summary.strategy.traits.has_global_model:
        return ()
    examples = sample_examples(len(store), answers.max_examples, config.run.seed, "max_answer_examples")
    lengths = store.num_tokens[examples]
    if answers.metric == "generated":
        lengths = store.answers.answer_start[examples] + answers.max_new_tokens
    batches = length_batches(lengths, config.evaluation.batch_tokens)
    return tuple((len(batch), int(lengths[batch].max())) for batch in batches)


def _costs(
    config: Config, dtype: torch.dtype, targets: Mapping[str, tuple[int, int]], copies_attention: bool
) -> tuple[ModelCosts, str | None]:
    """Costs of the base, and why clients of a pack cannot train together; None if they can."""
    model: Any = build_empty_base(config.model).to(dtype).eval().requires_grad_(False)
    try:
        return trace_model(model, targets, copies_attention), None
    except ModelError as error:
        return rough_costs(build_empty_base(config.model).to(dtype), targets), str(error)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        logger.warning(
            "the shapes of %s cannot be followed without weights (%s); its costs are taken from its sizes",
            config.model.name_or_path,
            " ".join(str(error).split())[:200],
        )
        return rough_costs(build_empty_base(config.model).to(dtype), targets), None


def _plans(summary: RunSummary) -> list[tuple[AdapterState, ClientPlan]]:
    """For each tier what a client receives in round 0, and its plan."""
    state = ServerState(0, summary.adapter)
    plans = []
    for tier in np.unique(summary.tiers.tier_of).tolist():
        client_id = int(np.flatnonzero(summary.tiers.tier_of == tier)[0])
        client = Client(client_id, summary.tiers.lora_ranks(client_id, 0))
        received = summary.strategy.download(state, client.lora_ranks)
        plans.append((received, summary.strategy.plan(state, client, received)))
    return plans


def _shares_start(summary: RunSummary, plans: Sequence[tuple[AdapterState, ClientPlan]]) -> bool:
    traits = summary.strategy.traits
    keeps_own = traits.keeps_client_state and not traits.has_global_model
    return not keeps_own and all(plan.start is received for received, plan in plans)


def _workload(
    config: Config,
    summary: RunSummary,
    device: Device,
    targets: Mapping[str, tuple[int, int]],
    padded: bool,
    shares_start: bool,
) -> Workload:
    counter = CountingScorer(padded)
    budget, local = build_local_training(config)
    global_test, client_test = build_tests(config, counter, summary.data)
    pack = config.training.pack
    limits = Limits(
        max_slots=pack.max_slots,
        max_tokens=pack.max_tokens or MAX_TOKENS[device.kind],
        max_rows=MAX_ROW_VALUES[device.kind] // sum(i + o for i, o in targets.values()),
        dense_rows=max(DENSE_ROWS_AT_LEAST, min(i for i, _ in targets.values()) // DENSE_SHARE),
        padded=padded,
    )
    return Workload(
        data=summary.data,
        strategy=summary.strategy,
        tiers=summary.tiers,
        cohort=summary.cohort,
        budget=budget,
        local=local,
        seed=config.run.seed,
        num_packs=pack.num_packs,
        rounds=config.run.rounds,
        evaluate_every=config.evaluation.every_rounds,
        limits=limits,
        global_test=global_test,
        client_test=client_test,
        counter=counter,
        shares_start=shares_start,
        participation=summary.participation,
    )
