"""The record of a round, from reports that are written out."""

import math

import pytest

from fedsim.server.metrics import round_metrics
from fedsim.server.round import RoundReport
from tests.cohorts import make_report


def report_of(**by_client: tuple[float, ...]) -> RoundReport:
    """A round without a global model; the clients differ in `by_client`."""
    clients = [
        make_report(index, **dict(zip(by_client, values, strict=True)))
        for index, values in enumerate(zip(*by_client.values(), strict=True))
    ]
    return RoundReport(
        round_index=0,
        clients=tuple(clients),
        num_dropped=0,
        num_packs=1,
        global_test=None,
        seconds={},
        train_seconds_by_rank=(1.0,),
        test_seconds_by_rank=(0.0,),
    )


def test_without_a_global_model_perplexity_is_that_of_the_mean_loss():
    metrics = round_metrics(report_of(test_loss_before=(4.0, 6.0), test_loss_after=(1.0, 3.0)), None)
    assert metrics["test/loss"] == 2.0
    assert metrics["test/perplexity"] == pytest.approx(math.e**2)
    assert metrics["test/perplexity"] != pytest.approx((math.e + math.e**3) / 2), "contrast: mean perplexity"


def test_the_training_loss_is_the_mean_over_clients_of_their_mean_over_steps():
    losses = {
        "train_loss_first": (4.0, 5.0),
        "train_loss_mean": (1.75, 2.0),
        "train_loss_last": (1.0, 0.5),
        "num_examples": (1, 99),
    }
    assert round_metrics(report_of(**losses), None)["train/loss"] == 1.875
