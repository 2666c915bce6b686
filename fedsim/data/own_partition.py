"""A partition by a function of the user's own (`data.partition.name=package.module:function`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Deal
from fedsim.errors import ConfigError, DataError
from fedsim.own import import_own, shown

KEY = "data.partition.name"


def deal_by_function(
    name: str,
    lengths: NDArray[np.int64],
    labels: Sequence[str] | None,
    num_clients: int,
    dirichlet_alpha: float,
    seed: int,
) -> Deal:
    """Deal examples out as a function says.

    It is called once, on every process with the same arguments, and must answer the same:

        function(lengths, labels, num_clients, dirichlet_alpha, seed) -> for each client the positions of its examples

    Two clients may hold the same example.

    Args:
        name: `package.module:function`.
        lengths: (N,) int64, untruncated, in `data.partition.length_unit`.
        labels: N values of `data.label_field` as texts; None where there are none.
        num_clients: K.
        dirichlet_alpha: `data.partition.dirichlet_alpha`, for the function's use.
        seed: `run.seed`, for the function's use.

    Raises:
        ConfigError: the function cannot be imported, or is none.
        DataError: it answers something else than at least one position for each client, none twice.
    """
    function = import_own(KEY, name)
    if not callable(function):
        raise ConfigError(f"{KEY} must name a partitioner or a function, and {name} is neither")
    given = None if labels is None else np.asarray(labels)
    answers = function(lengths.copy(), given, num_clients, dirichlet_alpha, seed)
    if not isinstance(answers, Sequence | np.ndarray) or len(answers) != num_clients:
        raise DataError(
            f"{KEY}={name} must return the examples of each of {num_clients} clients, got {shown(answers)}"
        )
    clients = [_positions(name, k, answer, lengths.size) for k, answer in enumerate(answers)]
    offsets = np.concatenate(([0], np.cumsum([client.size for client in clients]))).astype(np.int64)
    indices = np.concatenate(clients)
    held = np.unique(indices).size
    twice = indices.size - held
    policy = f"as {name} says; {lengths.size - held} examples go to nobody"
    return Deal(
        indices,
        offsets,
        {"policy": f"{policy}, {twice} places are of examples that another client holds too"},
    )


def _positions(name: str, client_id: int, answer: Any, num_examples: int) -> NDArray[np.int64]:
    """A client's examples, ascending."""
    try:
        found = np.asarray(answer)
    except ValueError:  # lists of different lengths
        found = np.empty((0, 0))
    is_right = found.ndim == 1 and found.size > 0 and np.issubdtype(found.dtype, np.integer)
    if is_right:
        found = np.sort(found.astype(np.int64))
        is_right = found[0] >= 0 and found[-1] < num_examples and bool((found[1:] > found[:-1]).all())
    if not is_right:
        raise DataError(
            f"{KEY}={name} must give each client at least one position of an example, whole numbers from 0 to "
            f"{num_examples - 1} and none twice, got {shown(answer)} for client {client_id}"
        )
    return found
