"""Packs of instruction data: only the tokens of the answers are learned, scored and counted."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.evaluation.scorers import PackedScorer, PaddedScorer
from fedsim.models.adapted import AdaptedModel
from fedsim.models.packing import pack_tokens
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from tests.helpers import make_answer_store
from tests.training.test_packed import (
    CPU,
    DIFFERENT,
    FAMILIES,
    PAD,
    assert_same,
    clients,
    starts_for,
    train_packed,
    train_sequential,
)

DOUBLE = torch.float64


@pytest.fixture(scope="module")
def store() -> Any:
    return make_answer_store(40, seed=1)


def test_answers_begin_at_many_places(store):
    """What the other tests of this file rest on; an empty prompt is one token, after which all is learned."""
    assert store.label_start.min() == 1
    assert np.unique(store.label_start).size >= 8
    assert (store.label_start == store.answers.answer_start).all()


@given(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_labels_of_a_pack_are_its_answers(parts):
    store = make_answer_store(40, seed=1)
    packed = pack_tokens(store, [np.asarray(part) for part in parts], CPU)
    rows, targets, owners, sequences = [], [], [], []
    first, sequence = 0, 0
    for owner, part in enumerate(parts):
        for example in part:
            tokens, answer = store.sequence(example).tolist(), int(store.answers.answer_start[example])
            rows += range(first + answer - 1, first + len(tokens) - 1)
            targets += tokens[answer:]
            owners += [owner] * (len(tokens) - answer)
            sequences += [sequence] * (len(tokens) - answer)
            first, sequence = first + len(tokens), sequence + 1
    assert packed.label_rows.tolist() == rows
    assert packed.label_targets.tolist() == targets
    assert packed.owner_of_label.tolist() == owners
    assert packed.sequence_of_label.tolist() == sequences


@pytest.mark.parametrize("max_tokens", [10_000, 40])
@pytest.mark.parametrize("family", ["opt-all", "llama", "gpt-neox"])
def test_each_client_ends_where_it_would_alone(family, max_tokens, store):
    build, target_modules = FAMILIES[family]
    starts = starts_for(build(DOUBLE), target_modules, DOUBLE)
    jobs = clients(store, tuple(replace(one, lora_dropout=0.2) for one in DIFFERENT))
    alone = train_sequential(build(DOUBLE), target_modules, jobs, starts, store)
    packed = train_packed(build(DOUBLE), target_modules, jobs, starts, store, max_tokens=max_tokens)
    assert_same(packed, alone, 1e-9)


def test_only_tokens_of_answers_are_counted(store):
    """By both trainers, and as many labels in the packed row."""
    build, target_modules = FAMILIES["opt-qv"]
    starts = starts_for(build(torch.float32), target_modules, torch.float32)
    jobs = clients(store)
    answer_tokens = store.num_tokens - store.answers.answer_start
    for train in (train_packed, train_sequential):
        updates = train(build(torch.float32), target_modules, jobs, starts, store)
        for job, update in zip(jobs, updates, strict=True):
            seen = np.concatenate([batch for step in job.batches(round_index=1) for batch in step])
            assert (
                update.report.trained_tokens
                == int(answer_tokens[seen].sum())
                < int(store.num_tokens[seen].sum())
            )
    for job in jobs:
        assert len(pack_tokens(store, [job.examples], CPU).label_rows) == int(
            answer_tokens[job.examples].sum()
        )


@pytest.mark.parametrize("family", ["opt-all", "llama"])
def test_scorers_agree(family, store):
    build, target_modules = FAMILIES[family]
    adapters = starts_for(build(DOUBLE), target_modules, DOUBLE)[:3]
    parts = [np.asarray([3, 1, 2]), np.asarray([3]), np.asarray([7, 30, 7, 12])]
    targets = find_targets(build(DOUBLE), target_modules)
    expected = PaddedScorer(AdaptedModel(build(DOUBLE), targets, CPU), PAD).losses(adapters, store, parts)
    packed = PackedScorer(StackedModel(build(DOUBLE), targets, CPU)).losses(adapters, store, parts)
    for mine, theirs in zip(packed, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10)
