"""From the configuration to token stores, length classes and a partition."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.cache import content_hash
from fedsim.config.schema import DataConfig, PartitionConfig
from fedsim.data.corpus import build_corpus
from fedsim.data.iid import deal_iid
from fedsim.data.length_skew import deal_length_skew
from fedsim.data.lengths import assign_classes, length_classes
from fedsim.data.partition import Deal, Partition, check_enough, split_clients
from fedsim.data.quantity_skew import deal_quantity_skew
from fedsim.data.tokens import TokenStore, build_token_store
from fedsim.seeding import numpy_generator

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
        DataError: the corpus cannot be read, or not be partitioned as asked.
        CacheError: the cache cannot be written or is damaged.
    """
    corpus = build_corpus(config, seed)
    train = build_token_store(corpus.train, tokenizer, config.max_tokens, config.on_empty, "training")
    test = build_token_store(corpus.test, tokenizer, config.max_tokens, config.on_empty, "test")
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
        DataError: there are too few examples, or (unless the partition is iid, which does not use the classes) the
            lengths do not have as many classes as asked for.
    """
    rules = config.partition
    check_enough(
        len(train), rules.num_clients, 1
    )  # before the classes, which such a corpus may not have either
    edges, classes = length_classes(
        _lengths(train, rules.length_unit), rules.num_length_classes, fewer_if_tied=rules.name == "iid"
    )
    deal = _deal(rules, classes, len(edges) + 1, numpy_generator(seed, "partition"))
    train_indices, train_offsets, test_indices, test_offsets = split_clients(
        deal, len(train), config.client_test_fraction, seed
    )
    return Partition(
        name=rules.name,
        train_indices=train_indices,
        train_offsets=train_offsets,
        test_indices=test_indices,
        test_offsets=test_offsets,
        classes=classes,
        class_edges=edges,
        length_unit=rules.length_unit,
        truncated=train.untruncated_tokens > train.num_tokens,
        notes=deal.notes,
    )


def _deal(rules: PartitionConfig, classes: Ints, num_classes: int, generator: np.random.Generator) -> Deal:
    """The one place that knows partitioners by name."""
    match rules.name:
        case "iid":
            return deal_iid(classes.size, rules.num_clients, rules.examples_per_client, generator)
        case "length_skew":
            return deal_length_skew(
                classes,
                num_classes,
                rules.num_clients,
                rules.dirichlet_alpha,
                rules.examples_per_client,
                generator,
            )
        case "quantity_skew":
            return deal_quantity_skew(
                classes, rules.num_clients, rules.dirichlet_alpha, rules.min_examples, generator
            )


def _lengths(store: TokenStore, unit: str) -> Ints:
    columns = {"tokens": store.untruncated_tokens, "words": store.words, "characters": store.characters}
    return columns[unit]
