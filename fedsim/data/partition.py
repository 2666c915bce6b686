"""Partitions: which client holds which examples, as columns, so that 100,000 clients are a few arrays.

N = examples of the training corpus, K = clients, C = length classes, L = labels.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import DataError
from fedsim.seeding import numpy_generator

Ints = NDArray[np.int64]

MAX_LISTED_NUMBERS = 250_000
"""Numbers in the lists by client of `Partition.to_json`; beyond that they hold every so many-th client only."""


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """What a partitioner returns: each client's examples, before any of them is set aside for testing.

    Attributes:
        indices: (M,) example indices, client after client, ascending within a client.
        offsets: (K + 1,) client k holds `indices[offsets[k]:offsets[k + 1]]`.
        notes: policies in words and figures of the deal, JSON-like, for `partition.json`.
    """

    indices: Ints
    offsets: Ints
    notes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Which client trains on which examples, and which it keeps for its own test.

    Clients are counted from 0 to K - 1, examples from 0 to N - 1 (positions in the training token store).

    Attributes:
        name: the partitioner (`data.partition.name`).
        train_indices, train_offsets: (M,) and (K + 1,) int64; client k trains on
            `train_indices[train_offsets[k]:train_offsets[k + 1]]`, at least one example.
        test_indices, test_offsets: the same for its own test examples, of which there may be none.
        classes: (N,) int64 length class of each example.
        class_edges: inner edges of the length classes; class c holds the lengths in (edge c - 1, edge c].
        length_unit: unit of the edges.
        truncated: (N,) bool, examples that are cut to data.max_tokens.
        notes: policies in words and figures of the deal, JSON-like.
        labels: (N,) int64 position of each example's label in `label_names`, or None where none are counted.
        label_names: the L values of data.label_field, ascending; empty where none are counted.
        client_names: K natural clients, ascending; empty where clients have no names.
        eval_indices, eval_offsets: (E,) and (K + 1,) as above, examples that a client keeps for its own evaluation
            during training, apart from its test; None where the corpus does not set any aside.
    """

    name: str
    train_indices: Ints
    train_offsets: Ints
    test_indices: Ints
    test_offsets: Ints
    classes: Ints
    class_edges: tuple[float, ...]
    length_unit: str
    truncated: NDArray[np.bool_]
    notes: Mapping[str, object]
    labels: Ints | None = None
    label_names: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()
    eval_indices: Ints | None = None
    eval_offsets: Ints | None = None

    @property
    def num_clients(self) -> int:
        """Number of clients K."""
        return self.train_offsets.size - 1

    @property
    def num_classes(self) -> int:
        """Number of length classes C."""
        return len(self.class_edges) + 1

    @property
    def sizes(self) -> Ints:
        """(K,) training examples of each client."""
        return np.diff(self.train_offsets)

    @property
    def test_sizes(self) -> Ints:
        """(K,) own test examples of each client."""
        return np.diff(self.test_offsets)

    def train(self, client_id: int) -> Ints:
        """Indices of the client's training examples, ascending."""
        return _of_client(self.train_indices, self.train_offsets, client_id)

    def test(self, client_id: int) -> Ints:
        """Indices of the client's own test examples, ascending."""
        return _of_client(self.test_indices, self.test_offsets, client_id)

    def evaluation(self, client_id: int) -> Ints:
        """Indices of the examples that the client keeps for its own evaluation, ascending; there may be none."""
        if self.eval_indices is None or self.eval_offsets is None:
            return np.zeros(0, dtype=np.int64)
        return _of_client(self.eval_indices, self.eval_offsets, client_id)

    @property
    def eval_sizes(self) -> Ints:
        """(K,) examples that each client keeps for its own evaluation."""
        if self.eval_offsets is None:
            return np.zeros(self.num_clients, dtype=np.int64)
        return np.diff(self.eval_offsets)

    def class_counts(self) -> Ints:
        """(K, C) training examples of each client in each length class."""
        return self._counts(self.classes, self.num_classes)

    def label_counts(self) -> Ints:
        """(K, L) training examples of each client with each label; L is 0 where labels are not counted."""
        if self.labels is None:
            return np.zeros((self.num_clients, 0), dtype=np.int64)
        return self._counts(self.labels, len(self.label_names))

    def _counts(self, codes: Ints, num_codes: int) -> Ints:
        clients = np.repeat(np.arange(self.num_clients), self.sizes)
        cells = clients * num_codes + codes[self.train_indices]
        counts = np.bincount(cells, minlength=self.num_clients * num_codes)
        return counts.reshape(self.num_clients, num_codes)

    @property
    def fingerprint(self) -> str:
        """Hash of who holds what; equal for equal assignments on every platform."""
        digest = hashlib.blake2b(digest_size=16)
        columns = (self.train_indices, self.train_offsets, self.test_indices, self.test_offsets)
        for column in (*columns, self.eval_indices, self.eval_offsets):
            if column is None:
                continue
            digest.update(column.size.to_bytes(8, "little"))
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()

    def to_parquet(self) -> bytes:
        """Who holds what, as a Parquet file: `client_id`, `use` (train, evaluation or test) and `example`.

        Examples are positions in the training token store, from 0: the corpus's rows in their order, without those
        held out as the global test set, thinned out by data.max_examples or dropped by data.on_empty.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts = [("train", self.train_indices, self.sizes), ("test", self.test_indices, self.test_sizes)]
        if self.eval_indices is not None:
            parts.insert(1, ("evaluation", self.eval_indices, self.eval_sizes))
        table = pa.table(
            {
                "client_id": np.concatenate([np.repeat(np.arange(self.num_clients), of) for *_, of in parts]),
                "use": pa.array(np.repeat([use for use, *_ in parts], [held.size for _, held, _ in parts])),
                "example": np.concatenate([held for _, held, _ in parts]),
            }
        )
        file = io.BytesIO()
        pq.write_table(table, file)
        return file.getvalue()

    def to_json(self) -> dict[str, object]:
        """The partition in figures, for `partition.json`: all but the indices themselves, see `to_parquet`.

        `mean_pairwise_overlap` is the mean over all pairs of clients of the examples both hold (for whatever use),
        divided by a client's mean number of examples: 0 where the partition is disjoint. It is exact at any size, as
        it follows from how many clients hold each example.

        The lists by client (`sizes` and below) hold all clients in order and `listed_clients` is null, unless that
        would be more than `MAX_LISTED_NUMBERS` numbers: then they hold the evenly spaced clients that
        `listed_clients` names. `size_summary` is of all clients in any case.
        """
        held = np.concatenate((self.train_indices, self.test_indices, *self._eval_columns()))
        holders = np.bincount(held, minlength=self.classes.size)
        unique = int(np.count_nonzero(holders))
        in_class = np.bincount(self.classes, minlength=self.num_classes)
        truncated = np.bincount(self.classes[self.truncated], minlength=self.num_classes)
        described: dict[str, object] = {
            "partitioner": self.name,
            "hash": self.fingerprint,
            "num_clients": self.num_clients,
            "num_examples": int(self.classes.size),
            "unique_examples": unique,
            "unused_examples": int(self.classes.size) - unique,
            "mean_pairwise_overlap": _mean_pairwise_overlap(holders, self.num_clients),
            "mean_pairwise_overlap_from": "all pairs of clients, exactly",
            "class_edges": list(self.class_edges),
            "class_unit": self.length_unit,
            "class_counts": in_class.tolist(),
            "class_share_truncated": (truncated / np.maximum(in_class, 1)).tolist(),
            "notes": dict(self.notes),
            "size_summary": _summary_of(self.sizes),
        }
        if self.labels is not None:
            described["label_names"] = list(self.label_names)
            described["label_counts"] = np.bincount(self.labels, minlength=len(self.label_names)).tolist()
        return {**described, **self._lists_by_client()}

    def _eval_columns(self) -> tuple[Ints, ...]:
        return () if self.eval_indices is None else (self.eval_indices,)

    def _lists_by_client(self) -> dict[str, object]:
        columns = 2 + self.num_classes + len(self.label_names) + (1 if self.client_names else 0)
        num_listed = min(self.num_clients, max(1, MAX_LISTED_NUMBERS // columns))
        listed = np.arange(num_listed) * self.num_clients // num_listed
        lists: dict[str, object] = {
            "listed_clients": None if num_listed == self.num_clients else listed.tolist(),
            "sizes": self.sizes[listed].tolist(),
            "test_sizes": self.test_sizes[listed].tolist(),
            "client_class_counts": self.class_counts()[listed].tolist(),
        }
        if self.eval_offsets is not None:
            lists["eval_sizes"] = self.eval_sizes[listed].tolist()
        if self.labels is not None:
            lists["client_label_counts"] = self.label_counts()[listed].tolist()
        if self.client_names:
            lists["client_names"] = [self.client_names[client_id] for client_id in listed.tolist()]
        return lists


def to_deal(indices: Ints, clients: Ints, num_clients: int, notes: Mapping[str, object]) -> Deal:
    """A deal from pairs: example `indices[j]` goes to client `clients[j]`. The order of pairs does not matter."""
    sizes = np.bincount(clients, minlength=num_clients)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    # one sort of one column takes a third of the time of np.lexsort
    num_indices = int(indices.max(initial=0)) + 1
    pairs = np.sort(clients * num_indices + indices)
    return Deal(pairs - np.repeat(np.arange(num_clients), sizes) * num_indices, offsets, notes)


def sort_by_class(examples: Ints, classes: Ints) -> Ints:
    """Examples in ascending order of their class, and within a class in the order they had.

    Args:
        examples: some of 0 ... N - 1.
        classes: (N,) class of each example.
    """
    codes = classes[examples]
    if codes.max(initial=0) < 2**16:
        codes = codes.astype(np.uint16)  # numpy sorts these by radix
    return examples[np.argsort(codes, kind="stable")]


def split_clients(deal: Deal, num_examples: int, fraction: float, seed: int) -> tuple[Ints, Ints, Ints, Ints]:
    """Set a share of each client's examples aside as its own test set.

    Every example of the corpus has one random rank, drawn once from the seed; a client's test examples are those of
    its examples that rank first. So the split depends on the client's examples alone, not on other clients.

    Args:
        num_examples: N.
        fraction: share in [0, 1), rounded half up; where it is positive, a client with at least 2 examples gets at
            least 1 test example. Every client keeps at least 1 training example.

    Returns:
        train indices, train offsets, test indices, test offsets, as in `Partition`.
    """
    sizes = np.diff(deal.offsets)
    num_test = np.zeros_like(sizes)
    if fraction > 0:
        wanted = np.floor(fraction * sizes + 0.5).astype(np.int64)
        num_test = np.where(sizes >= 2, np.clip(wanted, 1, np.maximum(sizes - 1, 1)), 0)
    clients = np.repeat(np.arange(sizes.size), sizes)
    ranks = numpy_generator(seed, "client_test").permutation(num_examples)[deal.indices]
    by_rank = np.argsort(clients * num_examples + ranks)  # no two are equal: a client holds an example once
    place = np.arange(clients.size) - np.repeat(deal.offsets[:-1], sizes)
    is_test = np.zeros(clients.size, dtype=bool)
    is_test[by_rank] = place < np.repeat(num_test, sizes)
    return (
        deal.indices[~is_test],
        np.concatenate(([0], np.cumsum(sizes - num_test))).astype(np.int64),
        deal.indices[is_test],
        np.concatenate(([0], np.cumsum(num_test))).astype(np.int64),
    )


def equal_share(num_examples: int, num_clients: int, examples_per_client: int | None) -> int:
    """Examples of each client where all hold the same number: as asked for, else floor(N / K).

    Raises:
        DataError: the corpus is too small for that.
    """
    if examples_per_client is None:
        check_enough(num_examples, num_clients, 1)
        return num_examples // num_clients
    if examples_per_client * num_clients > num_examples:
        raise DataError(
            f"data.partition.examples_per_client must be at most {num_examples // num_clients} ({num_examples} "
            f"training examples over data.partition.num_clients={num_clients}, no example twice), got "
            f"{examples_per_client}; lower one of the two keys"
        )
    return examples_per_client


def check_enough(num_examples: int, num_clients: int, min_examples: int) -> None:
    """Raise DataError where K clients cannot each hold `min_examples` of N examples."""
    if num_clients * min_examples <= num_examples:
        return
    if min_examples == 1:
        raise DataError(
            f"data.partition.num_clients must be at most the number of training examples, {num_examples}, got "
            f"{num_clients}; lower it or use a larger corpus"
        )
    raise DataError(
        f"data.partition.min_examples must be at most {num_examples // num_clients} ({num_examples} training examples "
        f"over data.partition.num_clients={num_clients}), got {min_examples}; lower one of the two keys"
    )


def largest_remainder(shares: NDArray[np.float64], totals: Ints) -> Ints:
    """Round rows of non-negative real numbers to integers with given row sums (Hamilton's method).

    Args:
        shares: (rows, columns); row i sums to `totals[i]` up to rounding error.
        totals: (rows,) int64.

    Returns:
        (rows, columns) int64, the floor of each share or one more; of equal remainders the first column wins.
    """
    floors = np.floor(shares).astype(np.int64)
    missing = totals - floors.sum(axis=1)
    order = np.argsort(-(shares - floors), axis=1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(shares.shape[1]), shares.shape), axis=1)
    rounded: Ints = floors + (places < missing[:, None])
    return rounded


def log_gamma_draws(
    alpha: float, shape: tuple[int, ...], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Logarithms of Gamma(alpha, 1) draws; a row of them, exponentiated and normalised, is a Dirichlet(alpha) draw.

    Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha), so the logarithm stays finite where the draw itself would
    underflow to 0 (from alpha of about 0.01 down) and a Dirichlet draw would be 0 / 0. Below alpha = 1e-6 the draw of
    1e-6 is returned: all mass is on one entry already.
    """
    alpha = max(alpha, 1e-6)
    draws: NDArray[np.float64] = np.log(generator.standard_gamma(alpha + 1, shape))
    return draws - generator.standard_exponential(shape) / alpha


def _of_client(indices: Ints, offsets: Ints, client_id: int) -> Ints:
    if not 0 <= client_id < offsets.size - 1:
        raise IndexError(f"client {client_id} of {offsets.size - 1}")
    return indices[offsets[client_id] : offsets[client_id + 1]]


def _summary_of(sizes: Ints) -> dict[str, float]:
    return {
        "least": int(sizes.min()),
        "median": float(np.median(sizes)),
        "mean": float(sizes.mean()),
        "most": int(sizes.max()),
    }


def _mean_pairwise_overlap(holders: Ints, num_clients: int) -> float:
    pairs = num_clients * (num_clients - 1) / 2
    held = int(holders.sum())
    if pairs == 0 or held == 0:
        return 0.0
    shared = float((holders * (holders - 1) // 2).sum())
    return shared / pairs / (held / num_clients)
