"""Sums of products kept as factors, against the dense sums."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.errors import AdapterError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.lowrank import accumulate, combine, frobenius_norm, weighted_stack
from fedsim.lora.stacks import WeightedSum
from tests.cohorts import random_adapter

MODULE = "layers.0.q_proj"


def factors(
    seed: int, rank: int, o: int = 10, i: int = 12, dtype: torch.dtype = torch.float64
) -> LoraFactors:
    return random_adapter(seed, rank, {"m": (i, o)}, dtype=dtype)["m"]


def dense(part: LoraFactors) -> np.ndarray:
    return part.scaling * part.B.double().numpy() @ part.A.double().numpy()


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=5))


@given(shapes, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_accumulated_products_are_their_sum(shape, seed):
    o, i, ranks = shape
    total, expected = None, np.zeros((o, i))
    for index, rank in enumerate(ranks):
        part = factors(seed + index, rank, o, i)
        total = accumulate(total, part)
        expected += dense(part)
        assert total.scaling == 1.0
    np.testing.assert_allclose(dense(total), expected, rtol=1e-12, atol=1e-11)
    if len(ranks) > 1:
        assert total.rank <= min(o, i)


def test_accumulating_keeps_the_rank_until_it_is_full_and_then_stays():
    total = accumulate(accumulate(None, factors(0, 3)), factors(1, 4))
    assert total.rank == 7
    for seed in range(3):
        total = accumulate(total, factors(seed, 3))
        assert total.rank == 10
    assert torch.equal(total.B, torch.eye(10, dtype=torch.float64))
    tall = accumulate(factors(0, 10, o=12, i=10), factors(1, 1, o=12, i=10))
    assert torch.equal(tall.A, torch.eye(10, dtype=torch.float64))


def test_accumulate_rounds_once_to_the_dtype_of_the_update():
    first, second = factors(0, 3, dtype=torch.float32), factors(1, 8, dtype=torch.float32)
    total = accumulate(first, second)
    assert total.A.dtype == torch.float32
    np.testing.assert_array_equal(total.A, (dense(first) + dense(second)).astype(np.float32))


def test_a_sum_with_an_identity_is_exact():
    full = accumulate(factors(0, 5), factors(1, 5))
    assert torch.equal(WeightedSum((full,), (1.0,)).dense(), full.A)


@given(shapes, st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_stack_is_the_weighted_sum(shape, seed):
    o, i, ranks = shape
    cohort = [factors(seed + index, rank, o, i) for index, rank in enumerate(ranks)]
    weights = np.random.default_rng(seed).uniform(-1, 1, len(ranks)).tolist()
    expected = sum(w * dense(part) for w, part in zip(weights, cohort, strict=True))
    up, down = weighted_stack(cohort, weights)
    assert up.shape == (o, sum(ranks))
    assert down.shape == (sum(ranks), i)
    total = WeightedSum(cohort, weights)
    x, y = torch.randn(i, 2, dtype=torch.float64), torch.randn(o, 2, dtype=torch.float64)
    for found, wanted in (
        (up @ down, expected),
        (total.dense(), expected),
        (total.times(x), expected @ x.numpy()),
        (total.transpose_times(y), expected.T @ y.numpy()),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-10)


def test_blocks_of_a_long_stack_are_all_of_it():
    cohort = [factors(seed, 30) for seed in range(25)]
    total = WeightedSum(cohort, [0.04] * 25)
    assert [up.shape[1] for up, _ in total.blocks()] == [150, 150, 150, 150, 150]
    torch.testing.assert_close(torch.cat([down for _, down in total.blocks()]), total.stack()[1])


def test_contrast_a_stack_without_the_scaling_is_another_sum():
    part = factors(0, 3)
    up, down = weighted_stack((LoraFactors(part.A, part.B, 1.0),), (1.0,))
    assert not np.allclose(up @ down, dense(part))


def test_what_cannot_be_stacked_is_refused():
    with pytest.raises(AdapterError, match="one weight for each"):
        weighted_stack((), ())
    with pytest.raises(AdapterError, match=r"one \(out, in\)"):
        weighted_stack((factors(0, 2), factors(0, 2, o=4)), (1.0, 1.0))


@given(shapes, st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_norm_of_a_product(shape, seed):
    o, i, ranks = shape
    part = factors(seed, ranks[0], o, i)
    assert math.isclose(frobenius_norm(part), np.linalg.norm(dense(part)), rel_tol=1e-10)
    zero = LoraFactors(part.A, torch.zeros_like(part.B), part.scaling)
    assert frobenius_norm(zero) == 0.0


@pytest.mark.parametrize("ranks", [(2, 3), (6, 7), (20, 3)])
def test_combined_adapters_add_their_products(ranks):
    adapter, update = random_adapter(0, ranks[0]), random_adapter(1, ranks[1])
    both = combine(adapter, update)
    for module, part in both.items():
        expected = dense(adapter[module]) + dense(update[module])
        np.testing.assert_allclose(dense(part), expected, rtol=1e-11, atol=1e-10)
        assert part.rank == min(sum(ranks), *expected.shape)


def test_combine_takes_modules_of_either_and_leaves_an_adapter_alone():
    adapter = random_adapter(0, 2)
    assert combine(adapter, None) is adapter
    alone = AdapterState({MODULE: adapter[MODULE]})
    assert list(combine(alone, random_adapter(1, 2))) == list(adapter)
    assert combine(random_adapter(1, 2), alone)[MODULE].rank == 4
