"""The samplers of Plato (TL-System/plato), which arXiv 2502.18910 most likely used: clients overlap by construction.

Kept to reproduce figures and to show what the samplers do, not to be chosen for new work. They draw from Plato's own
random streams, so that a seed above 0 gives the partition that Plato gives for `data.random_seed` of that value:

    class mix of client k = 1 ... K     numpy's legacy stream of seed * k
    order within all clients' draws     torch's stream of seed: one and the same for every client

With seed 0 Plato would draw one and the same mix for all clients. Departs from Plato: seed 0 stands for 2^31 - 1.
Since the streams are keyed by the product, client 2 under seed 1 has the class mix of client 1 under seed 2. Seeds
count modulo 2^32. Where clients overlap, what one keeps for its own test may be what another trains on.

N = examples, K = clients, C = classes, n = examples of each client.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.data.partition import Deal, sort_by_class, to_deal
from fedsim.errors import DataError

PARTITION_SIZE = 1000
"""Examples of a client in Plato's OPT example (examples/lora/fedavg_opt.yml)."""

SEED_FOR_ZERO = 2**31 - 1
LEAST_LOG = -1e6
"""In place of log(0): an example of a class that a client never wants comes after all others."""

MAX_BISECTIONS = 200

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def deal_plato_label(
    classes: Ints,
    num_classes: int,
    num_clients: int,
    dirichlet_alpha: float,
    examples_per_client: int | None,
    seed: int,
) -> Deal:
    """Plato's `noniid` sampler: each client draws from the whole set with its own class probabilities.

    Client k draws p_k from Dirichlet(alpha) and then n examples without replacement, example i with weight
    p_k,class(i). Torch draws such a sample as the n examples with the smallest e_i / p_k,class(i), where the e_i are
    Exp(1). As every client seeds torch alike, the e_i are the same for all: clients with like mixes hold the same
    examples. The larger alpha, the fewer different examples are used at all.

    Within a class, all clients prefer examples in the same order; so a client is told by how many it takes of each
    class, which is the number of e_i below t_k p_k,c, with t_k found by bisection for all clients at once.

    Args:
        classes: (N,) class of each example.
        num_classes: C.
        num_clients: K.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution, > 0.
        examples_per_client: n; None: `PARTITION_SIZE`.
        seed: `run.seed`.

    Returns:
        K clients with n different examples each; an example may be with many of them, or with none.

    Raises:
        DataError: n > N.
    """
    share = PARTITION_SIZE if examples_per_client is None else examples_per_client
    if share > classes.size:
        origin = "" if examples_per_client is not None else "null, which stands for Plato's "
        raise DataError(
            f"data.partition.examples_per_client must be at most the number of training examples, {classes.size}, got "
            f"{origin}{share}; set it to less"
        )
    seed = _plato_seed(seed)
    log_mixes = _log_mixes(num_clients, num_classes, dirichlet_alpha, seed)
    generator = torch.Generator().manual_seed(seed)
    times = torch.empty(classes.size, dtype=torch.float64).exponential_(generator=generator).numpy()
    order = sort_by_class(np.argsort(times, kind="stable"), classes)
    supply = np.bincount(classes, minlength=num_classes)
    ends = np.cumsum(supply)
    queues = [order[end - size : end][:share] for end, size in zip(ends, supply, strict=True)]
    counts = _counts([np.log(times[queue]) for queue in queues], log_mixes, share)

    indices, clients = [], []
    for queue, column in zip(queues, counts.T, strict=True):
        places = np.arange(int(column.sum())) - np.repeat(np.cumsum(column) - column, column)
        indices.append(queue[places])
        clients.append(np.repeat(np.arange(num_clients), column))
    distances = 0.5 * np.abs(np.exp(log_mixes) - counts / share).sum(axis=1)
    notes = {
        "policy": f"Plato's noniid sampler: each client draws {share} examples from the whole set without replacement, "
        f"with class probabilities from Dirichlet({dirichlet_alpha:g}) and one seed for all, so clients overlap; a "
        "client that wants more of a class than there is takes other classes",
        "mean_total_variation_drawn_to_realised": float(distances.mean()),
        "max_total_variation_drawn_to_realised": float(distances.max()),
    }
    return to_deal(np.concatenate(indices), np.concatenate(clients), num_clients, notes)


