"""A few classes for each client, by shards (arXiv 1602.05629, section 3: "pathological non-IID").

N = examples, K = clients, C = classes, k = classes of a client, m = examples of a shard, s_c = examples of class c.
"""

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Deal, check_enough, largest_remainder, sort_by_class, to_deal
from fedsim.errors import DataError

SWEEPS = 20
"""Times that each client is offered a swap of shards. A few suffice to forget the order of the classes."""

Ints = NDArray[np.int64]


def deal_pathological(
    classes: Ints,
    num_classes: int,
    num_clients: int,
    classes_per_client: int,
    examples_per_client: int | None,
    generator: np.random.Generator,
) -> Deal:
    """Cut the examples, sorted by class, into K k shards of m examples and give each client k of them.

    Departs from arXiv 1602.05629, where a shard may straddle two classes and a client may get two shards of one: here
    a shard is of one class and the k shards of a client are of k classes. Every client therefore holds exactly k
    classes and k m examples. What does not fill a shard, or belongs to a class of which every client has a shard
    already, goes to nobody, which `notes` count.

    Args:
        classes: (N,) class of each example.
        num_classes: C, at least k.
        num_clients: K.
        classes_per_client: k.
        examples_per_client: k m; None: as many as there can be.

    Raises:
        DataError: k is above C, k m is no multiple of k, or there are too few examples.
    """
    check_enough(classes.size, num_clients, 1)
    if classes_per_client > num_classes:
        raise DataError(
            f"data.partition.classes_per_client must be at most the number of classes, {num_classes}, got "
            f"{classes_per_client}; lower it"
        )
    supply = np.bincount(classes, minlength=num_classes)
    size = _shard_size(supply, num_clients, classes_per_client, examples_per_client)
    num_shards = _shards_of_classes(supply, num_clients, classes_per_client, size)
    table = _assign(num_shards, num_clients, classes_per_client, generator)

    by_class = sort_by_class(generator.permutation(classes.size), classes)
    starts = np.cumsum(supply) - supply
    taken = [
        by_class[start : start + shards * size] for start, shards in zip(starts, num_shards, strict=True)
    ]
    holders = (
        np.argsort(table.reshape(-1), kind="stable") // classes_per_client
    )  # of the shards, class after class
    notes = {
        "policy": f"{classes_per_client} shards of {size} examples for each client, each of another class; "
        f"{classes.size - int(num_shards.sum()) * size} examples go to nobody",
        "shards_of_classes": num_shards.tolist(),
    }
    return to_deal(np.concatenate(taken), np.repeat(holders, size), num_clients, notes)


def _possible_shards(supply: Ints, num_clients: int, size: int) -> Ints:
    """(C,) shards of `size` that a class can give: at most one to each client."""
    return np.minimum(supply // size, num_clients)


def _shard_size(
    supply: Ints, num_clients: int, classes_per_client: int, examples_per_client: int | None
) -> int:
    """The largest m with K k possible shards, found by bisection, or the one asked for."""
    wanted = num_clients * classes_per_client
    low, high = 0, int(supply.sum()) // wanted + 1
    while high - low > 1:
        size = (low + high) // 2
        if _possible_shards(supply, num_clients, size).sum() >= wanted:
            low = size
        else:
            high = size
    if low == 0:
        raise DataError(
            f"data.partition.classes_per_client must leave an example for each of {num_clients} clients times "
            f"{classes_per_client} classes, but the classes have {supply.tolist()[:20]} examples (first 20 classes); "
            "lower it or data.partition.num_clients"
        )
    if examples_per_client is None:
        return low
    if examples_per_client > low * classes_per_client or examples_per_client % classes_per_client != 0:
        raise DataError(
            f"data.partition.examples_per_client must be a multiple of data.partition.classes_per_client="
            f"{classes_per_client} and at most {low * classes_per_client} for {num_clients} clients, got "
            f"{examples_per_client}"
        )
    return examples_per_client // classes_per_client


def _shards_of_classes(supply: Ints, num_clients: int, classes_per_client: int, size: int) -> Ints:
    """(C,) shards of each class, together K k, in proportion to what is possible, hence never more than that."""
    possible = _possible_shards(supply, num_clients, size)
    wanted = num_clients * classes_per_client
    shares = possible * (wanted / possible.sum())
    shards: Ints = largest_remainder(shares[None, :], np.array([wanted]))[0]
    return shards


def _assign(
    num_shards: Ints, num_clients: int, classes_per_client: int, generator: np.random.Generator
) -> Ints:
    """(K, k) classes of each client's shards, no class twice in a row, class c `num_shards[c]` times.

    Shards in the order of their classes are dealt out like cards, so that the at most K shards of a class reach
    different clients. Then random pairs of clients swap random shards wherever no class comes twice.
    """
    order = generator.permutation(num_shards.size)
    cards = np.repeat(order, num_shards[order])
    table = cards.reshape(classes_per_client, num_clients).T.copy()
    for _ in range(SWEEPS):
        pairs = generator.permutation(num_clients)[: num_clients // 2 * 2].reshape(2, -1)
        places = generator.integers(0, classes_per_client, pairs.shape)
        left, right = table[pairs[0], places[0]], table[pairs[1], places[1]]
        fits = ~(table[pairs[0]] == right[:, None]).any(axis=1) & ~(table[pairs[1]] == left[:, None]).any(
            axis=1
        )
        table[pairs[0][fits], places[0][fits]] = right[fits]
        table[pairs[1][fits], places[1][fits]] = left[fits]
    return table
