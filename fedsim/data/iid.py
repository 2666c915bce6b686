"""Equal shares at random."""

import numpy as np

from fedsim.data.partition import Deal, equal_share


def deal_iid(
    num_examples: int, num_clients: int, examples_per_client: int | None, generator: np.random.Generator
) -> Deal:
    """Deal a random permutation out in equal shares.

    Args:
        num_examples: N.
        num_clients: K.
        examples_per_client: n; None: floor(N / K).

    Returns:
        K shares of n examples; the other N - n K examples go to nobody.

    Raises:
        DataError: n K > N, or N < K.
    """
    share = equal_share(num_examples, num_clients, examples_per_client)
    dealt = generator.permutation(num_examples)[: share * num_clients].reshape(num_clients, share)
    offsets = np.arange(num_clients + 1, dtype=np.int64) * share
    notes = {
        "policy": f"a random permutation in equal shares of {share}; {num_examples - dealt.size} examples go to nobody"
    }
    return Deal(np.sort(dealt, axis=1).reshape(-1), offsets, notes)
