"""FedAvg over factors: oracles, properties and the likely mistakes."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from fedsim.aggregation.averaging import average_factors, client_weights
from fedsim.aggregation.build import build_strategy
from fedsim.errors import AggregationError, ConfigError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport
from tests.cohorts import make_federation, make_report


def report(client_id: int, num_examples: int = 1, num_tokens: int = 1) -> ClientReport:
    return make_report(client_id, num_examples, num_tokens=num_tokens)


def random_factors(seed: int, rank: int = 2, in_features: int = 5, out_features: int = 4) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, in_features, generator=generator),
        torch.randn(out_features, rank, generator=generator),
        16 / rank,
    )


def one_round(cohort: list[AdapterState], counts: list[int], weighting: str = "examples") -> AdapterState:
    strategy = build_strategy("fedavg", make_federation(weighting=weighting))
    state = ServerState(0, cohort[0])
    reports = [report(client_id, count, 10 * count + client_id) for client_id, count in enumerate(counts)]
    factors = ((module, tuple(adapter[module] for adapter in cohort)) for module in cohort[0])
    after = strategy.aggregate(state, reports, factors).state
    assert after.round_index == 1
    return strategy.export(after)


def plain_loop(cohort: list[AdapterState], counts: list[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """FedAvg in numpy, written without fedsim."""
    total = float(sum(counts))
    result = {}
    for module in cohort[0]:
        a = np.zeros(cohort[0][module].A.shape)
        b = np.zeros(cohort[0][module].B.shape)
        for adapter, count in zip(cohort, counts, strict=True):
            a = a + (count / total) * adapter[module].A.numpy().astype(np.float64)
            b = b + (count / total) * adapter[module].B.numpy().astype(np.float64)
        result[module] = (a, b)
    return result


cohorts = st.tuples(
    st.integers(1, 6), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31 - 1)
)


def draw(shape: tuple[int, int, int, int, int]) -> tuple[list[AdapterState], list[int]]:
    num_clients, rank, in_features, out_features, seed = shape
    counts = np.random.default_rng(seed).integers(1, 100, num_clients).tolist()
    adapters = [
        AdapterState(
            {
                name: random_factors(seed + 7 * k + i, rank, in_features, out_features)
                for i, name in enumerate("xy")
            }
        )
        for k in range(num_clients)
    ]
    return adapters, counts


@given(cohorts)
@settings(max_examples=40, deadline=None)
def test_equals_a_plain_loop(shape):
    cohort, counts = draw(shape)
    result = one_round(cohort, counts)
    for module, (a, b) in plain_loop(cohort, counts).items():
        np.testing.assert_allclose(result[module].A, a, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(result[module].B, b, rtol=1e-6, atol=1e-6)
        assert result[module].scaling == cohort[0][module].scaling


@given(cohorts, st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_scaling_all_weights_changes_nothing(shape, factor):
    cohort, counts = draw(shape)
    result = one_round(cohort, [factor * count for count in counts])
    for module, (a, _) in plain_loop(cohort, counts).items():
        np.testing.assert_allclose(result[module].A, a, rtol=1e-6, atol=1e-6)


@given(cohorts)
@settings(max_examples=25, deadline=None)
def test_equal_updates_are_a_fixed_point(shape):
    cohort, counts = draw(shape)
    result = one_round([cohort[0]] * len(counts), counts)
    for module, factors in cohort[0].items():
        torch.testing.assert_close(result[module].A, factors.A, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result[module].B, factors.B, rtol=1e-6, atol=1e-7)


def test_one_client_is_taken_over_bit_for_bit():
    cohort, _ = draw((1, 3, 5, 4, 11))
    assert one_round(cohort, [17]).equal(cohort[0])


def test_contrast_unnormalised_weights_are_not_fedavg():
    cohort, _ = draw((3, 2, 5, 4, 1))
    counts = [10, 30, 5]
    result = one_round(cohort, counts)
    unnormalised = sum(count * adapter["x"].A for adapter, count in zip(cohort, counts, strict=True))
    assert not torch.allclose(result["x"].A, unnormalised, rtol=1e-3)
    plain_mean = sum(adapter["x"].A for adapter in cohort) / 3
    assert not torch.allclose(result["x"].A, plain_mean, rtol=1e-3)


def test_contrast_the_first_client_alone_is_not_fedavg():
    cohort, _ = draw((3, 2, 5, 4, 1))
    result = one_round(cohort, [1, 1, 1])
    assert not torch.allclose(result["x"].A, cohort[0]["x"].A / 3, rtol=1e-3)


def test_contrast_averaged_factors_are_not_the_averaged_product():
    cohort, counts = draw((3, 2, 5, 4, 1))
    product = sum(c / sum(counts) * a["x"].delta_weight() for a, c in zip(cohort, counts, strict=True))
    assert not torch.allclose(one_round(cohort, counts)["x"].delta_weight(), product, rtol=1e-2)


def test_equals_peft_where_all_but_one_factor_are_shared(tmp_path):
    """PEFT's `linear` combines products; with one shared B it must agree with averaging factors."""
    from peft import LoraConfig, get_peft_model

    from tests.helpers import tiny_opt

    weights = [0.2, 0.5, 0.3]
    model = get_peft_model(tiny_opt(), LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"]), "c0")
    for name in ("c1", "c2"):
        model.add_adapter(name, LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj"]))
    layer = model.base_model.model.model.decoder.layers[0].self_attn.q_proj
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(16, 2, generator=generator)
    cohort = []
    for name in ("c0", "c1", "c2"):
        down = torch.randn(2, 16, generator=generator)
        layer.lora_A[name].weight.data = down
        layer.lora_B[name].weight.data = up.clone()
        cohort.append(LoraFactors(down, up, 8.0))
    model.add_weighted_adapter(["c0", "c1", "c2"], weights, "merged", combination_type="cat")
    ours = average_factors(cohort, weights).delta_weight()
    torch.testing.assert_close(ours, layer.get_delta_weight("merged"), rtol=1e-5, atol=1e-5)


def test_client_weights_by_examples_tokens_and_uniform():
    reports = [report(0, 1, 30), report(1, 3, 10)]
    assert client_weights(reports, "examples") == (0.25, 0.75)
    assert client_weights(reports, "tokens") == (0.75, 0.25)
    assert client_weights(reports, "uniform") == (0.5, 0.5)
    with pytest.raises(AggregationError, match="positive sum"):
        client_weights([report(0, 0)], "examples")


def test_different_ranks_or_scalings_are_refused():
    with pytest.raises(AggregationError, match=r"one LoRA rank.*\[2, 3\]"):
        average_factors([random_factors(0), random_factors(1, rank=3)], [0.5, 0.5])
    other = LoraFactors(random_factors(1).A, random_factors(1).B, 1.0)
    with pytest.raises(AggregationError, match="one LoRA rank and scaling"):
        average_factors([random_factors(0), other], [0.5, 0.5])


def test_aggregation_does_not_write_into_its_arguments():
    cohort, counts = draw((3, 2, 5, 4, 1))
    before = [adapter.map(torch.clone) for adapter in cohort]
    one_round(cohort, counts)
    assert all(mine.equal(copy) for mine, copy in zip(cohort, before, strict=True))


def test_golden_vectors_of_published_code(shared):
    """The weighted mean that OpenFedLLM's and Flower's code gave for one input."""
    facts = json.loads((shared / "golden" / "aggregation.json").read_text())
    golden = np.load(shared / "golden" / "aggregation.npz")
    cohort = [LoraFactors(torch.from_numpy(a), torch.zeros(3, 1), 1.0) for a in golden["fedavg/in"]]
    weights = client_weights([report(k, n) for k, n in enumerate(facts["num_samples"])], "examples")
    np.testing.assert_allclose(average_factors(cohort, weights).A, golden["fedavg/out"], rtol=0, atol=1e-7)


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.name must be one of fedavg, local, centralized"):
        build_strategy("fedmagic", "examples")
