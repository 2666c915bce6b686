"""Means over a cohort by way of sums over packs: what travels does not grow with the number of clients.

A pack's clients and their order do not depend on the number of processes, nor does the order in which packs are added
up; so neither do the bits of the mean.

Letters: k = client, n_k = its weight before it is divided by the cohort's sum, x = any value of an adapter.
"""

from collections.abc import Iterator, Sequence

import torch

from fedsim.aggregation.averaging import client_counts
from fedsim.aggregation.strategy import ClientWeights, FactorStream
from fedsim.errors import AggregationError
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import Sides, absent
from fedsim.lora.updates import POOLED_CLIENT, ClientReport, ClientUpdate


def pack_sum(
    updates: Sequence[ClientUpdate], like: AdapterState, weighting: ClientWeights, sides: Sides
) -> AdapterState:
    """sum_k n_k x_k over the clients of a pack, unscaled by lora_alpha / r.

    Args:
        updates: of the pack's clients, at least one, in the pack's order.
        like: the server's adapter, whose modules, LoRA ranks and scalings they share.
        weighting: what n_k is.
        sides: factors that travel; the others are `absent`.

    Returns:
        Factors in float64 with the scalings of `like`, on the device of the updates.

    Raises:
        AggregationError: modules, LoRA ranks or scalings differ.
    """
    kinds = _kinds(like)
    for update in updates:
        if _kinds(update.adapter) != kinds:
            raise AggregationError(
                "averaging factors needs one LoRA rank and scaling among server and clients, got LoRA ranks "
                f"{sorted({f.rank for f in update.adapter.values()})} for {sorted({f.rank for f in like.values()})}"
            )
    device = next(iter(updates[0].adapter.values())).A.device
    size = sum(getattr(factors, side).numel() for factors in like.values() for side in sorted(sides))
    total = torch.zeros(size, dtype=torch.float64, device=device)
    counts = client_counts([update.report for update in updates], weighting)
    for update, count in zip(updates, counts, strict=True):
        parts = [
            getattr(factors, side).reshape(-1)
            for factors in update.adapter.values()
            for side in sorted(sides)
        ]
        if parts:
            # all modules at once: for small adapters a call for each costs more than its arithmetic
            total.add_(torch.cat(parts), alpha=count)
    return _cut(total, like, sides)


def mean_stream(
    sums: FactorStream,
    reports: Sequence[ClientReport],
    like: AdapterState,
    weighting: ClientWeights,
    sides: Sides,
) -> Iterator[tuple[str, tuple[LoraFactors, ...]]]:
    """The stream of one virtual client that holds the cohort's mean.

        x = (sum over packs of sum_k n_k x_k) / sum_k n_k

    in float64, packs in the order given, rounded once to the dtype of `like`.

    Args:
        sums: what `pack_sum` returned for each pack, streamed module by module.
        reports: of the whole cohort.
        like: the server's adapter.
        weighting: what n_k is.
        sides: factors that travel; the others stay `absent`.

    Raises:
        AggregationError: no weight is positive.
    """
    whole = sum(client_counts(reports, weighting))
    if whole <= 0:
        raise AggregationError(f"client weights ({weighting}) must have a positive sum, got {whole}")
    for module, parts in sums:
        old, means = like[module], {}
        for side in ("A", "B"):
            value = getattr(old, side)
            if side in sides:
                total = torch.zeros_like(value, dtype=torch.float64)
                for part in parts:
                    total += getattr(part, side)
                means[side] = (total / whole).to(value.dtype)
            else:
                means[side] = absent(tuple(value.shape), value.dtype, value.device)
        yield module, (LoraFactors(means["A"], means["B"], old.scaling),)


def virtual_report(adapter: AdapterState) -> ClientReport:
    """The report of the one client that stands for a cohort: of weight 1, and otherwise empty.

    Args:
        adapter: of the LoRA ranks that it has.
    """
    return ClientReport(
        client_id=POOLED_CLIENT, num_examples=1, num_tokens=1,
        lora_rank=max((factors.rank for factors in adapter.values()), default=0),
        steps=0, train_loss_first=0.0, train_loss_last=0.0, train_loss_mean=0.0, trained_tokens=0,
        trained_parameters=0, lr_sum=0.0, uplink_bytes=0, downlink_bytes=0, pack=0, process_rank=0, seconds=0.0,
    )  # fmt: skip


def _kinds(adapter: AdapterState) -> list[tuple[object, ...]]:
    return [(module, f.A.shape, f.B.shape, f.scaling) for module, f in adapter.items()]


def _cut(flat: torch.Tensor, like: AdapterState, sides: Sides) -> AdapterState:
    """Factors that are views of `flat`, which holds some sides of the modules of `like` in their order."""
    modules, position = {}, 0
    for module, factors in like.items():
        cut = {}
        for side in ("A", "B"):
            shape = getattr(factors, side).shape
            if side in sides:
                cut[side] = flat[position : position + shape.numel()].view(shape)
                position += shape.numel()
            else:
                cut[side] = absent(tuple(shape), flat.dtype, flat.device)
        modules[module] = LoraFactors(cut["A"], cut["B"], factors.scaling)
    return AdapterState(modules)
