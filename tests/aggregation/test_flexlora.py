"""FlexLoRA and HLoRA: oracles, properties, and the published mistakes. Products are compared, never factors."""

import json
from collections.abc import Mapping

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.flexlora import FlexLora
from fedsim.aggregation.hlora import HLora
from fedsim.aggregation.spectrum import spectra_with_energy
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.state import ServerState
from tests.cohorts import TARGETS, make_federation, make_report, one_round, random_adapter, stream

MODULES = list(TARGETS)
Q = MODULES[0]
BOTH_KINDS = pytest.mark.parametrize("kind", [FlexLora, HLora])


def start(max_rank: int = 4, **changes) -> ServerState:
    federation = make_federation(max_rank, **changes)
    return ServerState(0, initial_adapter(TARGETS, federation.max_ranks, federation.scaling, federation.seed))


def ranks_of(rank: int) -> dict[str, int]:
    return dict.fromkeys(TARGETS, rank)


def product(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def mean_product(cohort: list[AdapterState], counts: list[int], module: str) -> np.ndarray:
    return sum(n / sum(counts) * product(a[module]) for a, n in zip(cohort, counts, strict=True))


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def run(strategy, cohort: list[AdapterState], counts: list[int], state: ServerState | None = None):
    """Aggregate adapters that clients are said to have trained."""
    reports = [make_report(k, n) for k, n in enumerate(counts)]
    return strategy.aggregate(state or ServerState(0, cohort[0]), reports, stream(cohort))


@BOTH_KINDS
@given(
    ranks=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    max_rank=st.integers(1, 14),
)
@settings(max_examples=40, deadline=None)
def test_each_rank_gets_the_best_approximation_of_the_mean(kind, ranks, seed, max_rank):
    counts = np.random.default_rng(seed).integers(1, 50, len(ranks)).tolist()
    cohort = [random_adapter(seed + k, rank) for k, rank in enumerate(ranks)]
    strategy = kind(make_federation(max_rank))
    after = run(strategy, cohort, counts).state
    for rank in {1, (max_rank + 1) // 2, max_rank}:
        received = strategy.download(after, ranks_of(rank))
        for module, factors in received.items():
            expected = best(mean_product(cohort, counts, module), rank)
            assert factors.rank == rank
            assert factors.scaling == 16 / rank
            np.testing.assert_allclose(product(factors), expected, atol=1e-9 * max(1, np.abs(expected).max()))


@BOTH_KINDS
def test_the_two_factors(kind):
    """A has orthonormal rows and B the singular values; in HLoRA it is the other way round."""
    strategy = kind(make_federation(4))
    aggregated = run(strategy, [random_adapter(0, 4), random_adapter(1, 4)], [1, 3])
    for module, factors in strategy.download(aggregated.state, ranks_of(3)).items():
        up, down = factors.scaling * factors.B.numpy(), factors.A.numpy()
        values = np.array(aggregated.spectra[module])[:3]
        squares_up, squares_down = (values**2, np.ones(3)) if kind is FlexLora else (np.ones(3), values**2)
        np.testing.assert_allclose(up.T @ up, np.diag(squares_up), atol=1e-9 * values[0] ** 2)
        np.testing.assert_allclose(down @ down.T, np.diag(squares_down), atol=1e-9 * values[0] ** 2)


@BOTH_KINDS
def test_the_record_has_the_norm_of_all_of_the_mean(kind):
    """Of three clients of rank 4 the server keeps four components, which do not tell how much was cut off."""
    cohort, counts = [random_adapter(k, 4) for k in range(3)], [1, 3, 2]
    aggregated = run(kind(make_federation(4)), cohort, counts)
    record = spectra_with_energy(aggregated.spectra, aggregated.by_module)
    assert list(record) == [*MODULES, *(f"{module}/energy" for module in MODULES)]
    for module in MODULES:
        (energy,) = record[f"{module}/energy"]
        mean = mean_product(cohort, counts, module)
        np.testing.assert_allclose(energy, (mean**2).sum(), rtol=1e-9)
        assert sum(value**2 for value in record[module]) < 0.99 * energy
    assert spectra_with_energy({Q: (1.0,)}, {Q: {"spectrum/total_rank": 1.0}}) == {Q: (1.0,)}


@BOTH_KINDS
def test_published_values(kind, shared):
    """What the official FlexLoRA code gave: mean, singular values, and redistribution to ranks 1, 2, 4 and 8."""
    facts = json.loads((shared / "golden" / "aggregation.json").read_text())
    golden = np.load(shared / "golden" / "aggregation.npz")
    targets = dict.fromkeys(facts["modules"], (facts["d_in"], facts["d_out"]))
    cohort = [
        AdapterState(
            {
                m: LoraFactors(
                    *(torch.from_numpy(golden[f"in/c{k}/{m}/{side}"]) for side in "AB"), facts["alpha"] / rank
                )
                for m in targets
            }
        )
        for k, rank in enumerate(facts["ranks"])
    ]
    federation = make_federation(8, targets, scaling=ScalingRule(facts["alpha"]))
    state = ServerState(
        0, initial_adapter(targets, federation.max_ranks, federation.scaling, 0, torch.float32)
    )
    strategy = kind(federation)
    aggregated = run(strategy, cohort, facts["num_samples"], state)
    for module in targets:
        delta = golden[f"flexlora/{module}/delta"]
        np.testing.assert_allclose(
            mean_product(cohort, facts["num_samples"], module), delta, rtol=1e-5, atol=1e-5
        )
        values = golden[f"flexlora/{module}/singular_values"]
        np.testing.assert_allclose(aggregated.spectra[module], values[:8], rtol=1e-5)
        for rank in (1, 2, 4, 8):
            received = strategy.download(aggregated.state, dict.fromkeys(targets, rank))[module]
            assert received.A.dtype == torch.float32
            published = golden[f"flexlora/{module}/rank{rank}"]
            np.testing.assert_allclose(product(received), published, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_agrees_with_peft(combination):
    from peft import LoraConfig, get_peft_model

    from tests.helpers import tiny_opt

    weights, ranks = [0.2, 0.5, 0.3], [2, 4, 3]
    configs = [LoraConfig(r=r, lora_alpha=16, target_modules=["q_proj"]) for r in ranks]
    model = get_peft_model(tiny_opt(), configs[0], "c0")
    for name, config in zip(("c1", "c2"), configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model.model.decoder.layers[0].self_attn.q_proj
    cohort = []
    for k, rank in enumerate(ranks):
        factors = random_adapter(k, rank, {"m": (16, 16)}, dtype=torch.float32)["m"]
        layer.lora_A[f"c{k}"].weight.data, layer.lora_B[f"c{k}"].weight.data = factors.A, factors.B
        cohort.append(AdapterState({"m": factors}))
    rank = 9 if combination == "cat" else 4
    more = {} if combination == "cat" else {"svd_rank": rank}
    model.add_weighted_adapter(["c0", "c1", "c2"], weights, "merged", combination_type=combination, **more)
    strategy = FlexLora(make_federation(rank, {"m": (16, 16)}))
    after = run(strategy, cohort, [2, 5, 3], ServerState(0, cohort[0])).state
    torch.testing.assert_close(
        after.adapter["m"].delta_weight(), layer.get_delta_weight("merged"), rtol=1e-4, atol=1e-4
    )


@BOTH_KINDS
def test_one_client_keeps_its_product(kind):
    strategy = kind(make_federation(4))
    client = random_adapter(0, 4)
    after = run(strategy, [client], [7]).state
    for module, factors in strategy.download(after, ranks_of(4)).items():
        np.testing.assert_allclose(product(factors), product(client[module]), atol=1e-10)


@BOTH_KINDS
def test_equal_clients_are_a_fixed_point(kind):
    strategy = kind(make_federation(4))
    client = random_adapter(0, 3)
    after = run(strategy, [client] * 4, [7, 1, 2, 5]).state
    for module, factors in after.adapter.items():
        np.testing.assert_allclose(product(factors), product(client[module]), atol=1e-10)


@BOTH_KINDS
def test_another_alpha_and_factors_of_the_same_products_change_nothing(kind):
    def other(adapter: AdapterState) -> AdapterState:
        return AdapterState({m: LoraFactors(f.A * 3, f.B / 2, f.scaling * 2 / 3) for m, f in adapter.items()})

    cohort = [random_adapter(k, rank) for k, rank in enumerate((1, 4, 2))]
    strategy = kind(make_federation(4))
    first = run(strategy, cohort, [1, 2, 3]).state.adapter
    second = run(strategy, [other(adapter) for adapter in cohort], [1, 2, 3]).state.adapter
    for module, factors in first.items():
        torch.testing.assert_close(factors.A, second[module].A, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factors.B, second[module].B, rtol=1e-9, atol=1e-9)


@BOTH_KINDS
def test_round_0_is_finite_and_keeps_the_initial_adapter(kind):
    strategy = kind(make_federation(4))
    state = start(4)
    aggregated = one_round(strategy, state, {0: ranks_of(4), 1: ranks_of(2)})
    assert aggregated.state.adapter.equal(state.adapter)
    assert aggregated.state.round_index == 1
    for module in TARGETS:
        assert aggregated.by_module[module]["spectrum/energy_kept_rank_2"] == 1.0
        assert aggregated.by_module[module]["spectrum/energy_beyond_smallest_rank"] == 0.0
        assert aggregated.by_module[module]["spectrum/effective_rank"] == 0.0
        assert aggregated.spectra[module] == (0.0,) * 4


@BOTH_KINDS
def test_rows_beyond_the_rank_of_the_mean_can_still_train(kind):
    """They are the initial ones: with A and B both zero, no gradient would ever reach them."""
    strategy = kind(make_federation(4))
    after = run(strategy, [random_adapter(0, 2, dtype=torch.float32)], [1]).state
    fresh = start(4).adapter
    for module, factors in after.adapter.items():
        assert not factors.B[:, 2:].any()
        assert torch.equal(factors.A[2:], fresh[module].A[2:])
        down, up = factors.A.clone().requires_grad_(), factors.B.clone().requires_grad_()
        x = torch.randn(5, down.shape[1])
        ((x @ down.T @ up.T) ** 2).sum().backward()
        assert bool((up.grad[:, 2:].abs().sum(dim=0) > 0).all())


@BOTH_KINDS
def test_ranks_may_differ_from_module_to_module(kind):
    low, high = dict(zip(MODULES, (1, 3), strict=True)), dict(zip(MODULES, (4, 2), strict=True))
    federation = make_federation(max_ranks=dict(zip(MODULES, (4, 3), strict=True)))
    strategy = kind(federation)
    cohort = [random_adapter(0, low), random_adapter(1, high)]
    aggregated = run(strategy, cohort, [1, 1])
    assert [f.rank for f in aggregated.state.adapter.values()] == [4, 3]
    received = strategy.download(aggregated.state, low)
    for module, rank in low.items():
        expected = best(mean_product(cohort, [1, 1], module), rank)
        np.testing.assert_allclose(product(received[module]), expected, atol=1e-9)


@BOTH_KINDS
def test_modules_are_aggregated_each_by_itself(kind):
    strategy = kind(make_federation(4))
    cohort = [random_adapter(0, 4), random_adapter(1, 2)]
    whole = run(strategy, cohort, [1, 3])
    reports = [make_report(k, n) for k, n in enumerate([1, 3])]
    for module in TARGETS:
        part = strategy.aggregate(start(4), reports, stream(cohort, [module]))
        assert list(part.state.adapter) == [module]
        assert torch.equal(part.state.adapter[module].B, whole.state.adapter[module].B)


def test_a_slice_of_a_is_a_view():
    strategy = FlexLora(make_federation(4))
    after = run(strategy, [random_adapter(0, 4)], [1]).state
    received = strategy.download(after, ranks_of(2))
    for module, factors in received.items():
        assert factors.A.data_ptr() == after.adapter[module].A.data_ptr()
    assert strategy.download(after, ranks_of(4)) is after.adapter


def test_the_best_rank_one_of_a_mean_of_clients_of_one_rank():
    """A cohort of one rank is not a special case."""
    cohort = [random_adapter(k, 1) for k in range(3)]
    strategy = FlexLora(make_federation(1))
    after = run(strategy, cohort, [1, 1, 1]).state
    for module, factors in after.adapter.items():
        expected = best(mean_product(cohort, [1, 1, 1], module), 1)
        np.testing.assert_allclose(product(factors), expected, atol=1e-10)


@BOTH_KINDS
def test_without_training_singular_value_j_decays_by_the_share_of_ranks_from_j(kind):
    strategy = kind(make_federation(4))
    state = run(strategy, [random_adapter(0, 4)], [1]).state
    before = {m: np.linalg.svd(product(f))[1][:4] for m, f in state.adapter.items()}
    ranks = {0: ranks_of(4), 1: ranks_of(2), 2: ranks_of(2), 3: ranks_of(1)}
    decay = np.array([1, 0.75, 0.25, 0.25])
    for repeat in (1, 2):
        state = one_round(strategy, state, ranks).state
        for module, factors in state.adapter.items():
            values = np.linalg.svd(product(factors))[1][:4]
            np.testing.assert_allclose(values, before[module] * decay**repeat, rtol=1e-9)


def test_each_tier_has_a_figure_whoever_is_drawn():
    """The smallest tier counts although the round has none of it, and each module's own rank of a tier."""
    wide, tall = ranks_of(4).keys()
    tiers = {0: {wide: 4, tall: 4}, 2: {wide: 1, tall: 3}}
    cohort = [random_adapter(0, 4), random_adapter(1, 4)]
    aggregated = run(FlexLora(make_federation(4, tier_ranks=tiers)), cohort, [1, 1])
    for module, figures in aggregated.by_module.items():
        squares = np.linalg.svd(mean_product(cohort, [1, 1], module))[1] ** 2
        kept = {tier: squares[: ranks[module]].sum() / squares.sum() for tier, ranks in tiers.items()}
        for tier, share in kept.items():
            assert figures[f"spectrum/energy_kept_tier_{tier}"] == pytest.approx(share, rel=1e-9)
        assert figures["spectrum/energy_beyond_smallest_rank"] == pytest.approx(1 - kept[2], rel=1e-9)


def test_figures_of_the_spectrum():
    cohort = [random_adapter(0, 4), random_adapter(1, 2), random_adapter(2, 2)]
    aggregated = run(FlexLora(make_federation(4)), cohort, [1, 1, 2])
    for module, figures in aggregated.by_module.items():
        squares = np.linalg.svd(mean_product(cohort, [1, 1, 2], module))[1] ** 2
        kept = {rank: squares[:rank].sum() / squares.sum() for rank in (2, 4)}
        shares = squares[:4] / squares[:4].sum()
        expected = {
            "spectrum/energy_kept_rank_2": kept[2],
            "spectrum/energy_kept_rank_4": kept[4],
            "spectrum/energy_beyond_smallest_rank": 1 - kept[2],
            "spectrum/effective_rank": np.exp(-np.sum(shares * np.log(shares))),
            "spectrum/total_rank": 8.0,
            "spectrum/energy": squares.sum(),
        }
        assert dict(figures) == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(aggregated.spectra[module], np.sqrt(squares[:4]), rtol=1e-9)


@BOTH_KINDS
def test_the_gap_to_averaged_factors_is_reported(kind):
    """FedIT's mean of factors is another model than FlexLoRA's mean of products, unless clients are equal."""
    counts = [10, 30, 5]
    cohort = [random_adapter(k, 3) for k in range(3)]
    told = run(kind(make_federation(4)), cohort, counts).by_module
    p = np.array(counts) / sum(counts)
    for module in TARGETS:
        mean = mean_product(cohort, counts, module)
        up = sum(
            w * client[module].scaling * client[module].B.numpy() for w, client in zip(p, cohort, strict=True)
        )
        down = sum(w * client[module].A.numpy() for w, client in zip(p, cohort, strict=True))
        gap = np.linalg.norm(mean - up @ down) / np.linalg.norm(mean)
        assert gap > 0.1
        assert told[module]["spectrum/gap_to_averaged_factors"] == pytest.approx(gap, rel=1e-9)
    equal = run(kind(make_federation(4)), [cohort[0]] * 3, counts).by_module
    assert all(figures["spectrum/gap_to_averaged_factors"] < 1e-6 for figures in equal.values())
    mixed = run(kind(make_federation(4)), [random_adapter(0, 3), random_adapter(1, 4)], [1, 1]).by_module
    assert all("spectrum/gap_to_averaged_factors" not in figures for figures in mixed.values())


class TestContrast:
    """The likely mistakes give another result."""

    def setup_method(self) -> None:
        self.cohort = [random_adapter(0, 4), random_adapter(1, 4)]
        after = run(FlexLora(make_federation(4)), self.cohort, [1, 3]).state
        self.result = {module: product(factors) for module, factors in after.adapter.items()}

    def differs(self, wrong: Mapping[str, np.ndarray]) -> bool:
        return all(
            np.linalg.norm(wrong[m] - self.result[m]) > 0.1 * np.linalg.norm(self.result[m]) for m in TARGETS
        )

    def test_averaged_factors(self):
        wrong = {}
        for module in TARGETS:
            first, second = (adapter[module] for adapter in self.cohort)
            A, B = 0.25 * first.A + 0.75 * second.A, 0.25 * first.B + 0.75 * second.B
            wrong[module] = product(LoraFactors(A, B, first.scaling))
        assert self.differs(wrong)

    def test_a_forgotten_scaling(self):
        plain = [
            AdapterState({m: LoraFactors(f.A, f.B, 1.0) for m, f in adapter.items()})
            for adapter in self.cohort
        ]
        assert self.differs({m: best(mean_product(plain, [1, 3], m), 4) for m in TARGETS})

    def test_the_root_of_the_singular_values_on_one_side_only(self):
        wrong = {}
        for module in TARGETS:
            U, S, Vh = np.linalg.svd(mean_product(self.cohort, [1, 3], module))
            wrong[module] = U[:, :4] * np.sqrt(S[:4]) @ Vh[:4]
        assert self.differs(wrong)

    def test_slices_whose_b_is_not_rescaled(self):
        """As where alpha / r of the server's rank and of the client's are taken for one."""
        strategy = FlexLora(make_federation(4))
        after = run(strategy, self.cohort, [1, 3]).state
        received = strategy.download(after, ranks_of(2))
        for module, factors in after.adapter.items():
            careless = LoraFactors(factors.A[:2], factors.B[:, :2], 16 / 2)
            np.testing.assert_allclose(product(careless), 2 * product(received[module]), atol=1e-9)
