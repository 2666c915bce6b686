"""What of a plan does not fit, and what is wasted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.estimate.facts import Facts
from fedsim.estimate.memory import Memory
from fedsim.estimate.report import Amounts, Slots, Times, size

IDLE_SHARE = 0.15
"""Idle time of the processes from which it is worth a line."""

ROW_SHARE = 4
"""A packed row with less than one over so much of its limit leaves a GPU with little to do at once."""


BUSY_SHARE = 0.8
"""Share of a core below which a probe was not alone."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for.

    Attributes:
        num_packs: `training.pack.num_packs`.
        sequential: clients train one after another because the configuration says so.
        checkpointing: `training.gradient_checkpointing`.
        problem: why clients of a pack cannot train together; None if they can.
        left_out: what the run will do and the figures do not count, in words.
    """

    num_packs: int
    sequential: bool
    checkpointing: bool
    problem: str | None
    left_out: tuple[str, ...] = ()


def advise(
    plan: Plan, facts: Facts, memory: Memory, slots: Slots, amounts: Amounts, times: Times | None
) -> list[str]:
    """Lines for people, each with a remedy."""
    return [
        *_engine(plan),
        *(f"not counted: {what}" for what in plan.left_out),
        *_memory(plan, facts, memory, slots),
        *_processes(plan, facts, amounts),
        *_device(facts, slots, amounts),
        *_tests(facts, times),
        *_neighbours(facts, times),
    ]


def _engine(plan: Plan) -> list[str]:
    if plan.problem is None or plan.sequential:
        return []
    return [f"clients of a pack train one after another: {plan.problem}"]


def _memory(plan: Plan, facts: Facts, memory: Memory, slots: Slots) -> list[str]:
    usable = facts.device.usable
    if memory.peak_bytes <= usable:
        return []
    text = f"does not fit: {size(memory.peak_bytes)} of {size(usable)} usable"
    if memory.resident_bytes > usable:
        return [
            f"{text}, and {size(memory.resident_bytes)} of it stay whatever the settings; take a device with more "
            "memory, a smaller model.dtype, or model.quantization"
        ]
    remedies = []
    if memory.peak_phase == "training":
        if slots.fitting and slots.fitting < slots.planned:
            remedies.append(f"training.pack.max_slots={slots.fitting}")
        if slots.fitting_tokens and slots.fitting_tokens < slots.row_tokens:
            remedies.append(f"training.pack.max_tokens={slots.fitting_tokens} (a micro-batch stays whole)")
        if not plan.checkpointing:
            remedies.append("training.gradient_checkpointing=true")
        remedies.append("a smaller training.batch_size")
    elif memory.peak_phase == "the exchange":
        remedies.append("a smaller cohort or smaller LoRA ranks")
    else:
        remedies.append("a smaller evaluation.batch_tokens")
    return [f"{text}, in {memory.peak_phase}; try {' or '.join(remedies)}"]


def _processes(plan: Plan, facts: Facts, amounts: Amounts) -> list[str]:
    world_size = facts.device.world_size
    packs = max((len(load.packs) for load in facts.loads), default=0)
    if packs < world_size:
        few = packs == plan.num_packs
        why = (
            f"a round has training.pack.num_packs={packs} packs"
            if few
            else f"no cohort has more than {packs} clients"
        )
        remedy = f"raise it to a multiple of {world_size}" if few else f"{packs} processes do as well"
        return [f"{world_size - packs} of {world_size} processes never train: {why}; {remedy}"]
    if amounts.idle_share > IDLE_SHARE:
        return [
            f"{amounts.idle_share:.0%} of the processes' time is lost to waiting; a larger training.pack.num_packs, a "
            f"multiple of {world_size}, balances better"
        ]
    return []


def _device(facts: Facts, slots: Slots, amounts: Amounts) -> list[str]:
    if facts.device.kind != "cuda":
        return []
    lines = []
    if amounts.row_tokens < slots.max_tokens / ROW_SHARE:
        lines.append(
            f"packed rows hold {amounts.row_tokens:,.0f} of {slots.max_tokens:,} tokens; larger "
            "training.pack.max_slots or training.batch_size, or fewer packs, give the GPU more to do at once"
        )
    gpu = facts.device.gpu
    if gpu is not None and not gpu.has_bfloat16 and facts.settings.dtype == torch.bfloat16:
        lines.append(f"{gpu.name} has no bfloat16 units; set model.dtype to float16 or float32")
    return lines


def _tests(facts: Facts, times: Times | None) -> list[str]:
    if times is None:
        return []
    tests = times.test_s + _client_test_share(facts) * times.train_s
    if tests <= times.mean_s / 2:
        return []
    return [
        "tests take more than half of a round; raise evaluation.every_rounds, or lower "
        "evaluation.max_client_test_examples or evaluation.max_test_examples"
    ]


def _neighbours(facts: Facts, times: Times | None) -> list[str]:
    if times is None or facts.device.kind != "cpu" or times.cpu_share >= BUSY_SHARE:
        return []
    return [
        f"the probe had {times.cpu_share:.0%} of a core, so others compute on this machine; on an idle one the run is "
        "faster"
    ]


def _client_test_share(facts: Facts) -> float:
    """Share of the clients' tests in the operations of the busiest process."""
    shares: Sequence[float] = [
        facts.flops(rank.client_tests, False)
        / max(1.0, facts.flops(rank.client_tests, False) + facts.flops(rank.train, True))
        for rank in (max(load.ranks, key=lambda rank: rank.train.tokens) for load in facts.loads)
    ]
    return float(np.mean(shares))
