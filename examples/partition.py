"""A partition of your own: the first half of the clients hold the short texts, the others the long ones."""

import numpy as np


def short_and_long(lengths, labels, num_clients, dirichlet_alpha, seed):
    """Positions of each client's texts, of which it holds one at least; within a half, amounts are Dirichlet shares."""
    generator = np.random.default_rng(seed)
    halves = np.array_split(np.argsort(lengths, kind="stable"), 2)
    clients = []
    for texts, members in zip(halves, np.array_split(np.arange(num_clients), 2), strict=True):
        shares = generator.dirichlet([dirichlet_alpha] * len(members))
        sizes = 1 + generator.multinomial(len(texts) - len(members), shares)
        clients += np.split(generator.permutation(texts), np.cumsum(sizes)[:-1])
    return clients
