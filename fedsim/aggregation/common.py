"""What strategies share beyond weighted means.

Shapes: K clients in the cohort; A (r, i) and B (o, r) of one module, r = LoRA rank, i / o = in / out features.
"""

from collections.abc import Mapping, Sequence

import torch

from fedsim.aggregation.averaging import weighted_sum
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import Sides


def mean_of_sides(
    server: LoraFactors, cohort: Sequence[LoraFactors], weights: Sequence[float], sides: Sides
) -> LoraFactors:
    """The server's factors, with the cohort's weighted mean in place of each side that travelled.

        X = sum_k p_k X_k    for X in `sides`

    With one factor shared by all clients, this is exact: sum_k p_k s B_k A = s (sum_k p_k B_k) A.

    Args:
        server: of the same rank and scaling as the cohort's.
        cohort: K factors; sides that did not travel are not read.
        weights: K weights p_k, which sum to 1.
        sides: which travelled.

    Returns:
        Factors of the server's scaling; the side that did not travel is the server's own tensor.

    Raises:
        AggregationError: lengths, ranks or scalings differ.
    """
    if not cohort or len(cohort) != len(weights):
        raise AggregationError(f"need one weight for each client, got {len(weights)} for {len(cohort)}")
    kinds = {(factors.A.shape, factors.B.shape, factors.scaling) for factors in (server, *cohort)}
    if len(kinds) > 1:
        found = sorted({(factors.rank, factors.scaling) for factors in (server, *cohort)})
        raise AggregationError(
            "averaging factors needs one LoRA rank and scaling among server and clients, got (rank, scaling) "
            f"{found[:8]}"
        )
    return LoraFactors(
        weighted_sum([factors.A for factors in cohort], weights) if "A" in sides else server.A,
        weighted_sum([factors.B for factors in cohort], weights) if "B" in sides else server.B,
        server.scaling,
    )


def rank_note(lora_rank: int, like: LoraFactors) -> LoraFactors:
    """Factors of one in and one out feature that say a rank: so a state remembers the size of a stack it does not hold.

    All values are zero; they have the dtype and device of `like`.
    """
    return LoraFactors(like.A.new_zeros(lora_rank, 1), like.B.new_zeros(1, lora_rank), 1.0)


def noted_bytes(notes: AdapterState | None, targets: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of factors with the ranks and dtypes of `notes` for modules of full size; 0 without notes.

    Args:
        notes: module -> `rank_note`.
        targets: module -> (in, out features).
    """
    return sum(
        note.rank * sum(targets[module]) * torch.finfo(note.A.dtype).bits // 8
        for module, note in (notes or {}).items()
    )
