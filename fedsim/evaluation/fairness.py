"""How evenly a model serves the clients."""

import math
from collections.abc import Sequence


def population_variance(losses: Sequence[float]) -> float:
    """Mean squared distance from the mean: the fairness of arXiv 2502.18910 over client test losses."""
    mean = math.fsum(losses) / len(losses)
    return math.fsum((loss - mean) ** 2 for loss in losses) / len(losses)


def worst_share_mean(losses: Sequence[float], share: float = 0.1) -> float:
    """Mean loss of the worst `share` of the clients, at least one of them."""
    count = max(1, math.ceil(share * len(losses)))
    return math.fsum(sorted(losses, reverse=True)[:count]) / count


def fairness_metrics(losses: Sequence[float], suffix: str = "") -> dict[str, float]:
    """Mean, population variance, worst loss and mean of the worst 10 % of client test losses.

    Args:
        losses: one loss for each client, in nats per label token; at least one.
        suffix: appended to each key.
    """
    return {
        f"fairness/test_loss_mean{suffix}": math.fsum(losses) / len(losses),
        f"fairness/test_loss_variance{suffix}": population_variance(losses),
        f"fairness/test_loss_max{suffix}": max(losses),
        f"fairness/test_loss_worst_10pct{suffix}": worst_share_mean(losses),
    }
