"""A Dirichlet mix of classes for each client, equal shares, no example in two clients (arXiv 2502.18910, label skew).

The classes are length classes for `length_skew` and the values of a column for `label_skew`.
N = examples, K = clients, C = classes, n = examples of each client.
"""

import numpy as np
from numpy.typing import NDArray

from fedsim.data.class_mixes import deal_class_mixes
from fedsim.data.partition import Deal, equal_share

Ints = NDArray[np.int64]


def deal_length_skew(
    classes: Ints,
    num_classes: int,
    num_clients: int,
    dirichlet_alpha: float,
    examples_per_client: int | None,
    generator: np.random.Generator,
) -> Deal:
    """Give each client n examples with a class mix drawn from Dirichlet(alpha), as far as the corpus has them.

    `deal_class_mixes` says what becomes of draws that the corpus cannot fill without repetition.

    Args:
        classes: (N,) class of each example; no class is empty.
        num_classes: C.
        num_clients: K.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution, > 0.
        examples_per_client: n; None: floor(N / K).

    Raises:
        DataError: n K > N, or N < K, or there are too many clients times classes.
    """
    share = equal_share(classes.size, num_clients, examples_per_client)
    sizes = np.full(num_clients, share, dtype=np.int64)
    deal = deal_class_mixes(classes, num_classes, sizes, dirichlet_alpha, generator)
    notes = {
        "policy": f"equal shares of {share} with class mixes drawn from Dirichlet({dirichlet_alpha:g}), fitted to the "
        "corpus's class shares by iterative proportional fitting so that no example is used twice; "
        f"{classes.size - deal.indices.size} examples go to nobody",
        **deal.notes,
    }
    return Deal(deal.indices, deal.offsets, notes)
