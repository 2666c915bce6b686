"""Class mixes drawn from a Dirichlet distribution, dealt out so that no example is in two clients.

N = examples, K = clients, C = classes, n_k = examples of client k, s_c = examples of class c.
"""

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Deal, largest_remainder, log_gamma_draws, sort_by_class, to_deal
from fedsim.errors import DataError

MAX_ITERATIONS = 300
"""Of the proportional fitting. What is left then, if anything, is moved by `_move_surplus`."""

MAX_CELLS = 30_000_000
"""Clients times classes that are dealt at most; a few arrays of this size are held at a time."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def deal_class_mixes(
    classes: Ints, num_classes: int, sizes: Ints, dirichlet_alpha: float, generator: np.random.Generator
) -> Deal:
    """Give client k `sizes[k]` examples with a class mix drawn from Dirichlet(alpha).

    K independent draws q_k want class c sum_k n_k q_kc times, which in general is more or less than there is. Policy:

    1. The clients together hold each class in its share of the corpus: t_c = s_c sum_k n_k / N, rounded, at most s_c.
       So arms with different alpha differ in how examples are spread, not in which kind of examples is used.
    2. The drawn mixes are fitted to the row sums n_k and the column sums t_c by iterative proportional fitting: of
       all matrices with these sums it is the one closest to the draws in relative entropy.
    3. It is rounded, and what a class then has too much or too little is moved between the classes of a client, of
       those clients first whose draws lean most towards the class that lacks. Rows keep their sums, columns end
       at t_c.

    `notes` state the total variation distance between drawn and realised mixes, its mean over clients and its
    largest: 0 where the draws could be had as they were, 1 where a client got none of what it had drawn.

    Args:
        classes: (N,) class of each example; no class is empty.
        num_classes: C.
        sizes: (K,) n_k, each at least 1, together at most N.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution, > 0.

    Raises:
        DataError: K C is above `MAX_CELLS`.
    """
    num_clients, total = sizes.size, int(sizes.sum())
    check_cells(num_clients, num_classes)
    supply = np.bincount(classes, minlength=num_classes)
    targets = _column_targets(supply, total)
    log_draws = log_gamma_draws(dirichlet_alpha, (num_clients, num_classes), generator)
    fitted = _fit(log_draws, supply / classes.size * num_clients * (total / num_clients), sizes)
    counts = _round(fitted, targets, sizes, log_draws)

    by_class = sort_by_class(generator.permutation(classes.size), classes)
    starts = np.cumsum(supply) - supply
    indices = [by_class[start : start + target] for start, target in zip(starts, targets, strict=True)]
    clients = [np.repeat(np.arange(num_clients), column) for column in counts.T]

    drawn = np.exp(log_draws - _log_sum(log_draws, axis=1))
    distances = 0.5 * np.abs(drawn - counts / sizes[:, None]).sum(axis=1)
    notes = {
        "mean_total_variation_drawn_to_realised": float(distances.mean()),
        "max_total_variation_drawn_to_realised": float(distances.max()),
    }
    return to_deal(np.concatenate(indices), np.concatenate(clients), num_clients, notes)


def check_cells(num_clients: int, num_classes: int) -> None:
    """Raise DataError where a table of clients by classes would not fit into memory."""
    if num_clients * num_classes > MAX_CELLS:
        raise DataError(
            f"data.partition.num_clients times the number of classes must be at most {MAX_CELLS}, got {num_clients} "
            f"times {num_classes}; use fewer clients or a column with fewer values"
        )


def _column_targets(supply: Ints, total: int) -> Ints:
    """(C,) total * s_c / N rounded to integers with sum `total`, at most s_c, in exact integer arithmetic."""
    num_examples = int(supply.sum())
    targets, remainders = np.divmod(supply * total, num_examples)
    most = np.argsort(-remainders, kind="stable")[: total - int(targets.sum())]
    # Only positive remainders are rounded up, as they sum to what is missing. There the target before rounding is
    # below s_c, an integer, so the target after it is at most s_c.
    targets[most] += 1
    return targets


def _fit(log_draws: Floats, column_sums: Floats, sizes: Ints) -> Floats:
    """(K, C) iterative proportional fitting of exp(log_draws) to row sums n_k and positive column sums.

    In logarithms: at a small alpha the draws span thousands of nats, and a class that no client has drawn is reached
    all the same. Stops once every column is right to half an example.
    """
    mean_size = int(sizes.sum()) / sizes.size
    log_sizes = np.log(sizes / mean_size)[:, None]  # exactly 0 where all clients are of the same size
    log_columns = np.zeros((1, column_sums.size))
    log_targets = np.log(column_sums / mean_size)
    log_mixes = log_draws - _log_sum(log_draws, axis=1)
    for _ in range(MAX_ITERATIONS):
        log_sums = _log_sum(log_mixes + log_sizes, axis=0)[0]
        if np.abs(mean_size * np.exp(log_sums) - column_sums).max() <= 0.5:
            break
        log_columns += log_targets - log_sums
        log_mixes = log_draws + log_columns
        log_mixes -= _log_sum(log_mixes, axis=1)
    fitted: Floats = np.exp(log_mixes) * sizes[:, None]
    return fitted


def _round(fitted: Floats, targets: Ints, sizes: Ints, log_draws: Floats) -> Ints:
    """(K, C) integers near `fitted` with its row sums n_k and the column sums t_c."""
    floors = np.floor(fitted).astype(np.int64)
    counts = largest_remainder(fitted, sizes)
    _move_surplus(counts, targets, log_draws, lowest=floors, highest=floors + 1)
    no_bounds = np.zeros_like(floors), np.broadcast_to(sizes[:, None], floors.shape)
    _move_surplus(counts, targets, log_draws, lowest=no_bounds[0], highest=no_bounds[1])
    return counts


def _move_surplus(counts: Ints, targets: Ints, log_draws: Floats, lowest: Ints, highest: Ints) -> None:
    """Move examples within rows of `counts`, in place, from columns above their target to columns below it.

    Entries stay in [lowest, highest]. With bounds 0 and n_k every column ends at its target: one that is above it
    holds examples to give, and a row has room for what it gives itself. No move is ever taken back, so no more is
    moved than must be. Clients are asked in the order of how much their draws prefer the receiving class, and each
    gives all it may: at a small alpha, whole clients change class and a client of one class stays one.
    """
    surplus = counts.sum(axis=0) - targets
    for giving in np.flatnonzero(surplus > 0):
        for receiving in np.flatnonzero(surplus < 0):
            wanted = min(surplus[giving], -surplus[receiving])
            if wanted == 0:
                continue
            order = np.argsort(log_draws[:, giving] - log_draws[:, receiving], kind="stable")
            may_give = counts[order, giving] - lowest[order, giving]
            may_take = highest[order, receiving] - counts[order, receiving]
            possible = np.minimum(may_give, may_take)
            moves = np.clip(wanted - (np.cumsum(possible) - possible), 0, possible)
            counts[order, giving] -= moves
            counts[order, receiving] += moves
            surplus[giving] -= moves.sum()
            surplus[receiving] += moves.sum()


def _log_sum(values: Floats, axis: int) -> Floats:
    """log(sum(exp(values))) along an axis, which is kept."""
    largest = values.max(axis=axis, keepdims=True)
    total: Floats = largest + np.log(np.exp(values - largest).sum(axis=axis, keepdims=True))
    return total
