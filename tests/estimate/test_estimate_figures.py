"""Rates, sizes, the table of GPUs, and text."""

import pytest

from fedsim.errors import ConfigError
from fedsim.estimate.devices import GIB, GPUS, find_gpu, recognise_gpu
from fedsim.estimate.memory import TrainingShape, slots_that_fit, tokens_that_fit, training
from fedsim.estimate.rates import Rate, fit_rate
from fedsim.estimate.report import HOUR, clock, operations, rounded_up, size, slurm_time
from fedsim.estimate.traffic import round_traffic
from fedsim.estimate.workload import MOST_ROUNDS, sampled_rounds
from fedsim.lora.plan import BOTH, ONLY_B
from tests.estimate.test_estimate_trace import costs_of


def test_a_fit_finds_both_parts_of_a_rate() -> None:
    true = Rate(2e-9, 0.01)
    samples = [
        (flops, passes, true.seconds(flops, passes)) for flops, passes in ((1e9, 4), (1e7, 4), (5e8, 9))
    ]

    found = fit_rate(samples)

    assert found.seconds_per_flop == pytest.approx(2e-9)
    assert found.seconds_per_pass == pytest.approx(0.01)


def test_no_part_of_a_fitted_rate_is_negative() -> None:
    """A large row that is faster than its share of a small one would make a row cost less than nothing."""
    found = fit_rate([(1e9, 1, 1.0), (1e6, 1, 0.9e-3)])
    start_bound = fit_rate([(1e9, 1, 1.0), (1e6, 1, 1.1)])

    assert found.seconds_per_pass == 0.0
    assert found.seconds_per_flop > 0
    assert start_bound == Rate(0.0, pytest.approx(1.05))


def test_overlapped_work_takes_the_longer_of_computing_and_starting() -> None:
    rate = Rate(1e-9, 0.5, overlapped=True)

    assert rate.seconds(2e9, 1) == pytest.approx(2.0)
    assert rate.seconds(1e6, 3) == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["h100", "H-100", " H100 ", "rtx 4090", "a100_80"])
def test_a_gpu_is_found_however_it_is_written(name: str) -> None:
    assert find_gpu(name).name in ("H100", "RTX4090", "A100-80")


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"--gpu must be one of .*H100.*got 'A100'"):
        find_gpu("A100")


@pytest.mark.parametrize(
    ("driver", "memory", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79 * GIB, "H100"),
        ("NVIDIA A100-SXM4-40GB", 39 * GIB, "A100-40"),
        ("NVIDIA A100-SXM4-80GB", 79 * GIB, "A100-80"),
        ("Tesla V100-SXM2-32GB", 31 * GIB, "V100-32"),
        ("NVIDIA GeForce RTX 4090", 24 * GIB, "RTX4090"),
        ("NVIDIA L40S", 45 * GIB, "L40S"),
    ],
)
def test_the_driver_s_name_is_recognised(driver: str, memory: int, name: str) -> None:
    found = recognise_gpu(driver, memory)

    assert found is not None
    assert found.name == name


def test_another_device_is_not_mistaken_for_a_known_one() -> None:
    assert recognise_gpu("NVIDIA A1000 Laptop", 6 * GIB) is None


def test_the_table_of_gpus_is_sane() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert gpu.half_flops > gpu.single_flops > 1e12
        assert gpu.bandwidth > 1e11


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "00:05:00"),
        (300, "00:05:00"),
        (301, "00:10:00"),
        (HOUR + 1, "01:15:00"),
        (5 * HOUR + 1, "05:30:00"),
        (24 * HOUR, "1-00:00:00"),
        (26.5 * HOUR, "1-03:00:00"),
    ],
)
def test_a_time_is_rounded_up_to_what_a_scheduler_takes(seconds: float, text: str) -> None:
    asked = rounded_up(seconds)

    assert asked >= seconds
    assert slurm_time(asked) == text


def test_figures_have_units() -> None:
    assert size(3 * GIB) == "3.00 GiB"
    assert operations(2.5e12) == "2.5 TFLOP"
    assert operations(1e4) == "0.01 MFLOP"
    assert clock(90) == "90 s"
    assert clock(3 * HOUR) == "3.0 h"


def test_all_rounds_are_looked_at_or_some_at_even_distances() -> None:
    assert sampled_rounds(3) == [0, 1, 2]
    many = sampled_rounds(1000)
    assert (many[0], many[-1], len(many)) == (0, 999, MOST_ROUNDS)


def test_one_process_exchanges_nothing() -> None:
    alone = round_traffic({"m": (4, 6)}, [[{"m": 2}]], BOTH, {"m": 2}, 4, {"m": 0})

    assert (alone.gathered_bytes, alone.received_bytes, alone.broadcast_bytes) == (0, 0, 0)
    assert alone.module_bytes == (2 * 10 * 4,)


def test_only_the_sides_that_travel_are_gathered() -> None:
    ranks = [[{"m": 2}, {"m": 3}], [{"m": 1}]]
    both = round_traffic({"m": (4, 6)}, ranks, BOTH, {"m": 3}, 4, {"m": 0})
    b_alone = round_traffic({"m": (4, 6)}, ranks, ONLY_B, {"m": 3}, 4, {"m": 0})

    # the rank with most decides the length of everybody's buffer
    assert both.gathered_bytes == 5 * 10 * 4
    assert both.received_bytes == 2 * 5 * 10 * 4
    assert b_alone.gathered_bytes == 5 * 6 * 4
    assert b_alone.broadcast_bytes == both.broadcast_bytes == 3 * 10 * 4


def shape(rank_rows: int, row_tokens: int, checkpointed: bool = False) -> TrainingShape:
    return TrainingShape(rank_rows, 1000, 4, 0.0, row_tokens, row_tokens, checkpointed, False, False, False)


def test_what_fits_does_fit_and_one_more_does_not() -> None:
    costs = costs_of("opt")
    free = 10_000_000
    slots = slots_that_fit(free, 2, 1000, 4, 0.0)

    def rows(count: int) -> int:
        return training(costs, shape(2 * count, 10_000)).parts["adapters in slots, gradients, optimizer"]

    assert rows(slots) <= free < rows(slots + 1)
    tokens = tokens_that_fit(free, costs, False)
    logits_aside = 2 * tokens * costs.hidden_bytes
    assert training(costs, shape(0, tokens)).parts["activations"] <= free - logits_aside


def test_checkpointing_takes_less_memory_and_more_operations() -> None:
    costs = costs_of("opt")

    kept = training(costs, shape(2, 4096)).parts["activations"]
    recomputed = training(costs, shape(2, 4096, checkpointed=True)).parts["activations"]

    assert recomputed < 0.6 * kept
