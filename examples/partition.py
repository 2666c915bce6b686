"""A partition of your own: the first clients hold the shortest texts, the last ones the longest."""

import numpy as np


def by_length(lengths, labels, num_clients, dirichlet_alpha, seed):
    """Positions of each client's texts, of which it holds one at least; the amounts are Dirichlet shares."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet([dirichlet_alpha] * num_clients)
    sizes = 1 + generator.multinomial(len(lengths) - num_clients, shares)
    return np.split(np.argsort(lengths, kind="stable"), np.cumsum(sizes)[:-1])
