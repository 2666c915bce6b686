"""Columns of texts (labels, natural clients) as integer codes.

N = examples, V = distinct values.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def encode_column(values: Sequence[str]) -> tuple[tuple[str, ...], Ints]:
    """The distinct values of a column in ascending order of their text, and the (N,) position of each one's value.

    The order of the rows does not matter to the codes.
    """
    import pyarrow as pa

    encoded = pa.array(values, pa.string()).dictionary_encode()
    found = encoded.dictionary.to_pylist()
    order = sorted(range(len(found)), key=found.__getitem__)
    codes = np.empty(len(found), dtype=np.int64)
    codes[order] = np.arange(len(found))
    return tuple(found[place] for place in order), codes[encoded.indices.to_numpy(zero_copy_only=False)]
