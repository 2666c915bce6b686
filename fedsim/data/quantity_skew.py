"""Dirichlet shares of the corpus with balanced length classes (arXiv 2502.18910, quantity skew).

N = examples, K = clients.
"""

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import (
    Deal,
    check_enough,
    largest_remainder,
    log_gamma_draws,
    sort_by_class,
    to_deal,
)

Ints = NDArray[np.int64]


def deal_quantity_skew(
    classes: Ints,
    num_clients: int,
    dirichlet_alpha: float,
    min_examples: int,
    generator: np.random.Generator,
) -> Deal:
    """Deal all N examples out in shares drawn from Dirichlet(alpha), each client's class mix near the corpus's.

    Examples are put in an order in which every stretch holds the classes in their shares of the corpus, random within
    a class, and clients take consecutive stretches. A client's count of a class with share p of the corpus differs
    from p times its size by at most 1 + p C for C classes.

    Args:
        classes: (N,) class of each example.
        num_clients: K.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution, > 0.
        min_examples: a client whose share would be smaller is raised to this.

    Raises:
        DataError: K * min_examples > N.
    """
    check_enough(classes.size, num_clients, min_examples)
    sizes, num_raised = draw_sizes(num_clients, classes.size, dirichlet_alpha, min_examples, generator)
    clients = np.repeat(np.arange(num_clients), sizes)
    notes = {
        "policy": f"shares drawn from Dirichlet({dirichlet_alpha:g}); those below {min_examples} examples are raised "
        "to that and the others scaled down alike; classes as in the corpus; every example is used",
        "clients_below_minimum": num_raised,
    }
    return to_deal(_interleave(classes, generator), clients, num_clients, notes)


def draw_sizes(
    num_clients: int,
    num_examples: int,
    dirichlet_alpha: float,
    min_examples: int,
    generator: np.random.Generator,
) -> tuple[Ints, int]:
    """Sizes of K clients that sum to N: shares from Dirichlet(alpha), those below the minimum raised to it.

    Returns:
        (K,) sizes, each at least `min_examples`, and how many clients had drawn less than that.
    """
    shares = _shares(num_clients, dirichlet_alpha, generator)
    sizes = _sizes(shares, num_examples, min_examples)
    return sizes, int((shares * num_examples < min_examples).sum())


def _shares(num_clients: int, dirichlet_alpha: float, generator: np.random.Generator) -> NDArray[np.float64]:
    log_draws = log_gamma_draws(dirichlet_alpha, (num_clients,), generator)
    shares: NDArray[np.float64] = np.exp(log_draws - log_draws.max())
    shares /= shares.sum()
    return shares


def _sizes(shares: NDArray[np.float64], num_examples: int, min_examples: int) -> Ints:
    """(K,) sizes with sum N: max(min_examples, factor * share), rounded, the factor such that the sum is right."""
    num_clients = shares.size
    in_order = np.sort(shares)
    # With the j smallest shares raised to the minimum, the others divide what is left in proportion.
    raised = np.arange(num_clients)
    factors = (num_examples - raised * min_examples) / np.cumsum(in_order[::-1])[::-1]
    is_enough = factors * in_order >= min_examples
    is_enough[-1] = (
        True  # as K * min_examples <= N; without this, rounding error may say otherwise where they are equal
    )
    factor = factors[np.argmax(is_enough)]
    sizes = np.maximum(factor * shares, min_examples)
    rounded: Ints = largest_remainder(sizes[None, :], np.array([num_examples]))[0]
    return rounded


def _interleave(classes: Ints, generator: np.random.Generator) -> Ints:
    """(N,) example indices; example j of the m of a class stands at (j + u) / m of the way, u random per class."""
    by_class = sort_by_class(generator.permutation(classes.size), classes)
    counts = np.bincount(classes)
    shifts = generator.random(counts.size)
    place = np.arange(classes.size) - np.repeat(np.cumsum(counts) - counts, counts)
    position = (place + np.repeat(shifts, counts)) / np.repeat(counts, counts)
    return by_class[np.argsort(position, kind="stable")]
