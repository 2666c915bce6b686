"""The record of a round, as `metrics.jsonl` and W&B get it."""

import math

from fedsim.evaluation.fairness import fairness_metrics
from fedsim.evaluation.losses import perplexity
from fedsim.lora.updates import ClientReport
from fedsim.server.round import RoundReport

Metrics = dict[str, int | float | None]


def round_metrics(report: RoundReport, pickled_payload_mib: float | None) -> Metrics:
    """One flat record of a round; keys are `group/name`, times in seconds, losses in nats per label token.

    Args:
        report: of the round.
        pickled_payload_mib: what one client sends, as arXiv 2502.18910, Table 1, counts it; None where unknown.
    """
    clients = report.clients
    busy_s = max(report.train_seconds_by_rank)
    train_s = max(
        busy - tests
        for busy, tests in zip(report.train_seconds_by_rank, report.test_seconds_by_rank, strict=True)
    )
    tokens = sum(client.trained_tokens for client in clients)
    metrics: Metrics = {
        "round_index": report.round_index,
        "cohort/num_clients": len(clients),
        "cohort/num_dropped": report.num_dropped,
        "cohort/num_examples": sum(client.num_examples for client in clients),
        "train/loss": _mean([client.train_loss_mean for client in clients]),
        "train/steps": sum(client.steps for client in clients),
        "train/tokens": tokens,
        "train/tokens_per_s": tokens / train_s,
        "train/clients_per_s": len(clients) / train_s,
        "comm/uplink_bytes": sum(client.uplink_bytes for client in clients) + report.unused_uplink_bytes,
        "comm/downlink_bytes": sum(client.downlink_bytes for client in clients)
        + report.unused_downlink_bytes,
        "comm/client_payload_bytes": max((client.uplink_bytes for client in clients), default=0),
        "packs/num_packs": report.num_packs,
        "packs/slot_occupancy": _mean([client.pack_occupancy for client in clients]),
        "packs/attention_padding": _mean([client.pack_padding for client in clients]),
        "ranks/idle_share": 1.0
        - sum(report.train_seconds_by_rank) / (len(report.train_seconds_by_rank) * busy_s),
    }
    if report.peak_memory_bytes:
        metrics["ranks/peak_memory_mib"] = report.peak_memory_bytes / 2**20
    if pickled_payload_mib is not None:
        metrics["comm/client_payload_pickled_mib"] = pickled_payload_mib
    metrics |= _participation_metrics(report)
    metrics |= report.figures
    metrics |= {f"time/{phase}": seconds for phase, seconds in report.seconds.items()}
    return metrics | _test_metrics(report)


def _mean(values: list[float]) -> float | None:
    """None for a round without clients."""
    return math.fsum(values) / len(values) if values else None


def _participation_metrics(report: RoundReport) -> Metrics:
    """Clients that did not report back or whose updates were not taken as they were, and the simulated clock."""
    turnout = report.turnout
    metrics: Metrics = {
        "cohort/num_clipped": report.num_clipped,
        "cohort/num_corrupted": report.num_corrupted,
    }
    if turnout is not None:
        metrics |= {
            "cohort/num_drawn": turnout.num_drawn,
            "cohort/num_lost": turnout.num_lost,
            "cohort/num_late": turnout.num_late,
            "cohort/num_surplus": turnout.num_surplus,
        }
        if turnout.round_s is not None:
            metrics |= {"simulated/round_s": turnout.round_s, "simulated/elapsed_s": report.simulated_s}
    return metrics


def _test_metrics(report: RoundReport) -> Metrics:
    before = _known([client.test_loss_before for client in report.clients])
    after = _known([client.test_loss_after for client in report.clients])
    metrics: Metrics = {}
    if before:
        metrics |= fairness_metrics(before, "_before")
    if after:
        metrics |= fairness_metrics(after)
    if report.global_test is not None:
        metrics["test/loss"] = report.global_test.mean
        metrics["test/perplexity"] = report.global_test.perplexity
        for index, loss in enumerate(report.global_test.class_means()):
            metrics[f"test/loss_length_class_{index}"] = loss
    elif after:
        # without a global model its place is taken by the average client
        metrics["test/loss"] = math.fsum(after) / len(after)
        metrics["test/perplexity"] = perplexity(math.fsum(after) / len(after))
    return metrics


def _known(losses: list[float | None]) -> list[float]:
    return [loss for loss in losses if loss is not None]


def client_rows(report: RoundReport) -> list[dict[str, int | float | None]]:
    """One row for each client of a round, as `clients.parquet` holds them."""
    return [_row(report.round_index, client) for client in report.clients]


def _row(round_index: int, client: ClientReport) -> dict[str, int | float | None]:
    return {
        "round_index": round_index,
        "client_id": client.client_id,
        "num_examples": client.num_examples,
        "num_tokens": client.num_tokens,
        "lora_rank": client.lora_rank,
        "steps": client.steps,
        "train_loss_first": client.train_loss_first,
        "train_loss_last": client.train_loss_last,
        "train_loss_mean": client.train_loss_mean,
        "test_loss_before": client.test_loss_before,
        "test_loss_after": client.test_loss_after,
        "trained_parameters": client.trained_parameters,
        "uplink_bytes": client.uplink_bytes,
        "downlink_bytes": client.downlink_bytes,
        "pack": client.pack,
        "process_rank": client.process_rank,
        "seconds": client.seconds,
        "simulated_s": client.simulated_s,
    }
