"""The decomposition of a sum of products, on all routes, against numpy's of the dense sum."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.errors import AdapterError
from fedsim.lora.factors import LoraFactors
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.svd import Svd, choose_route, product_svd, sum_svd
from tests.cohorts import random_adapter

ROUTES = ("qr", "stacks", "dense", "full")


def make_sum(seed: int, o: int, i: int, ranks: list[int], decay: float = 1.0) -> WeightedSum:
    cohort = []
    for index, rank in enumerate(ranks):
        part = random_adapter(seed + index, rank, {"m": (i, o)})["m"]
        cohort.append(LoraFactors(part.A, part.B * decay ** torch.arange(rank), part.scaling))
    return WeightedSum(cohort, [1 / len(ranks)] * len(ranks))


def dense(total: WeightedSum) -> np.ndarray:
    return sum(
        w * f.scaling * f.B.double().numpy() @ f.A.double().numpy()
        for f, w in zip(total.cohort, total.weights, strict=True)
    )


def product(svd: Svd) -> np.ndarray:
    return (svd.U * svd.S @ svd.Vh).numpy()


def check(svd: Svd, matrix: np.ndarray, count: int, accuracy: float = 1e-11) -> None:
    """Right values, right truncation (where it is unique), orthonormal or zero vectors, right energy."""
    values = np.linalg.svd(matrix, compute_uv=False)
    scale = max(values[0], 1e-300)
    assert svd.S.shape == (count,)
    assert svd.U.shape == (matrix.shape[0], count)
    assert svd.Vh.shape == (count, matrix.shape[1])
    np.testing.assert_allclose(svd.S / scale, values[:count] / scale, atol=accuracy)
    np.testing.assert_allclose(svd.energy / scale**2, np.sum(values**2) / scale**2, rtol=1e-10)
    error = np.linalg.norm(matrix - product(svd)) ** 2 / scale**2
    np.testing.assert_allclose(error, np.sum(values[count:] ** 2) / scale**2, atol=accuracy)
    alive = np.diag((svd.S > 0).double().numpy())
    np.testing.assert_allclose(svd.U.T @ svd.U, alive, atol=1e-12)
    np.testing.assert_allclose(svd.Vh @ svd.Vh.T, alive, atol=1e-12)


cases = st.tuples(
    st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.integers(1, 60), st.sampled_from(ROUTES), st.sampled_from([1.0, 0.7, 0.3]), st.integers(0, 1000),
)  # fmt: skip


@given(cases)
@settings(max_examples=150, deadline=None)
def test_every_route_gives_the_leading_components(case):
    o, i, ranks, rank, route, decay, seed = case
    total = make_sum(seed, o, i, ranks, decay)
    svd = sum_svd(total, rank, route)
    check(svd, dense(total), min(rank, sum(ranks), o, i))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(150, 130), (90, 300), (300, 90)])
def test_routes_agree_to_rounding_where_subspaces_are_followed(route, shape):
    """Large enough for the routes over Gram matrices to be taken in earnest."""
    for ranks, decay in (([8] * 10, 1.0), ([8] * 10, 0.5), ([8, 30, 40], 0.8)):
        total = make_sum(3, *shape, ranks, decay)
        matrix = dense(total)
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        for count in (1, 8, 20):
            expected = U[:, :count] * S[:count] @ Vh[:count]
            found = product(sum_svd(total, count, route))
            assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("decay", [1e-1, 1e-2])
def test_small_singular_values_survive_the_squares(route, decay):
    """Values down to 1e-12 of the largest: a Gram matrix holds none below 1e-8."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 120)))[0] for n in (140, 130))
    values = decay ** np.minimum(np.arange(120) * 0.5, 12 / -np.log10(decay))
    up, down = torch.from_numpy(left * values), torch.from_numpy(np.ascontiguousarray(right.T))
    svd = product_svd(up, down, 20, route)
    np.testing.assert_allclose(svd.S, values[:20], rtol=1e-3, atol=1e-13)
    expected = left[:, :20] * values[:20] @ right.T[:20]
    if values[19] > 2 * values[20]:
        assert np.linalg.norm(product(svd) - expected) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_equal_clients_are_one_client(route):
    one = random_adapter(0, 3, {"m": (60, 50)})["m"]
    svd = sum_svd(WeightedSum([one] * 16, [1 / 16] * 16), 8, route)
    assert int((svd.S > 0).sum()) == 3
    np.testing.assert_allclose(product(svd), one.delta_weight(), atol=1e-10)
    assert not svd.U[:, 3:].any()
    assert not svd.Vh[3:].any()


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_decomposes_into_zeros(route):
    one = random_adapter(0, 3, {"m": (60, 50)})["m"]
    zero = LoraFactors(one.A, torch.zeros_like(one.B), one.scaling)
    svd = sum_svd(WeightedSum([zero] * 16, [1 / 16] * 16), 8, route)
    assert svd.energy == 0.0
    assert svd.S.shape == (8,)
    assert not any(part.any() for part in (svd.U, svd.S, svd.Vh))


