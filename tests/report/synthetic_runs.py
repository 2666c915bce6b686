"""Run folders in the real format, written by the code that writes those of real runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsim.config.loader import load_config, to_tree, to_yaml
from fedsim.data.partition import Partition
from fedsim.evaluation.losses import LossSums
from fedsim.lora.updates import ClientReport
from fedsim.server.metrics import client_rows, round_metrics
from fedsim.server.round import RoundReport
from fedsim.tracking.metrics import ClientTable, MetricsLog
from fedsim.tracking.run_folder import open_run_folder

NUM_CLASSES = 3


def write_run(
    folder,
    *overrides,
    name=None,
    seed=0,
    rounds=3,
    recorded=None,
    num_clients=6,
    cohort=3,
    evaluate=True,
    client_tests=True,
    spectra=False,
    labels=False,
    status="finished",
    reason=None,
    better_by=0.0,
    info=None,
    extra=None,
    tiers=None,
    values=None,
):
    """A run of `recorded` rounds (default: all of them); returns its folder.

    `better_by` is taken from every loss; the other losses follow from round, client and seed.

    `extra` gives further metrics of a round, also in place of those that are there; `tiers` the LoRA ranks of tiers by
    module, which clients take in turn, each with other costs; `values` what `spectra.jsonl` has of a round.
    """
    name = name or f"run-{seed}"
    config = load_config(
        None,
        [
            f"run.name={name}",
            f"run.seed={seed}",
            f"run.rounds={rounds}",
            f"data.partition.num_clients={num_clients}",
            f"data.partition.num_length_classes={NUM_CLASSES}",
            f"cohort.size={min(cohort, num_clients)}",
            *overrides,
        ],
    )
    path = Path(folder) / name
    with open_run_folder(path, to_tree(config), to_yaml(config), ["run.rounds"]) as run_folder:
        run_folder.start({"source": {"commit": "c" * 40, "dirty": False}, "world_size": 2, **(info or {})})
        (path / "partition.json").write_text(json.dumps(make_partition(num_clients, seed, labels).to_json()))
        if tiers:
            (path / "tiers.json").write_text(json.dumps(make_tiers(tiers, num_clients)))
        metrics, spectra_log = MetricsLog(path / "metrics.jsonl"), MetricsLog(path / "spectra.jsonl")
        clients = ClientTable(path / "clients.parquet")
        for round_index in range(rounds if recorded is None else recorded):
            report = make_report(
                round_index, num_clients, cohort, seed, better_by, evaluate, client_tests, spectra
            )
            if tiers:
                costed = tuple(of_tier(client, len(tiers), seed) for client in report.clients)
                report = replace(report, clients=costed)
            if values:
                report = replace(report, spectra=values(round_index))
            record = round_metrics(report, 0.298)
            if round_index == 0 and evaluate:
                record["test/loss_initial"] = 5.5
            if extra:
                record |= extra(round_index)
            metrics.append(record)
            clients.append_rows(client_rows(report))
            if report.spectra:
                spectra_log.append({"round_index": round_index, **report.spectra})
        clients.flush()
        if status != "running":
            run_folder.finish(status, reason)
    return path


def make_tiers(tiers, num_clients):
    """As `Tiers.to_json` writes them; client k is of tier k modulo their number."""
    tier_of = [client % len(tiers) for client in range(num_clients)]
    described = [
        {"name": f"type {index + 1}", "num_clients": tier_of.count(index), "lora_ranks": ranks}
        for index, ranks in enumerate(tiers)
    ]
    return {"tiers": described, "tier_of": tier_of}


def of_tier(client, num_tiers, seed):
    """The report of a client with the costs of its tier."""
    tier = client.client_id % num_tiers
    return replace(
        client,
        lora_rank=2 * (tier + 1),
        trained_parameters=1024 * (tier + 1),
        uplink_bytes=4096 * (tier + 1),
        downlink_bytes=4096 * (tier + 1),
        steps=3 + tier,
        seconds=0.5 + tier + 0.125 * client.client_id + 0.25 * seed,
    )


def make_partition(num_clients, seed, labels):
    """Each client holds some examples of every class; the last client holds most."""
    sizes = np.full(num_clients, 6)
    sizes[-1] += 4
    total = int(sizes.sum())
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Partition(
        name="length_skew",
        train_indices=np.arange(total),
        train_offsets=offsets,
        test_indices=np.empty(0, dtype=np.int64),
        test_offsets=np.zeros(num_clients + 1, dtype=np.int64),
        classes=(np.arange(total) * (seed + 1)) % NUM_CLASSES,
        class_edges=(10.0, 20.0),
        length_unit="tokens",
        truncated=np.zeros(total, dtype=bool),
        notes={},
        labels=np.arange(total) % 2 if labels else None,
        label_names=("good $", "_bad $") if labels else (),
    )


def make_report(round_index, num_clients, cohort, seed, better_by, evaluate, client_tests, spectra):
    def loss(client_id):
        return 5.0 - 0.2 * round_index - 0.01 * client_id + 0.03 * seed - better_by

    chosen = sorted((round_index + place) % num_clients for place in range(min(cohort, num_clients)))
    reports = tuple(
        ClientReport(
            client_id=client_id,
            num_examples=6,
            num_tokens=60,
            lora_rank=2,
            steps=3,
            train_loss_first=loss(client_id) + 0.2,
            train_loss_last=loss(client_id),
            train_loss_mean=loss(client_id) + 0.1,
            trained_tokens=60,
            trained_parameters=1024,
            lr_sum=0.01,
            uplink_bytes=4096,
            downlink_bytes=4096,
            pack=0,
            process_rank=0,
            seconds=0.5,
            test_loss_before=loss(client_id) + 0.1 if client_tests else None,
            test_loss_after=loss(client_id) if client_tests else None,
        )
        for client_id in chosen
    )
    tokens = np.array([10, 20, 30])
    means = loss(0) + np.array([0.1, 0.0, -0.1])
    train_s = 2.0 + 0.1 * seed
    return RoundReport(
        round_index=round_index,
        clients=reports,
        num_dropped=0,
        num_packs=1,
        global_test=LossSums(means * tokens, tokens) if evaluate else None,
        seconds={
            "train_s": train_s,
            "wait_s": 0.1,
            "gather_s": 0.2,
            "aggregate_s": 0.3,
            "evaluate_s": 0.4,
            "round_s": train_s + 1.0,
        },
        train_seconds_by_rank=(train_s, train_s),
        test_seconds_by_rank=(0.0, 0.0),
        figures={
            "spectrum/energy_beyond_smallest_rank": 0.1 / (round_index + 1),
            "spectrum/effective_rank": 1.5,
        }
        if spectra
        else {},
        spectra={"layer.q": (1.0, 0.5, 0.0), "layer.v": (math.e, 0.2)} if spectra else {},
    )
