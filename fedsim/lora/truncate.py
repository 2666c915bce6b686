"""The first rank rows of an adapter, under the scaling of the smaller rank."""

from collections.abc import Mapping

from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.initial import ScalingRule


def first_rows(factors: LoraFactors, lora_rank: int, scaling: float) -> LoraFactors:
    """The part of the product that the first rows of A and columns of B make up, as factors with `scaling`.

    B is multiplied by the ratio of the scalings, so that scaling * B A is that part exactly; A is a view. The factors
    themselves if they have no more rows and this scaling.
    """
    if lora_rank >= factors.rank and scaling == factors.scaling:
        return factors
    up = factors.B[:, :lora_rank]
    if scaling != factors.scaling:
        up = up * (factors.scaling / scaling)
    return LoraFactors(factors.A[:lora_rank], up, scaling)


def truncated(adapter: AdapterState, lora_ranks: Mapping[str, int], scaling: ScalingRule) -> AdapterState:
    """`first_rows` of each module, as many as `lora_ranks` says; the adapter itself if nothing changes."""
    modules = {}
    for module, factors in adapter.items():
        rank = min(lora_ranks[module], factors.rank)
        modules[module] = first_rows(factors, rank, scaling(rank))
    if all(modules[module] is factors for module, factors in adapter.items()):
        return adapter
    return AdapterState(modules)
