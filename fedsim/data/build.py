"""From the configuration to token stores, length classes and a partition."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.cache import content_hash
from fedsim.config.data_section import DataConfig, PartitionConfig
from fedsim.data.columns import encode_column
from fedsim.data.corpus import build_corpus
from fedsim.data.iid import deal_iid
from fedsim.data.instruction_corpus import build_instruction_corpus
from fedsim.data.length_and_quantity import deal_length_and_quantity
from fedsim.data.length_skew import deal_length_skew
from fedsim.data.lengths import assign_classes, explicit_classes, length_classes
from fedsim.data.natural import OwnParts, deal_natural, deal_own_parts
from fedsim.data.own_partition import KEY as OWN_KEY
from fedsim.data.own_partition import deal_by_function
from fedsim.data.partition import Deal, Partition, check_enough, split_clients
from fedsim.data.pathological import deal_pathological
from fedsim.data.plato import deal_plato_label, deal_plato_quantity
from fedsim.data.prompts import TRAIN
from fedsim.data.quantity_skew import deal_quantity_skew
from fedsim.data.tokens import TokenStore, build_token_store
from fedsim.errors import DataError
from fedsim.own import import_own
from fedsim.seeding import numpy_generator

BY_CLASS = (
    "length_skew",
    "label_skew",
    "quantity_skew",
    "length_and_quantity",
    "pathological",
    "plato_label",
)
"""Partitioners that look at classes."""

MAX_LABELS_SHOWN = 1000
"""With more labels than this, a partition that does not use them does not count them either."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class FederatedData:
    """All data of an experiment; the same on every process.

    Attributes:
        train: what clients hold, indexed by the partition.
        test: the global test set.
        train_classes, test_classes: int64 length class of each example, under the same edges.
        class_edges: inner edges of the length classes.
        partition: client -> examples of `train`.
        corpus_source: `data.source`.
        test_from: in words, which part is held out as the global test set.
    """

    train: TokenStore
    test: TokenStore
    train_classes: Ints
    test_classes: Ints
    class_edges: tuple[float, ...]
    partition: Partition
    corpus_source: str
    test_from: str

    @property
    def fingerprint(self) -> str:
        """Hash of the token stores and the partition."""
        return content_hash([self.train.fingerprint, self.test.fingerprint, self.partition.fingerprint])

    def client_label_tokens(self, client_id: int) -> int:
        """Label tokens of the client's training examples."""
        return int(self.train.num_label_tokens[self.partition.train(client_id)].sum())

    def client_tokens(self, client_id: int) -> int:
        """Tokens of the client's training examples."""
        return int(self.train.num_tokens[self.partition.train(client_id)].sum())


def build_data(config: DataConfig, tokenizer: Any, seed: int) -> FederatedData:
    """Read, tokenize and partition the corpus.

    Args:
        tokenizer: the base model's `transformers` tokenizer.
        seed: `run.seed`.

    Raises:
        ConfigError: a partitioner of the user's own cannot be imported or called.
        DataError: the corpus cannot be read, or not be partitioned as asked.
        CacheError: the cache cannot be written or is damaged.
    """
    if ":" in config.partition.name:
        import_own(OWN_KEY, config.partition.name)  # before the corpus is read
    instruction = config.instruction
    corpus = (
        build_corpus(config, seed) if instruction.format == "off" else build_instruction_corpus(config, seed)
    )
    train, test = (
        build_token_store(texts, tokenizer, config.max_tokens, config.on_empty, name, instruction.loss_on)
        for texts, name in ((corpus.train, "training"), (corpus.test, "test"))
    )
    partition = build_partition(config, train, seed)
    return FederatedData(
        train=train,
        test=test,
        train_classes=partition.classes,
        test_classes=assign_classes(_lengths(test, config.partition.length_unit), partition.class_edges),
        class_edges=partition.class_edges,
        partition=partition,
        corpus_source=corpus.source,
        test_from=corpus.test_from,
    )


def build_partition(config: DataConfig, train: TokenStore, seed: int) -> Partition:
    """Length classes of the training store, its examples dealt to clients, and each client's own test split.

    Raises:
        DataError: there are too few examples, or the lengths or labels do not have the classes that the partitioner
            needs. Partitioners that do not use length classes take fewer where lengths are tied.
    """
    rules = config.partition
    own = _own_parts(rules, train)
    places = None if own is not None else _to_train_on(train)
    if rules.name not in ("plato_label", "plato_quantity") and ":" not in rules.name:
        # before the classes, which such a corpus may not have either
        check_enough(len(train) if places is None else len(places), rules.num_clients, 1)
    by_label = rules.name == "label_skew" or rules.class_by == "label"
    by_length = rules.name in BY_CLASS and not by_label
    edges, lengths = _length_classes(rules, _lengths(train, rules.length_unit), places, may_fail=by_length)
    names, labels = _labels(config, train, is_used=by_label)
    if own is not None:
        deal, client_names = own.train, own.names
    elif ":" in rules.name:
        deal, client_names = _deal_own(rules, train, places, seed), ()
    elif labels is not None and by_label:
        deal, client_names = _deal_places(rules, labels, len(names), places, train, seed)
    else:
        deal, client_names = _deal_places(rules, lengths, len(edges) + 1, places, train, seed)
    if own is None:
        split = split_clients(deal, len(train), config.client_test_fraction, seed)
    else:
        split = (own.train.indices, own.train.offsets, own.test.indices, own.test.offsets)
    train_indices, train_offsets, test_indices, test_offsets = split
    return Partition(
        name=rules.name,
        train_indices=train_indices,
        train_offsets=train_offsets,
        test_indices=test_indices,
        test_offsets=test_offsets,
        classes=lengths,
        class_edges=edges,
        length_unit=rules.length_unit,
        truncated=train.untruncated_tokens > train.num_tokens,
        notes=deal.notes,
        labels=labels,
        label_names=names,
        client_names=client_names,
        eval_indices=None if own is None else own.evaluation.indices,
        eval_offsets=None if own is None else own.evaluation.offsets,
    )


