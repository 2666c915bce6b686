"""When a run stops before its last round: the rule by itself, validation, and what checkpoints keep."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.comm.exchange import broadcast_state
from fedsim.comm.group import Group, SoloGroup
from fedsim.config.loader import load_config
from fedsim.data.partition import Partition
from fedsim.errors import CheckpointError, ConfigError, PeerError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.state import BestSoFar, ServerState
from fedsim.server.build_tests import build_stopping_rule, build_validation
from fedsim.server.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    saved_best,
)
from fedsim.server.early_stopping import StoppingRule, stopping_figures, why_stopped
from fedsim.server.round import run_round
from fedsim.server.turnout import Participation
from fedsim.server.validation import Validation
from tests.helpers import run_ranks
from tests.server.test_round import NUM_CLIENTS, make_data, make_run, start_state

LOSS = StoppingRule("test/loss", larger_is_better=False, before_training=False, patience=3)
ROUGE = StoppingRule("validation/rougeL", larger_is_better=True, before_training=True, patience=3)
ADAPTER = AdapterState({"x": LoraFactors(torch.ones(1, 2), torch.zeros(2, 1), 2.0)})


def rounds_until_stop(rule: StoppingRule, scores: list[float | None]) -> tuple[int | None, BestSoFar | None]:
    """Rounds after which the rule stops, None if it does not, and the best by then."""
    best = None
    for round_index, score in enumerate(scores):
        best = rule.updated(best, {} if score is None else {rule.figure: score}, round_index)
        if rule.stops(best):
            return round_index + 1, best
    return None, best


def published_stop(scores: list[float], patience: int) -> int | None:
    """Rounds after which the code of arXiv 2402.11505 stops: counter > patience, against the best so far."""
    best, counter = 0.0, 0
    for rounds, score in enumerate(scores, start=1):
        best, counter = (score, 0) if best < score else (best, counter + 1)
        if counter > patience:
            return rounds
    return None


def test_it_stops_at_the_fourth_evaluation_without_improvement():
    scores = [0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert rounds_until_stop(ROUGE, scores)[0] == 6, "contrast: at the third, after 5 rounds"
    assert rounds_until_stop(replace(ROUGE, patience=0), scores)[0] == 3
    assert rounds_until_stop(ROUGE, scores[:5])[0] is None


@pytest.mark.parametrize("seed", range(20))
def test_it_stops_where_the_published_code_does(seed):
    scores = np.random.default_rng(seed).uniform(0.1, 0.2, 40).round(2).tolist()
    for patience in (0, 1, 3):
        stopped, best = rounds_until_stop(replace(ROUGE, patience=patience), scores)
        assert stopped == published_stop(scores, patience)
        assert stopped is not None
        assert best.score == max(scores[:stopped])
        assert best.rounds == scores.index(best.score), "validation is of the model with which a round begins"


def test_losses_must_fall_and_are_of_the_model_after_the_round():
    scores = [3.0, 2.0, 2.5, 2.4, 2.0, 2.1]
    stopped, best = rounds_until_stop(LOSS, scores)
    assert stopped == 6
    assert best == BestSoFar(2.0, 2, 4)
    assert rounds_until_stop(replace(LOSS, larger_is_better=True), scores)[1].score == 3.0


def test_an_improvement_must_exceed_min_delta():
    rule = replace(LOSS, min_delta=0.5, patience=1)
    assert rounds_until_stop(rule, [3.0, 2.5, 2.4, 1.8])[0] is None, (
        "against the best that counted, not the last"
    )
    assert rounds_until_stop(rule, [3.0, 2.75, 2.5])[0] == 3


def test_rounds_without_an_evaluation_do_not_count():
    assert rounds_until_stop(LOSS, [2.0, None, None, None, None, 2.1, None, 2.2, 2.3])[0] is None
    assert rounds_until_stop(LOSS, [None, None])[1] is None


def test_scores_that_are_not_finite_are_never_the_best():
    stopped, best = rounds_until_stop(LOSS, [math.nan, 2.0, math.nan, math.inf, math.nan, -math.inf])
    assert (stopped, best) == (6, BestSoFar(2.0, 2, 4))


def test_evaluations_before_its_first_round_do_not_count():
    scores = [1.0, 2.0, 3.0, 3.0, 3.0]
    assert rounds_until_stop(replace(LOSS, patience=1), scores)[0] == 3
    stopped, best = rounds_until_stop(replace(LOSS, patience=1, from_round=2), scores)
    assert (stopped, best) == (5, BestSoFar(3.0, 3, 2))


def test_what_the_record_says():
    state = ServerState(9, ADAPTER, best=BestSoFar(1.5, 5, 4))
    assert stopping_figures(state.best) == {
        "early_stopping/best": 1.5,
        "early_stopping/best_after_rounds": 5,
        "early_stopping/evaluations_since": 4,
    }
    assert stopping_figures(None) == {}
    assert why_stopped(LOSS, state, 50) == (
        "stopped early after 9 of 50 rounds: 4 evaluations in a row did not improve test/loss, which was best after 5 "
        "rounds (1.5)"
    )
    assert why_stopped(LOSS, state, 9) is None
    assert why_stopped(replace(LOSS, patience=4), state, 50) is None


class Lookup:
    """A test whose scores are known: batches of three examples."""

    def __init__(self, table, counts, examples):
        positions = np.arange(len(examples))
        self.batches = [positions[start : start + 3] for start in range(0, len(examples), 3)]
        self.counts = counts[examples]
        self._scores = table[examples]

    def measure(self, adapter, chosen):
        return {index: self._scores[self.batches[index]] for index in chosen}


HELD = {0: [1, 4, 9], 1: [2], 2: [], 3: [4, 5, 6, 7, 8], 4: [0]}
SIZES = np.array([10, 20, 30, 40, 50])


def validated(group: Group, cohort: list[int]) -> dict[str, float]:
    generator = np.random.default_rng(3)
    table, counts = generator.uniform(size=10), generator.integers(1, 9, 10).astype(float)
    validation = Validation(
        "loss",
        lambda client_id: np.array(HELD[client_id], dtype=np.int64),
        SIZES,
        lambda examples: Lookup(table, counts, examples),
    )
    return validation.measure(group, ADAPTER, cohort, "validation")


def test_the_score_is_the_mean_over_clients_weighted_by_their_training_examples():
    generator = np.random.default_rng(3)
    table, counts = generator.uniform(size=10), generator.integers(1, 9, 10).astype(float)
    cohort = [0, 1, 2, 3]  # client 2 holds nothing; 0 and 3 both hold example 4
    own = {k: np.average(table[HELD[k]], weights=counts[HELD[k]]) for k in (0, 1, 3)}
    figures = validated(SoloGroup(), cohort)
    assert figures["validation/loss"] == pytest.approx((10 * own[0] + 20 * own[1] + 40 * own[3]) / 70)
    assert figures["validation/loss_by_client"] == pytest.approx(sum(own.values()) / 3)
    assert (figures["validation/num_clients"], figures["validation/num_examples"]) == (3, 8)
    pooled = np.average(np.concatenate([table[HELD[k]] for k in own]))
    assert figures["validation/loss"] != pytest.approx(pooled), "contrast: examples pooled over clients"
    assert validated(SoloGroup(), [2]) == {}
    assert validated(SoloGroup(), []) == {}


def test_validation_is_on_the_clients_that_report_back():
    table, counts, sizes = np.arange(NUM_CLIENTS) ** 2.0, np.ones(NUM_CLIENTS), np.array([10, 20, 30, 40, 50])
    validation = Validation(
        "loss",
        lambda client_id: np.array([client_id], dtype=np.int64),
        sizes,
        lambda examples: Lookup(table, counts, examples),
    )
    run = replace(
        make_run(SoloGroup(), size=4), validation=validation, participation=Participation(dropout=0.5)
    )
    _, report = run_round(start_state(), run)
    reporting = [client.client_id for client in report.clients]

    assert 0 < len(reporting) < report.turnout.num_drawn == 4
    assert report.figures["validation/num_clients"] == len(reporting)
    expected = np.average(table[reporting], weights=sizes[reporting])
    assert report.figures["validation/loss"] == pytest.approx(expected)


def own_parts(limit: int | None) -> tuple[Partition, Validation]:
    """Clients with one example to train on, one to test and four for evaluation, and the validation on the last."""
    data = make_data()
    parts = np.arange(30).reshape(NUM_CLIENTS, 6)
    ones, fours = np.arange(NUM_CLIENTS + 1), np.arange(0, 4 * NUM_CLIENTS + 1, 4)
    partition = replace(
        data.partition,
        train_indices=parts[:, 0], train_offsets=ones,
        test_indices=parts[:, 1], test_offsets=ones,
        eval_indices=parts[:, 2:].ravel(), eval_offsets=fours,
    )  # fmt: skip
    limited = [] if limit is None else [f"evaluation.max_client_test_examples={limit}"]
    config = load_config(None, ["early_stopping.metric=validation_loss", *limited])
    # what measures is of no consequence to which examples are measured
    nothing: Any = None
    validation = build_validation(config, nothing, nothing, nothing, replace(data, partition=partition))
    assert validation is not None
    return partition, validation


def test_validation_is_on_what_the_corpus_keeps_for_it():
    partition, validation = own_parts(None)
    for client_id in range(NUM_CLIENTS):
        examples = validation.examples_of(client_id).tolist()
        assert (
            examples
            == partition.evaluation(client_id).tolist()
            == list(range(6 * client_id + 2, 6 * client_id + 6))
        )


def test_each_client_draws_the_examples_of_its_own_that_are_measured():
    _, validation = own_parts(2)
    drawn = [validation.examples_of(client_id) - 6 * client_id for client_id in range(NUM_CLIENTS)]
    assert all(len(places) == 2 and set(places.tolist()) < {2, 3, 4, 5} for places in drawn)
    assert len({tuple(places.tolist()) for places in drawn}) > 1


def told_best(group: Group) -> BestSoFar | None:
    state = ServerState(4, ADAPTER, best=BestSoFar(0.25, 3, 1)) if group.rank == 0 else None
    return broadcast_state(group, None, state).best


def on_ranks(group: Group) -> tuple[dict[str, float], BestSoFar | None]:
    return validated(group, [0, 1, 3, 4]), told_best(group)


def test_any_number_of_processes_gives_the_same_bits(tmp_path):
    alone = on_ranks(SoloGroup())
    assert alone[1] == BestSoFar(0.25, 3, 1)
    for result in run_ranks(on_ranks, 5, tmp_path):  # more than there are batches
        assert result == alone


def save(rounds: int, best: BestSoFar | None, folder: Path, keep_last: int = 2) -> None:
    save_checkpoint(ServerState(rounds, ADAPTER, best=best), folder, keep_last)


def test_the_best_checkpoint_is_kept_besides_the_newest(tmp_path):
    best = BestSoFar(0.1 + 0.2, 1, 0)
    save(1, best, tmp_path)
    for rounds in range(2, 6):
        save(rounds, replace(best, waited=rounds - 1), tmp_path)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["round_000001", "round_000004", "round_000005"]
    assert load_newest_checkpoint(tmp_path).best == BestSoFar(0.1 + 0.2, 1, 4)
    assert load_checkpoint(tmp_path, 1).round_index == 1
    save(6, BestSoFar(0.1, 6, 0), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "round_000001",
        "round_000005",
        "round_000006",
    ], "the one before the newest, to which a run goes back if that is damaged, still needs it"
    save(7, BestSoFar(0.1, 6, 1), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["round_000006", "round_000007"]


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="round_000003 must be readable, since it holds the best state so far"
    ):
        load_checkpoint(tmp_path, 3)
    save(3, None, tmp_path)
    assert saved_best(tmp_path / "round_000003") is None
    (tmp_path / "round_000003" / "state.json").write_text("[]")
    assert saved_best(tmp_path / "round_000003") is None


@pytest.mark.parametrize(
    ("metric", "answers", "figure", "larger"),
    [
        ("test_loss", "generated", "test/loss", False),
        ("validation_loss", "off", "validation/loss", False),
        ("test_rouge_l", "teacher_forced", "test/rougeL_tf", True),
        ("validation_rouge_l", "generated", "validation/rougeL", True),
    ],
)
def test_from_the_configuration(metric, answers, figure, larger):
    data = ["data.source=a", "data.instruction.format=flexlora", "data.partition.name=natural"]
    config = load_config(
        None, [*data, f"early_stopping.metric={metric}", f"evaluation.answers.metric={answers}"]
    )
    rule = build_stopping_rule(config)
    assert rule == StoppingRule(figure, larger, metric.startswith("validation"), 3)
    assert build_stopping_rule(load_config(None, [])) is None


PLAIN_OWN = "data.client_test_fraction=0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["early_stopping.patience=5"],
            "early_stopping.patience must stay at its default 3 when early_stopping.me",
        ),
        (
            ["early_stopping.export=last"],
            "early_stopping.export must stay at its default 'best' when early_sto",
        ),
        (
            ["early_stopping.metric=validation_rouge_l"],
            "evaluation.answers.metric must not be off when early_stopping.metric is validation_rouge_l",
        ),
        (
            ["early_stopping.metric=validation_loss", PLAIN_OWN],
            "data.client_test_fraction must be > 0 when early_stopping.metric is validation_loss, got 0",
        ),
        (
            ["early_stopping.metric=test_loss", "early_stopping.from_round=8"],
            "early_stopping.from_round must be below run.rounds=8, got 8",
        ),
        (
            ["early_stopping.metric=test_loss", "strategy.name=slora"],
            "early_stopping.from_round must be at least strategy.slora.rounds=5 with strategy.name=slora",
        ),
        (
            [
                "early_stopping.metric=validation_loss",
                "strategy.name=ffa",
                "cohort.sampling=poisson",
                "aggregation.client_weights=uniform",
                "aggregation.privacy.clip_norm=0.5",
            ],
            "the privacy accountant does not count what validation tells about clients",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value)


def fails_on_one_rank(group: Group) -> str:
    def prepare(examples):
        if group.rank == 1:
            raise ConfigError("does not fit")
        return Lookup(np.zeros(10), np.ones(10), examples)

    held = Validation("loss", lambda _: np.arange(10), SIZES, prepare)
    with pytest.raises(PeerError) as caught:
        held.measure(group, ADAPTER, [0], "validation")
    return str(caught.value)


def test_ranks_fail_together(tmp_path):
    for message in run_ranks(fails_on_one_rank, 2, tmp_path):
        assert "validation failed on 1 of 2 ranks; rank 1: ConfigError: does not fit" in message
