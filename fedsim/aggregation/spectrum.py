"""Adapters from singular values, and what singular values say about a round.

Shapes: o / i = out / in features of a module, r = LoRA rank, q = components of a decomposition.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import torch

from fedsim.aggregation.averaging import client_weights
from fedsim.aggregation.strategy import Aggregated, FactorStream, Federation
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import initial_down
from fedsim.lora.stacks import WeightedSum
from fedsim.lora.state import ServerState
from fedsim.lora.svd import Svd, sum_svd
from fedsim.lora.updates import ClientReport

Holder = Literal["A", "B"]
"""The factor that the singular values are multiplied into."""

ENERGY = "spectrum/energy"

NO_TIERS: Mapping[int, int] = MappingProxyType({})
MOST_TIERS = 16


def factors_of(
    svd: Svd, federation: Federation, module: str, lora_rank: int, dtype: torch.dtype, holder: Holder = "B"
) -> LoraFactors:
    """The best approximation of some rank as factors sorted by singular value, s = federation.scaling(r):

        holder B: A = V_r^T, B = U_r S_r / s        holder A: A = S_r V_r^T, B = U_r / s

    Where the decomposed matrix has a smaller rank than r, the last columns of B are 0 and the last rows of A are those
    of the run's initial adapter: with both at 0 they would never get a gradient, and an adapter of round 0, B = 0, is
    as it was at the start.

    Args:
        svd: with min(r, R, o, i) components, or more.
        federation: of the run.
        module: dotted path.
        lora_rank: r.
        dtype: of the result.
        holder: see above.

    Returns:
        Factors of rank r with scaling s, newly allocated on the device of `svd`.
    """
    scaling = federation.scaling(lora_rank)
    kept = min(lora_rank, int((svd.S > 0).sum()))
    values = svd.S[:kept]
    up, down = svd.U[:, :kept], svd.Vh[:kept]
    if holder == "B":
        up = up * values
    else:
        down = down * values.unsqueeze(1)
    A = svd.Vh.new_zeros(lora_rank, svd.Vh.shape[1], dtype=dtype)
    B = svd.U.new_zeros(svd.U.shape[0], lora_rank, dtype=dtype)
    A[:kept] = down
    B[:, :kept] = up / scaling
    if kept < lora_rank:
        A[kept:] = initial_down(module, lora_rank, A.shape[1], federation.seed)[kept:]
    return LoraFactors(A, B, scaling)


def aggregate_by_svd(
    federation: Federation,
    state: ServerState,
    reports: Sequence[ClientReport],
    factors: FactorStream,
    holder: Holder,
) -> Aggregated:
    """The next state with the best approximation of largest rank of each module's W = sum_k p_k scaling_k B_k A_k.

    The server step of FlexLoRA (arXiv 2402.11505) and HLoRA (arXiv 2503.00813), with the figures of its spectrum and,
    where the cohort has one LoRA rank, `gap_to_averaged_factors`.

    Args:
        federation: of the run; weights p_k and largest ranks are its.
        state: before the round.
        reports: K reports in client_id order.
        factors: the same K clients' factors, module by module.
        holder: the factor that gets the singular values, see `factors_of`.
    """
    weights = client_weights(reports, federation.weighting)
    adapter, figures, spectra = {}, {}, {}
    for module, cohort in factors:
        largest = federation.max_ranks[module]
        total = WeightedSum(cohort, weights)
        svd = sum_svd(total, largest)
        adapter[module] = factors_of(svd, federation, module, largest, cohort[0].A.dtype, holder)
        ranks = [client.rank for client in cohort]
        figures[module] = spectrum_figures(svd, ranks, total.total_rank, federation.ranks_by_tier(module))
        if len(set(ranks)) == 1:
            gap = gap_to_averaged_factors(cohort, weights, svd.energy)
            figures[module]["spectrum/gap_to_averaged_factors"] = gap
        spectra[module] = tuple(svd.S.tolist())
    after = replace(state, round_index=state.round_index + 1, adapter=AdapterState(adapter))
    return Aggregated(after, figures, spectra)


def gap_to_averaged_factors(cohort: Sequence[LoraFactors], weights: Sequence[float], energy: float) -> float:
    """How far averaging the factors apart, as FedAvg and FedIT do, is from averaging the products:

        ||W - (sum_k p_k scaling_k B_k) (sum_k p_k A_k)||_F / ||W||_F,    W = sum_k p_k scaling_k B_k A_k

    0 for equal clients and for W = 0. Nothing larger than a factor is formed; of a gap below about 1e-7 only rounding
    is left.

    Args:
        cohort: K factors of one module and one LoRA rank.
        weights: K values p_k.
        energy: ||W||_F^2.
    """
    if energy <= 0:
        return 0.0
    pairs = [
        (p * client.scaling * client.B.double(), client.A.double())
        for p, client in zip(weights, cohort, strict=True)
    ]
    up = torch.stack([B for B, _ in pairs]).sum(dim=0)
    down = torch.stack([p * A for p, (_, A) in zip(weights, pairs, strict=True)]).sum(dim=0)
    shared = math.fsum(float(((B.mT @ up) * (A @ down.mT)).sum()) for B, A in pairs)
    squared = energy + float(((up.mT @ up) * (down @ down.mT)).sum()) - 2 * shared
    return math.sqrt(max(0.0, squared) / energy)


def spectrum_figures(
    svd: Svd, lora_ranks: Collection[int], total_rank: int, tier_ranks: Mapping[int, int] = NO_TIERS
) -> dict[str, float]:
    """What truncation keeps of the average update W of a module, as figures for the record of a round.

        spectrum/energy_kept_rank_<r>          sum_{j <= r} s_j^2 / ||W||_F^2, for each LoRA rank of the cohort
        spectrum/energy_kept_tier_<t>          the same at the rank of each resource tier, drawn or not, by its place in
                                               tiers.json; not of more than `MOST_TIERS`
        spectrum/energy_beyond_smallest_rank   1 - that of the smallest rank of any tier, else of the cohort: what
                                               FlexLoRA's rank collapse (arXiv 2602.13486) takes away round by round
        spectrum/effective_rank                exp of the entropy of s_j^2 / sum_j s_j^2 over the components that the
                                               server keeps (Roy and Vetterli 2007, who take s_j instead of s_j^2)
        spectrum/total_rank                    of the stack that W was made from
        spectrum/energy                        ||W||_F^2

    For W = 0 nothing is lost: 1, 0, and an effective rank of 0.

    Args:
        svd: of W.
        lora_ranks: of the cohort's clients, in this module.
        total_rank: sum of the terms' ranks.
        tier_ranks: resource tier -> LoRA rank in this module.
    """
    squares = svd.S.square().tolist()
    energy = max(svd.energy, math.fsum(squares))

    def kept(rank: int) -> float:
        return math.fsum(squares[:rank]) / energy if energy > 0 else 1.0

    figures = {f"spectrum/energy_kept_rank_{rank}": kept(rank) for rank in sorted(set(lora_ranks))}
    if len(tier_ranks) <= MOST_TIERS:
        figures |= {f"spectrum/energy_kept_tier_{tier}": kept(rank) for tier, rank in tier_ranks.items()}
    return figures | {
        "spectrum/energy_beyond_smallest_rank": 1.0 - kept(min(tier_ranks.values() or lora_ranks)),
        "spectrum/effective_rank": _effective_rank(squares),
        "spectrum/total_rank": float(total_rank),
        ENERGY: energy,
    }


def spectra_with_energy(
    spectra: Mapping[str, tuple[float, ...]], by_module: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[float, ...]]:
    """Singular values by module, and as `<module>/energy` the one figure ||W||_F^2, what was cut off included.

    Without it nobody could tell from the values that the server keeps how much of W they hold.
    """
    energies = {
        f"{module}/energy": (by_module[module][ENERGY],)
        for module in spectra
        if ENERGY in by_module.get(module, {})
    }
    return {**spectra, **energies}


def _effective_rank(squares: list[float]) -> float:
    total = math.fsum(squares)
    if total == 0:
        return 0.0
    shares = [square / total for square in squares if square > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))
