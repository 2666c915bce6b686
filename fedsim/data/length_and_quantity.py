"""Dirichlet sizes and a Dirichlet mix of classes for each client, no example in two clients.

N = examples, K = clients, C = classes.
"""

import numpy as np
from numpy.typing import NDArray

from fedsim.data.class_mixes import deal_class_mixes
from fedsim.data.partition import Deal, check_enough
from fedsim.data.quantity_skew import draw_sizes

Ints = NDArray[np.int64]


def deal_length_and_quantity(
    classes: Ints,
    num_classes: int,
    num_clients: int,
    dirichlet_alpha: float,
    quantity_alpha: float,
    min_examples: int,
    generator: np.random.Generator,
) -> Deal:
    """Deal all N examples out: sizes as under `quantity_skew`, class mixes as under `length_skew`.

    `deal_class_mixes` says what becomes of draws that the corpus cannot fill without repetition. A large client comes
    near the corpus's mix whatever it has drawn: it holds most of what there is.

    Args:
        classes: (N,) class of each example; no class is empty.
        num_classes: C.
        num_clients: K.
        dirichlet_alpha: concentration of the symmetric Dirichlet distribution of a client's class mix, > 0.
        quantity_alpha: the same of the clients' sizes, > 0.
        min_examples: a client whose share would be smaller is raised to this.

    Raises:
        DataError: K * min_examples > N, or there are too many clients times classes.
    """
    check_enough(classes.size, num_clients, min_examples)
    sizes, num_raised = draw_sizes(num_clients, classes.size, quantity_alpha, min_examples, generator)
    deal = deal_class_mixes(classes, num_classes, sizes, dirichlet_alpha, generator)
    notes = {
        "policy": f"sizes drawn from Dirichlet({quantity_alpha:g}); those below {min_examples} examples are raised to "
        f"that and the others scaled down alike; class mixes drawn from Dirichlet({dirichlet_alpha:g}), fitted to the "
        "sizes and the corpus by iterative proportional fitting so that no example is used twice; every example is "
        "used",
        "clients_below_minimum": num_raised,
        **deal.notes,
    }
    return Deal(deal.indices, deal.offsets, notes)
