"""Length classes: quantile classes of the untruncated length (arXiv 2502.18910: 5 classes, used as labels).

N = number of examples, C = number of classes.
"""

import logging

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import DataError

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


def length_classes(
    lengths: ArrayLike, num_classes: int, *, fewer_if_tied: bool = False
) -> tuple[tuple[float, ...], Ints]:
    """Cut lengths into classes that are as equal in size as ties allow.

    The edge above class c is the (c + 1) / C quantile, always a length that occurs; class c holds the lengths in
    (edge c - 1, edge c]. Equal lengths therefore share a class, whatever their order.

    Args:
        lengths: (N,) untruncated lengths, N > 0.
        num_classes: C.
        fewer_if_tied: where several quantiles fall on one length, merge those classes instead of raising.

    Returns:
        The C - 1 inner edges, strictly increasing, and the (N,) class of each example. No class is empty.

    Raises:
        DataError: the lengths do not have C distinct classes and `fewer_if_tied` is False.
    """
    values = np.asarray(lengths)
    in_order = np.sort(values)
    edges = _quantile_edges(in_order, num_classes)
    distinct = np.unique(edges[edges < in_order[-1]])
    if distinct.size < num_classes - 1:
        if not fewer_if_tied:
            raise DataError(_too_many_classes(in_order, num_classes))
        logger.info(
            "data.partition.num_length_classes=%d: many examples are equally long, so losses are reported for "
            "%d length classes",
            num_classes,
            distinct.size + 1,
        )
    inner = tuple(float(edge) for edge in distinct)
    return inner, assign_classes(values, inner)


def explicit_classes(lengths: ArrayLike, edges: tuple[float, ...], *, may_be_empty: bool = False) -> Ints:
    """(N,) class of each length under edges from the configuration, as `assign_classes`.

    Args:
        edges: strictly ascending, in the unit of the lengths.
        may_be_empty: accept classes that hold no example.

    Raises:
        DataError: a class is empty and `may_be_empty` is False.
    """
    values = np.asarray(lengths)
    classes = assign_classes(values, edges)
    counts = np.bincount(classes, minlength=len(edges) + 1)
    if not may_be_empty and not counts.all():
        raise DataError(
            f"data.partition.length_edges must leave no length class empty, but the classes hold {counts.tolist()} "
            f"training examples (lengths {values.min()} to {values.max()}); choose edges within these lengths"
        )
    return classes


def assign_classes(lengths: ArrayLike, edges: tuple[float, ...]) -> Ints:
    """(N,) class of each length under edges from `length_classes`: the number of edges below it."""
    return np.searchsorted(np.asarray(edges, dtype=np.float64), np.asarray(lengths), side="left").astype(
        np.int64
    )


def _quantile_edges(in_order: NDArray[np.generic], num_classes: int) -> NDArray[np.generic]:
    """(C - 1,) inverted-CDF quantiles at 1/C ... (C - 1)/C of sorted lengths, in exact integer arithmetic."""
    ranks = -(-np.arange(1, num_classes) * in_order.size // num_classes)
    return in_order[ranks - 1]


def _too_many_classes(in_order: NDArray[np.generic], num_classes: int) -> str:
    possible = num_classes - 1
    while possible > 1:
        edges = _quantile_edges(in_order, possible)
        if np.unique(edges[edges < in_order[-1]]).size == possible - 1:
            break
        possible -= 1
    remedy = (
        f"set it to {possible} or less"
        if possible > 1
        else "choose data.partition.name=iid, or quantity_skew with data.partition.num_length_classes=1"
    )
    return (
        f"data.partition.num_length_classes={num_classes} needs as many distinct quantile classes, but the "
        f"{in_order.size} training examples (lengths {in_order[0]} to {in_order[-1]}, "
        f"{np.unique(in_order).size} distinct) allow at most {possible}; {remedy}"
    )
