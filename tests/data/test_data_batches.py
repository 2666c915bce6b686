import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.batches import collate, length_batches, local_batches
from fedsim.data.tokens import TokenStore
from tests.helpers import make_store, random_texts

PAD = 1


@pytest.fixture(scope="module")
def store() -> TokenStore:
    return make_store(random_texts(40), max_tokens=15)


def order_of(steps: list[list[np.ndarray]]) -> list[int]:
    return [position for step in steps for batch in step for position in batch.tolist()]


def plan(num_examples: int, **changes: int | None) -> list[list[np.ndarray]]:
    settings = {
        "batch_size": 4,
        "local_epochs": 1,
        "local_steps": None,
        "accumulation": 1,
        "seed": 0,
        "round_index": 0,
        "client_id": 0,
    }
    return local_batches(num_examples, **{**settings, **changes})


def test_a_batch_holds_each_sequence_and_its_shifted_labels(store: TokenStore) -> None:
    """Oracle: one sequence after another, in plain Python."""
    indices = [7, 3, 3, 30, 0]
    batch = collate(store, indices, PAD)
    longest = max(len(store.sequence(index)) for index in indices)
    num_targets = 0
    for row, index in enumerate(indices):
        tokens = store.sequence(index).tolist()
        padding = longest - len(tokens)
        assert batch.input_ids[row].tolist() == tokens + [PAD] * padding
        assert batch.attention_mask[row].tolist() == [1] * len(tokens) + [0] * padding
        assert batch.targets[row].tolist() == tokens[1:] + [-100] * (padding + 1)
        num_targets += len(tokens) - 1

    assert batch.num_targets == num_targets == int((batch.targets != -100).sum())
    assert batch.num_tokens == sum(len(store.sequence(index)) for index in indices)
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.targets.dtype} == {torch.int64}


def test_a_pad_token_inside_a_text_is_still_a_label(store: TokenStore) -> None:
    """Contrast: masking labels by the pad id, as common collators do, loses real tokens."""
    pad_id = int(store.sequence(0)[1])
    batch = collate(store, [0], pad_id)

    assert batch.num_targets == len(store.sequence(0)) - 1
    assert int((batch.input_ids[0, 1:] != pad_id).sum()) < batch.num_targets


def test_targets_start_where_a_label_starts(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "label_start", np.minimum(store.num_tokens - 1, 2))
    index = int(np.argmax(store.num_tokens))
    batch = collate(store, [index], PAD)

    assert batch.targets[0].tolist() == [-100, *store.sequence(index)[2:].tolist(), -100]
    assert batch.num_targets == len(store.sequence(index)) - 2


def test_our_targets_give_the_loss_hugging_face_computes(store: TokenStore) -> None:
    from tests.helpers import tiny_opt

    model = tiny_opt(torch.float64)
    batch = collate(store, [1, 2, 3], PAD)
    labels = torch.where(batch.attention_mask == 1, batch.input_ids, -100)
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels)
    ours = torch.nn.functional.cross_entropy(
        output.logits.flatten(0, 1), batch.targets.flatten(), reduction="sum"
    )

    assert float(ours / batch.num_targets) == pytest.approx(float(output.loss), abs=1e-6)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_an_epoch_uses_each_example_once(
    num_examples: int, batch_size: int, accumulation: int, epochs: int
) -> None:
    steps = plan(num_examples, batch_size=batch_size, accumulation=accumulation, local_epochs=epochs)
    batches_per_epoch = -(-num_examples // batch_size)
    steps_per_epoch = -(-batches_per_epoch // accumulation)

    assert len(steps) == epochs * steps_per_epoch
    for epoch in range(epochs):
        of_epoch = steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert sorted(order_of(of_epoch)) == list(range(num_examples))
        sizes = [batch.size for step in of_epoch for batch in step]
        assert all(size == batch_size for size in sizes[:-1])
        assert 1 <= sizes[-1] <= batch_size
        assert all(len(step) == accumulation for step in of_epoch[:-1])
        assert 1 <= len(of_epoch[-1]) <= accumulation


@given(st.integers(1, 30), st.integers(1, 40))
def test_local_steps_go_through_the_same_epochs(num_examples: int, local_steps: int) -> None:
    steps = plan(num_examples, local_epochs=None, local_steps=local_steps)
    by_epochs = plan(num_examples, local_epochs=local_steps)

    assert len(steps) == local_steps
    assert order_of(steps) == order_of(by_epochs[:local_steps])


def test_each_epoch_round_client_and_seed_has_its_own_order() -> None:
    base = order_of(plan(50, local_epochs=2))
    orders = [
        base[:50],
        base[50:],
        order_of(plan(50, round_index=1)),
        order_of(plan(50, client_id=1)),
        order_of(plan(50, seed=1)),
    ]

    assert len({tuple(order) for order in orders}) == 5
    assert order_of(plan(50)) == base[:50]
    assert order_of(plan(50, batch_size=7, accumulation=3)) == base[:50]


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 200))
def test_evaluation_batches_keep_the_budget(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens)

    assert sorted(position for batch in batches for position in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[position] for position in batch)
        assert batch.size * longest <= batch_tokens or batch.size == 1
    in_order = [lengths[position] for batch in batches for position in batch]
    assert in_order == sorted(in_order, reverse=True)


def test_sorting_by_length_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 128, 500)
    padded = sum(batch.size * lengths[batch].max() for batch in length_batches(lengths, 1024))

    assert padded < 1.1 * lengths.sum()
