"""A Dirichlet mix of classes for each client, equal shares, no example in two clients (arXiv 2502.18910, label skew).

N = examples, K = clients, C = classes, n = examples of each client, s_c = examples of class c.
"""

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Deal, equal_share, largest_remainder, log_gamma_draws, to_deal

MAX_ITERATIONS = 300
"""Of the proportional fitting. What is left then, if anything, is moved by `_move_surplus`."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def deal_length_skew(
    classes: Ints,
    num_classes: int,
    num_clients: int,
    dirichlet_alpha: float,
    examples_per_client: int | None,
    generator: np.random.Generator,
) -> Deal:
    """Give each client n examples with a class mix drawn from Dirichlet(alpha), without repetition.

    K independent draws q_k want class c n * sum_k q_kc times, which in general is more or less than there is. Policy:

    1. The clients together hold each class in its share of the corpus: t_c = n K s_c / N, rounded, at most s_c.
       So arms with different alpha differ in how examples are spread, not in which kind of examples is used.
    2. The drawn mixes are fitted to the row sums n and the column sums t_c by iterative proportional fitting: of all
       matrices with these sums it is the one closest to the draws in relative entropy.
    3. It is rounded, and what a class then has too much or too little is moved between the classes of a client, of
       those clients first whose draws lean most towards the class that lacks. Rows keep their sums, columns end
       at t_c.

    `notes` state the mean total variation distance between drawn and realised mixes.

    Args:
        classes: (N,) class of each example; no class is empty.
        num_classes: C.
        num_clients: K.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution, > 0.
        examples_per_client: n; None: floor(N / K).

    Raises:
        DataError: n K > N, or N < K.
    """
    share = equal_share(classes.size, num_clients, examples_per_client)
    supply = np.bincount(classes, minlength=num_classes)
    targets = _column_targets(supply, share * num_clients)
    log_draws = log_gamma_draws(dirichlet_alpha, (num_clients, num_classes), generator)
    fitted = _fit(log_draws, supply / classes.size * num_clients * share, share)
    counts = _round(fitted, targets, log_draws)

    shuffled = generator.permutation(classes.size)
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    starts = np.cumsum(supply) - supply
    indices = [by_class[start : start + target] for start, target in zip(starts, targets, strict=True)]
    clients = [np.repeat(np.arange(num_clients), column) for column in counts.T]

    drawn = np.exp(log_draws - _log_sum(log_draws, axis=1))
    distance = 0.5 * np.abs(drawn - counts / share).sum(axis=1).mean()
    notes = {
        "policy": f"equal shares of {share} with class mixes drawn from Dirichlet({dirichlet_alpha:g}), fitted to the "
        "corpus's class shares by iterative proportional fitting so that no example is used twice; "
        f"{classes.size - share * num_clients} examples go to nobody",
        "mean_total_variation_drawn_to_realised": float(distance),
    }
    return to_deal(np.concatenate(indices), np.concatenate(clients), num_clients, notes)


def _column_targets(supply: Ints, total: int) -> Ints:
    """(C,) total * s_c / N rounded to integers with sum `total`, at most s_c, in exact integer arithmetic."""
    num_examples = int(supply.sum())
    targets, remainders = np.divmod(supply * total, num_examples)
    most = np.argsort(-remainders, kind="stable")[: total - int(targets.sum())]
    # Only positive remainders are rounded up, as they sum to what is missing. There the target before rounding is
    # below s_c, an integer, so the target after it is at most s_c.
    targets[most] += 1
    return targets


def _fit(log_draws: Floats, column_sums: Floats, share: int) -> Floats:
    """(K, C) iterative proportional fitting of exp(log_draws) to row sums n and positive column sums.

    In logarithms: at a small alpha the draws span thousands of nats, and a class that no client has drawn is reached
    all the same. Stops once every column is right to half an example.
    """
    log_columns = np.zeros((1, column_sums.size))
    log_targets = np.log(column_sums / share)
    log_mixes = log_draws - _log_sum(log_draws, axis=1)
    for _ in range(MAX_ITERATIONS):
        log_sums = _log_sum(log_mixes, axis=0)[0]
        if np.abs(share * np.exp(log_sums) - column_sums).max() <= 0.5:
            break
        log_columns += log_targets - log_sums
        log_mixes = log_draws + log_columns
        log_mixes -= _log_sum(log_mixes, axis=1)
    return share * np.exp(log_mixes)


def _round(fitted: Floats, targets: Ints, log_draws: Floats) -> Ints:
    """(K, C) integers near `fitted` with its row sums n and the column sums t_c."""
    share = int(targets.sum()) // len(fitted)
    floors = np.floor(fitted).astype(np.int64)
    counts = largest_remainder(fitted, np.full(len(fitted), share))
    _move_surplus(counts, targets, log_draws, lowest=floors, highest=floors + 1)
    _move_surplus(
        counts, targets, log_draws, lowest=np.zeros_like(floors), highest=np.full_like(floors, share)
    )
    return counts


def _move_surplus(counts: Ints, targets: Ints, log_draws: Floats, lowest: Ints, highest: Ints) -> None:
    """Move examples within rows of `counts`, in place, from columns above their target to columns below it.

    Entries stay in [lowest, highest]. With bounds 0 and n every column ends at its target: one that is above it
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