def deal_plato_quantity(
    num_examples: int, num_clients: int, dirichlet_alpha: float, min_examples: int, seed: int
) -> Deal:
    """Plato's `sample_quantity_noniid` sampler: consecutive stretches of a random permutation.

    Shares are drawn from Dirichlet(alpha) over K + 1 parts, of which the last is dropped, and each is raised to the
    minimum without scaling the others down. Where the stretches together are longer than the permutation, it begins
    again, and the last clients hold examples of the first ones.

    Args:
        num_examples: N.
        num_clients: K.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution, > 0.
        min_examples: Plato's `min_partition_size`.
        seed: `run.seed`.

    Returns:
        K clients; none holds an example twice.

    Raises:
        DataError: min_examples > N.
    """
    if min_examples > num_examples:
        raise DataError(
            f"data.partition.min_examples must be at most the number of training examples, {num_examples}, got "
            f"{min_examples}; lower it"
        )
    legacy = np.random.RandomState(_plato_seed(seed))
    permutation = np.arange(num_examples)
    legacy.shuffle(permutation)
    shares = _dirichlet(legacy, num_clients + 1, dirichlet_alpha)[:-1] * num_examples
    ends = np.cumsum(np.maximum(shares, min_examples)).astype(np.int64)
    sizes = np.diff(ends, prepend=0)
    positions = np.arange(int(ends[-1])) % num_examples
    notes = {
        "policy": f"Plato's sample_quantity_noniid sampler: sizes from Dirichlet({dirichlet_alpha:g}) over "
        f"{num_clients + 1} parts, the last one dropped; those below {min_examples} examples are raised to that; "
        f"{max(0, int(ends[-1]) - num_examples)} examples are dealt again, since the sizes sum to more than the corpus",
        "clients_below_minimum": int((shares < min_examples).sum()),
    }
    return to_deal(permutation[positions], np.repeat(np.arange(num_clients), sizes), num_clients, notes)


def _plato_seed(seed: int) -> int:
    return seed % 2**32 or SEED_FOR_ZERO


def _log_mixes(num_clients: int, num_classes: int, dirichlet_alpha: float, seed: int) -> Floats:
    """(K, C) logarithms of the clients' class probabilities, each client from its own legacy stream."""
    legacy = np.random.RandomState(seed)
    mixes = np.empty((num_clients, num_classes))
    for client_id in range(num_clients):
        legacy.seed(seed * (client_id + 1) % 2**32)
        mixes[client_id] = _dirichlet(legacy, num_classes, dirichlet_alpha)
    return np.log(mixes, out=np.full_like(mixes, LEAST_LOG), where=mixes > 0)


def _dirichlet(legacy: np.random.RandomState, num_parts: int, dirichlet_alpha: float) -> Floats:
    """(parts,) a draw; all on one part, at random, where all its Gamma draws underflow, as Plato does it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        draw: Floats = legacy.dirichlet(np.full(num_parts, dirichlet_alpha))
    if np.isfinite(draw).all():
        return draw
    one = np.zeros(num_parts)
    one[legacy.randint(0, num_parts)] = 1.0
    return one


def _counts(log_times: list[Floats], log_mixes: Floats, share: int) -> Ints:
    """(K, C) how many of each class's ascending `log_times` are among the n smallest of log_time - log_mix.

    Bisection on log t_k. Draws that are tied to the last bit are taken in the order of their classes.
    """
    columns = [(times, log_mixes[:, c]) for c, times in enumerate(log_times) if times.size]

    def counts_at(log_t: Floats) -> Ints:
        counts = np.zeros(log_mixes.shape, dtype=np.int64)
        for c, times in enumerate(log_times):
            counts[:, c] = np.searchsorted(times, log_t + log_mixes[:, c], side="right")
        return counts

    low = np.min([times[0] - column for times, column in columns], axis=0) - 1.0
    high = np.max([times[-1] - column for times, column in columns], axis=0) + 1.0
    at_low, at_high = np.zeros(log_mixes.shape, dtype=np.int64), counts_at(high)
    for _ in range(MAX_BISECTIONS):
        is_open = at_high.sum(axis=1) > share
        if not is_open.any():
            break
        middle = (low + high) / 2
        at_middle = counts_at(middle)
        is_enough = at_middle.sum(axis=1) >= share
        high, low = np.where(is_enough & is_open, middle, high), np.where(is_enough, low, middle)
        at_high = np.where((is_enough & is_open)[:, None], at_middle, at_high)
        at_low = np.where(is_enough[:, None], at_low, at_middle)
    tied = at_high - at_low
    before = np.cumsum(tied, axis=1) - tied
    missing = share - at_low.sum(axis=1, keepdims=True)
    counts: Ints = at_low + np.clip(missing - before, 0, tied)
    return counts