@pytest.mark.parametrize("route", ROUTES)
def test_products_that_cancel_leave_no_noise(route):
    one = random_adapter(0, 12, {"m": (60, 50)})["m"]
    svd = sum_svd(WeightedSum([one, one], [1.0, -1.0]), 8, route)
    assert not svd.S.any()


@pytest.mark.parametrize("route", ROUTES)
def test_how_a_product_is_split_into_factors_is_irrelevant(route):
    total = make_sum(1, 60, 50, [8] * 5)
    other = WeightedSum(
        [LoraFactors(f.A * 1e6, f.B * 1e-3, f.scaling * 1e-3) for f in total.cohort], total.weights
    )
    first, second = sum_svd(total, 6, route), sum_svd(other, 6, route)
    for mine, theirs in ((first.U, second.U), (first.S, second.S), (first.Vh, second.Vh)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_signs_are_fixed_on_all_routes():
    total = make_sum(1, 60, 50, [8] * 5, decay=0.5)
    all_of_them = [sum_svd(total, 6, route) for route in ROUTES]
    for svd in all_of_them:
        largest = svd.Vh.abs().argmax(dim=1, keepdim=True)
        assert bool((svd.Vh.gather(1, largest) > 0).all())
        torch.testing.assert_close(svd.Vh, all_of_them[0].Vh, rtol=1e-9, atol=1e-9)


def test_of_equal_entries_the_first_decides_the_sign():
    row = torch.tensor([[-1.0, 1.0 + 1e-9, 0.5]], dtype=torch.float64)
    svd = product_svd(torch.ones(2, 1, dtype=torch.float64), row)
    assert float(svd.Vh[0, 0]) > 0


def test_the_result_has_the_same_bits_each_time():
    total = make_sum(1, 150, 130, [8] * 10)
    for route in ROUTES:
        first, second = sum_svd(total, 8, route), sum_svd(total, 8, route)
        assert torch.equal(first.U, second.U)
        assert torch.equal(first.Vh, second.Vh)


def test_factors_are_not_written_into():
    total = make_sum(1, 60, 50, [8] * 5)
    before = [factors.map(torch.clone) for factors in total.cohort]
    for route in ROUTES:
        sum_svd(total, 6, route)
    for mine, copy in zip(total.cohort, before, strict=True):
        assert torch.equal(mine.A, copy.A)
        assert torch.equal(mine.B, copy.B)


@pytest.mark.parametrize("total_rank", [16, 300])
def test_values_that_are_not_finite_are_refused(total_rank):
    total = make_sum(1, 60, 50, [total_rank])
    total.cohort[0].B[0, 0] = float("nan")
    with pytest.raises(AdapterError, match="finite factors"):
        sum_svd(total, 4)


def test_stacks_that_do_not_fit_are_refused():
    with pytest.raises(AdapterError, match="one rank r"):
        product_svd(torch.zeros(4, 2), torch.zeros(3, 5))


def test_small_stacks_are_never_multiplied_out():
    assert choose_route(2048, 2048, 32, 8) == "qr"
    assert choose_route(2048, 2048, 512, 64) == "stacks"
    assert choose_route(2048, 2048, 6347, 200) == "dense"
    assert choose_route(64, 64, 6400, 64) == "full"
