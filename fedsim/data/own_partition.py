"""A partition by a function of the user's own (`data.partition.name=package.module:function`)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.data.partition import Deal
from fedsim.errors import DataError
from fedsim.own import call_own, shown

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

    It is called twice, on every process with the same arguments, and must answer the same each time:

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
        ConfigError: the function cannot be imported, is none, or takes other arguments.
        DataError: it answers something else than at least one position for each client, none twice, or something else
            each time.
    """
    given = None if labels is None else np.asarray(labels)

    def ask() -> list[NDArray[np.int64]]:
        parameters = "lengths, labels, num_clients, dirichlet_alpha, seed"
        own_labels = None if given is None else given.copy()
        return _clients(
            name,
            call_own(KEY, name, parameters, lengths.copy(), own_labels, num_clients, dirichlet_alpha, seed),
            num_clients,
            lengths.size,
        )

    clients = ask()
    if any(not np.array_equal(one, other) for one, other in zip(clients, ask(), strict=True)):
        raise DataError(
            f"{KEY}={name} must deal the same again when it is called again, and does not; draw from "
            "numpy.random.default_rng(seed)"
        )
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


def _clients(name: str, answers: Any, num_clients: int, num_examples: int) -> list[NDArray[np.int64]]:
    if not isinstance(answers, Sequence | np.ndarray) or len(answers) != num_clients:
        raise DataError(
            f"{KEY}={name} must return the examples of each of {num_clients} clients, got {shown(answers)}"
        )
    return [_positions(name, k, answer, num_examples) for k, answer in enumerate(answers)]


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
