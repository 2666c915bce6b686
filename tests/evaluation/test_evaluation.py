"""Fairness, loss sums and scorers."""

import statistics

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from fedsim.errors import DataError
from fedsim.evaluation.clients import CommonTest, NoTest, OwnSplitTest
from fedsim.evaluation.fairness import fairness_metrics, population_variance, worst_share_mean
from fedsim.evaluation.losses import LossEvaluator, LossSums, measure_together, merge, merge_batches
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.models.adapted import AdaptedModel
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from tests.helpers import make_store, random_texts, tiny_opt

losses = st.lists(st.floats(0, 20), min_size=1, max_size=50)
CPU = torch.device("cpu")


@given(losses)
def test_fairness_is_the_population_variance(values):
    assert population_variance(values) == pytest.approx(statistics.pvariance(values), rel=1e-9, abs=1e-12)


def test_contrast_the_sample_variance_is_another_figure():
    values = [1.0, 2.0, 4.0]
    assert population_variance(values) != pytest.approx(statistics.variance(values))
    assert population_variance([3.0]) == 0.0


def test_worst_tenth():
    values = [float(value) for value in range(20)]
    assert worst_share_mean(values) == 18.5
    assert worst_share_mean([1.0, 5.0, 2.0]) == 5.0, "at least one client"
    assert worst_share_mean([float(value) for value in range(11)]) == 9.5, "1.1 clients are two"
    metrics = fairness_metrics([1.0, 3.0], "_before")
    assert metrics == {
        "fairness/test_loss_mean_before": 2.0,
        "fairness/test_loss_variance_before": 1.0,
        "fairness/test_loss_max_before": 3.0,
        "fairness/test_loss_worst_10pct_before": 3.0,
    }


def sums(loss: list[float], tokens: list[int]) -> LossSums:
    return LossSums(np.array(loss), np.array(tokens))


def test_sums_merge_by_tokens_and_in_batch_order():
    merged = merge_batches({1: sums([6.0, 0.0], [3, 0]), 0: sums([1.0, 0.0], [1, 0])})
    assert merged.mean == 7.0 / 4
    assert merged.perplexity == pytest.approx(np.exp(7.0 / 4))
    assert merged.class_means() == [7.0 / 4, None]
    assert sums([1e6], [1]).perplexity == np.inf
    with pytest.raises(DataError, match="at least one example"):
        merge([])


def scorers_with_adapter():
    base = tiny_opt(torch.float64)
    targets = find_targets(base, ["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(0)
    adapter = AdapterState(
        {
            module: LoraFactors(
                torch.randn(3, i, generator=generator, dtype=torch.float64),
                torch.randn(o, 3, generator=generator, dtype=torch.float64),
                2.0,
            )
            for module, (i, o) in targets.items()
        }
    )
    padded = PaddedScorer(AdaptedModel(tiny_opt(torch.float64), targets, CPU), pad_id=1)
    return padded, PackedScorer(StackedModel(base, targets, CPU)), adapter


def other(adapter: AdapterState, factor: float) -> AdapterState:
    return adapter.map(lambda values: factor * values)


def test_packed_and_padded_scorers_agree_example_by_example():
    store = make_store(random_texts(30, seed=4))
    padded, packed, adapter = scorers_with_adapter()
    examples = np.array([4, 29, 0, 7, 7, 12])
    [expected] = padded.losses([adapter], store, [examples])
    np.testing.assert_allclose(packed.losses([adapter], store, [examples])[0], expected, rtol=1e-12)
    alone = [float(packed.losses([adapter], store, [np.array([example])])[0][0]) for example in examples]
    np.testing.assert_allclose(alone, expected, rtol=1e-12)


def test_several_adapters_are_measured_together():
    store = make_store(random_texts(30, seed=4))
    padded, packed, adapter = scorers_with_adapter()
    adapters = [adapter, other(adapter, 0.5), other(adapter, 2.0)]
    parts = [np.array([4, 29, 0]), np.array([4]), np.array([3, 4, 5, 6])]
    expected = padded.losses(adapters, store, parts)
    for mine, theirs in zip(packed.losses(adapters, store, parts), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    assert expected[0][0] != expected[1][0], "the same example under two adapters"
    classes = np.zeros(30, dtype=np.int64)
    tests = [LossEvaluator(packed, store, classes, 1, part, batch_tokens=30) for part in parts]
    together = measure_together(adapters, tests)
    for sums_together, test, own in zip(together, tests, adapters, strict=True):
        assert sums_together.mean == pytest.approx(merge_batches(test.measure(own)).mean, rel=1e-12)


def test_any_share_of_the_batches_gives_the_same_figure():
    store = make_store(random_texts(30, seed=4))
    _, packed, adapter = scorers_with_adapter()
    classes = np.arange(30) % 4
    test = LossEvaluator(packed, store, classes, 4, np.arange(30), batch_tokens=50)
    assert len(test.batches) > 4
    whole = merge_batches(test.measure(adapter))
    parts = {}
    for rank in range(3):
        parts |= test.measure(adapter, range(rank, len(test.batches), 3))
    assert merge_batches(parts).mean == whole.mean
    assert int(whole.tokens.sum()) == int(store.num_label_tokens.sum())
    by_class = [int(store.num_label_tokens[classes == index].sum()) for index in range(4)]
    assert whole.tokens.tolist() == by_class


def test_client_tests():
    store = make_store(random_texts(30, seed=4))
    _, packed, adapter = scorers_with_adapter()
    classes = np.zeros(30, dtype=np.int64)
    measured = []

    def own(client_id):
        measured.append(client_id)
        if client_id == 9:
            return None
        return LossEvaluator(packed, store, classes, 1, np.array([client_id]), batch_tokens=50)

    common = CommonTest(LossEvaluator(packed, store, classes, 1, np.arange(30), batch_tokens=50))
    assert len(set(common.losses([adapter] * 3, [3, 4, 5]))) == 1
    three = common.losses([adapter, other(adapter, 0.5), other(adapter, 2.0)], [3, 4, 5])
    assert len(set(three)) == 3
    assert three[0] == pytest.approx(common.losses([adapter], [3])[0], rel=1e-12)
    test = OwnSplitTest(own)
    first, nothing, second = test.losses([adapter] * 3, [3, 9, 4])
    assert nothing is None
    assert first != second
    assert measured == [3, 9, 4]
    assert test.losses([adapter], [9]) == [None]
    assert NoTest().losses([adapter] * 2, [3, 4]) == [None, None]
