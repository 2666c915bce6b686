"""Rouge-L and exact match of texts, and their means."""

import json
import random
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fedsim.errors import DataError
from fedsim.evaluation.rouge import (
    AnswerScorer,
    answer_metrics,
    group_means,
    mean,
    merge_scores,
    normalized,
    weighted_mean,
)

SCORER = AnswerScorer()


def scores_of(predictions, references):
    return SCORER.scores(np.arange(len(predictions)), predictions, references)


def test_golden_cases(shared):
    golden = json.loads((shared / "golden" / "rouge.json").read_text(encoding="utf-8"))
    cases = golden["cases"]
    assert len(cases) == 178
    scores = scores_of([case["prediction"] for case in cases], [case["references"] for case in cases])
    np.testing.assert_array_equal(scores.rouge_l, [case["rougeL_plain"] for case in cases])
    np.testing.assert_array_equal(scores.rouge_l_stemmed, [case["rougeL_stem"] for case in cases])
    np.testing.assert_array_equal(scores.exact_match, [case["exact_match"] for case in cases])
    assert round(100 * mean(scores.rouge_l_stemmed), 4) == golden["metrics"]["rougeL"]
    assert round(100 * mean(scores.exact_match), 4) == golden["metrics"]["exact_match"]
    assert mean(scores.rouge_l) < mean(scores.rouge_l_stemmed), "the variants are not comparable"


def rouge_l_by_hand(prediction: str, reference: str) -> float:
    """The F-measure of the longest common subsequence, written independently."""
    mine, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    lengths = [[0] * (len(theirs) + 1) for _ in range(len(mine) + 1)]
    for i, word in enumerate(mine):
        for j, other in enumerate(theirs):
            longer = max(lengths[i][j + 1], lengths[i + 1][j])
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if word == other else longer
    common = lengths[-1][-1]
    if common == 0:
        return 0.0
    precision, recall = common / len(mine), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


texts = st.lists(st.sampled_from(["a", "The", "cat", "cats", "sat,", "2", "!", "\u732b"]), max_size=8).map(
    " ".join
)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_without_stemmer_it_is_the_longest_common_subsequence(prediction, references):
    scores = scores_of([prediction], [references])
    best = max(rouge_l_by_hand(prediction, reference) for reference in references)
    assert scores.rouge_l[0] == pytest.approx(best, abs=1e-12)
    assert bool(scores.without_tokens[0]) == (not re.search("[a-z0-9]", " ".join(references).lower()))
    if scores.without_tokens[0]:
        assert scores.rouge_l[0] == scores.rouge_l_stemmed[0] == 0.0


def test_stemmer_and_best_reference():
    scores = scores_of(["playing games"], [["nothing", "played game"]])
    assert scores.rouge_l[0] == 0.0
    assert scores.rouge_l_stemmed[0] == 1.0
    assert scores.exact_match[0] == 0.0


def test_texts_in_other_scripts_score_nothing_and_are_counted():
    scores = scores_of(["\u732b", "cat", "."], [["\u732b"], ["cat"], ["."]])
    assert scores.rouge_l.tolist() == [0.0, 1.0, 0.0]
    assert scores.exact_match.tolist() == [1.0, 1.0, 1.0], "exact match does not look at tokens"
    metrics = answer_metrics(scores, [0, 0, 0])
    assert metrics["test/num_without_rouge_tokens"] == 2.0
    over_the_others = metrics["test/rougeL"] * 3 / (3 - metrics["test/num_without_rouge_tokens"])
    assert over_the_others == 1.0


def test_normalised_as_natural_instructions_does():
    assert normalized("  The  Cat's\n hat!! ") == "the cats hat"
    assert normalized("The cat") != normalized("cat"), "articles stay, unlike in SQuAD"


def test_an_answer_without_reference_is_refused():
    with pytest.raises(DataError, match="example 7 has none"):
        SCORER.scores(np.array([3, 7]), ["a", "b"], [["a"], []])


def test_what_is_reported_is_the_plain_mean_and_no_bootstrap():
    from rouge_score.scoring import BootstrapAggregator, Score

    predictions = ["a b", "a c", "x", "a", "b b b"] * 4
    scores = scores_of(predictions, [["a b c"]] * len(predictions))
    expected = sum(rouge_l_by_hand(text, "a b c") for text in predictions) / len(predictions)
    assert answer_metrics(scores, list(range(20)))["test/rougeL"] == pytest.approx(expected, abs=1e-15)

    def bootstrapped(seed):
        np.random.seed(seed)  # the aggregator draws from numpy's global generator
        aggregator = BootstrapAggregator(n_samples=1000)
        for value in scores.rouge_l.tolist():
            aggregator.add_scores({"rougeL": Score(value, value, value)})
        return aggregator.aggregate()["rougeL"].mid.fmeasure

    before = np.random.get_state()
    try:
        drawn = {bootstrapped(seed) for seed in range(3)}
    finally:
        np.random.set_state(before)
    assert len(drawn) > 1, "the published mean depends on the state of a global generator"


def test_means_over_examples_clients_and_weights():
    scores = scores_of(["a", "a", "b", "b"], [["a"], ["b"], ["b"], ["b"]])
    assert scores.rouge_l.tolist() == [1.0, 0.0, 1.0, 1.0]
    clients = ["small", "small", "small", "large"]
    by_client = group_means(scores.rouge_l, clients)
    assert by_client == {"small": pytest.approx(2 / 3), "large": 1.0}
    metrics = answer_metrics(scores, clients, "_tf")
    assert metrics["test/rougeL_tf"] == 0.75
    assert metrics["test/rougeL_tf_by_client"] == pytest.approx((2 / 3 + 1) / 2)
    weights = {"small": 1, "large": 3, "elsewhere": 100}
    assert weighted_mean(by_client, weights) == pytest.approx((2 / 3 + 3) / 4)
    assert set(metrics) == {
        "test/num_without_rouge_tokens_tf",
        *(
            f"test/{name}_tf{kind}"
            for name in ("rougeL", "rougeL_stem", "exact_match")
            for kind in ("", "_by_client")
        ),
    }
    with pytest.raises(DataError, match="positive weight"):
        weighted_mean({"small": 0.5}, {"small": 0})


def test_scores_of_any_share_of_batches_join_exactly():
    words = random.Random(0).choices(["a", "b", "c d", "\u732b"], k=40)
    references = [["a b"], ["c"]] * 20
    whole = scores_of(words, references)
    order = np.random.default_rng(0).permutation(40)
    parts = {
        index: SCORER.scores(chosen, [words[i] for i in chosen], [references[i] for i in chosen])
        for index, chosen in enumerate(np.array_split(order, 7))
    }
    joined = merge_scores(dict(reversed(parts.items())))
    assert joined.predictions == tuple(words)
    sent = merge_scores({index: part.without_predictions() for index, part in parts.items()})
    assert (len(sent), sent.predictions) == (40, ())
    for name in ("examples", "rouge_l", "rouge_l_stemmed", "exact_match", "without_tokens"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert answer_metrics(joined, [0] * 40) == answer_metrics(whole, [0] * 40)
    with pytest.raises(DataError, match="at least one example"):
        merge_scores({})
