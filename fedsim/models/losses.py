"""Cross-entropy of label tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.data.batches import IGNORED


def label_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each label token, in nats.

    Args:
        logits: (b, L, vocabulary).
        targets: (b, L) int64, the id that position t must predict, or `IGNORED`.

    Returns:
        (number of label tokens,), row by row, in float32, or float64 if the logits are.
    """
    scored = targets != IGNORED
    rows = logits[scored]
    if rows.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    return F.cross_entropy(rows, targets[scored], reduction="none")
