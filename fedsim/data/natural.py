"""One client for each value of a column: an author, a role, a task.

N = examples, K = clients, V = values of the column.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Deal, to_deal
from fedsim.data.prompts import EVAL, TEST, TRAIN
from fedsim.errors import DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class OwnParts:
    """What each client keeps for its own evaluation and test, because the corpus says so.

    Attributes:
        train, evaluation, test: each client's examples of that part; every client has some for training.
        names: the client that each stands for.
    """

    train: Deal
    evaluation: Deal
    test: Deal
    names: tuple[str, ...]


def deal_own_parts(
    values: Ints, names: Sequence[str], parts: NDArray[np.int8], num_clients: int, min_examples: int
) -> OwnParts:
    """As `deal_natural` by the training examples alone; the clients' other examples follow them.

    Args:
        values: (N,) position of each example's value in `names`.
        parts: (N,) TRAIN, EVAL or TEST of `fedsim.data.prompts`.

    Raises:
        DataError: fewer than K values have `min_examples` training examples.
    """
    places = np.flatnonzero(parts == TRAIN)
    dealt, chosen = deal_natural(values[places], names, num_clients, min_examples)
    client_of = np.full(len(names), -1, dtype=np.int64)
    value_of = {name: value for value, name in enumerate(names)}
    client_of[[value_of[name] for name in chosen]] = np.arange(num_clients)

    def of_part(part: int) -> Deal:
        held = np.flatnonzero((parts == part) & (client_of[values] >= 0))
        return to_deal(held, client_of[values[held]], num_clients, {})

    notes = {
        **dealt.notes,
        "own_parts": "training, evaluation and test examples of a client are the corpus's own",
    }
    train = Deal(places[dealt.indices], dealt.offsets, notes)
    return OwnParts(train, of_part(EVAL), of_part(TEST), chosen)


def deal_natural(
    values: Ints, names: Sequence[str], num_clients: int, min_examples: int
) -> tuple[Deal, tuple[str, ...]]:
    """Give each client all examples of one value.

    The K values with the most examples become clients, of equally frequent ones those that come first in `names`;
    clients are numbered in the order of `names`. Values with fewer than `min_examples` examples are never clients.
    Examples of the other values go to nobody, which `notes` count.

    Args:
        values: (N,) position of each example's value in `names`.
        names: V values.
        num_clients: K.

    Returns:
        The deal, and the value that each client stands for.

    Raises:
        DataError: fewer than K values have `min_examples` examples.
    """
    counts = np.bincount(values, minlength=len(names))
    possible = int((counts >= min_examples).sum())
    if num_clients > possible:
        raise DataError(
            f"data.partition.num_clients must be at most {possible}, the values of data.client_field with at least "
            f"data.partition.min_examples={min_examples} of the {values.size} training examples (of {len(names)} "
            f"values in all), got {num_clients}; lower one of the two keys"
        )
    chosen = np.sort(np.argsort(-counts, kind="stable")[:num_clients])
    client_of = np.full(len(names), -1, dtype=np.int64)
    client_of[chosen] = np.arange(num_clients)
    clients = client_of[values]
    held = np.flatnonzero(clients >= 0)
    notes = {
        "policy": f"one client for each of the {num_clients} most frequent of {len(names)} values; "
        f"{values.size - held.size} examples of other values go to nobody",
        "values": len(names),
        "values_below_minimum": len(names) - possible,
        "values_left_out": len(names) - num_clients,
    }
    return to_deal(held, clients[held], num_clients, notes), tuple(names[value] for value in chosen.tolist())