def _to_train_on(train: TokenStore) -> Ints | None:
    """The examples that the corpus does not keep for evaluation or test; None for all."""
    answers = train.answers
    return None if answers is None or not answers.parts.any() else np.flatnonzero(answers.parts == TRAIN)


def _deal_own(rules: PartitionConfig, train: TokenStore, places: Ints | None, seed: int) -> Deal:
    """As a function of the user's own says, which sees the examples at `places` only; None for all."""
    lengths, labels = _lengths(train, rules.length_unit), train.labels
    if places is not None:
        lengths, labels = lengths[places], None if labels is None else [labels[place] for place in places]
    deal = deal_by_function(rules.name, lengths, labels, rules.num_clients, rules.dirichlet_alpha, seed)
    return (
        deal
        if places is None
        else Deal(places[deal.indices], deal.offsets, {**deal.notes, **_left_out(train, places)})
    )


def _left_out(train: TokenStore, places: Ints) -> dict[str, object]:
    return {
        "own_parts": f"{len(train) - places.size} that the corpus keeps for evaluation or test go to nobody"
    }


def _deal_places(
    rules: PartitionConfig, classes: Ints, num_classes: int, places: Ints | None, train: TokenStore, seed: int
) -> tuple[Deal, tuple[str, ...]]:
    """As `_deal`, of the examples at `places` only; None for all."""
    if places is None:
        return _deal(rules, classes, num_classes, train, seed)
    present, compact = np.unique(classes[places], return_inverse=True)
    deal, names = _deal(rules, compact.astype(np.int64), len(present), train, seed)
    return Deal(places[deal.indices], deal.offsets, {**deal.notes, **_left_out(train, places)}), names


def _deal(
    rules: PartitionConfig, classes: Ints, num_classes: int, train: TokenStore, seed: int
) -> tuple[Deal, tuple[str, ...]]:
    """The one place that knows partitioners by name. The second value names the clients; empty: they have no names."""
    generator = numpy_generator(seed, "partition")
    count, share, minimum = rules.num_clients, rules.examples_per_client, rules.min_examples
    alpha = rules.dirichlet_alpha
    match rules.name:
        case "iid":
            deal = deal_iid(classes.size, count, share, generator)
        case "length_skew" | "label_skew":
            deal = deal_length_skew(classes, num_classes, count, alpha, share, generator)
        case "quantity_skew":
            deal = deal_quantity_skew(classes, count, alpha, minimum, generator)
        case "length_and_quantity":
            quantity_alpha = alpha if rules.quantity_alpha is None else rules.quantity_alpha
            deal = deal_length_and_quantity(
                classes, num_classes, count, alpha, quantity_alpha, minimum, generator
            )
        case "natural":
            return _natural(rules, train)
        case "pathological":
            deal = deal_pathological(classes, num_classes, count, rules.classes_per_client, share, generator)
        case "plato_label":
            deal = deal_plato_label(classes, num_classes, count, alpha, share, seed)
        case "plato_quantity":
            deal = deal_plato_quantity(classes.size, count, alpha, minimum, seed)
    return deal, ()


def _own_parts(rules: PartitionConfig, train: TokenStore) -> OwnParts | None:
    """Each client's examples by use, where clients are natural and the corpus says which example is for what."""
    answers = train.answers
    if rules.name != "natural" or train.clients is None or answers is None or not answers.parts.any():
        return None
    names, codes = encode_column(train.clients)
    return deal_own_parts(codes, names, answers.parts, rules.num_clients, rules.min_examples)


def _natural(rules: PartitionConfig, train: TokenStore) -> tuple[Deal, tuple[str, ...]]:
    if train.clients is None:
        raise DataError("data.client_field must be set when data.partition.name is natural, got null")
    names, codes = encode_column(train.clients)
    return deal_natural(codes, names, rules.num_clients, rules.min_examples)


def _length_classes(
    rules: PartitionConfig, lengths: Ints, places: Ints | None, *, may_fail: bool
) -> tuple[tuple[float, ...], Ints]:
    """Edges by the lengths at `places` (None for all), and the class of every example."""
    if places is not None:
        edges, _ = _length_classes(rules, lengths[places], None, may_fail=may_fail)
        return edges, assign_classes(lengths, edges)
    if rules.length_edges is not None:
        return rules.length_edges, explicit_classes(lengths, rules.length_edges, may_be_empty=not may_fail)
    return length_classes(lengths, rules.num_length_classes, fewer_if_tied=not may_fail)


def _labels(
    config: DataConfig, train: TokenStore, *, is_used: bool
) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """The labels and the code of each example's; none where there are none, or so many that no one wants a histogram.

    Raises:
        DataError: the partitioner uses labels and there are fewer than two.
    """
    if train.labels is None:
        if is_used:
            raise DataError(
                f"data.label_field must be set when data.partition.name is {config.partition.name} by label, got null"
            )
        return (), None
    names, codes = encode_column(train.labels)
    if is_used and len(names) < 2 and config.partition.name != "quantity_skew":
        raise DataError(
            f"data.label_field={config.label_field!r} must hold at least 2 different values for "
            f"data.partition.name={config.partition.name}, got {len(names)}; choose data.partition.name=iid"
        )
    if not is_used and len(names) > MAX_LABELS_SHOWN:
        return (), None
    return names, codes


def _lengths(store: TokenStore, unit: str) -> Ints:
    columns = {"tokens": store.untruncated_tokens, "words": store.words, "characters": store.characters}
    return columns[unit]
