"""A whole round, alone and on several processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.aggregation.build import build_strategy
from fedsim.comm.group import Group, SoloGroup
from fedsim.data.build import FederatedData
from fedsim.data.lengths import length_classes
from fedsim.data.partition import Partition
from fedsim.evaluation.clients import CommonTest
from fedsim.evaluation.losses import LossEvaluator
from fedsim.evaluation.scorers import PackedScorer, PaddedScorer, Scorer
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.state import BestSoFar, ServerState
from fedsim.lora.updates import POOLED_CLIENT
from fedsim.models.adapted import AdaptedModel
from fedsim.models.base_update import UpdatableBase
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.server.aggregation import Aggregator
from fedsim.server.client_store import ClientStore
from fedsim.server.cohort import CohortPolicy, LocalBudget
from fedsim.server.early_stopping import StoppingRule
from fedsim.server.metrics import client_rows, round_metrics
from fedsim.server.round import measure_global, run_round
from fedsim.server.run import Run
from fedsim.server.tiers import Tiers
from fedsim.training.packed import PackedTrainer
from fedsim.training.sequential import SequentialTrainer
from fedsim.training.settings import LocalSettings, OptimizerSettings
from fedsim.training.trainer import Trainer
from tests.cohorts import make_federation
from tests.helpers import make_store, random_texts, run_ranks, tiny_opt

NUM_CLIENTS = 5


def make_data() -> FederatedData:
    """Five clients of 2, 4, 6, 8 and 10 examples."""
    train, test = make_store(random_texts(30, seed=1)), make_store(random_texts(24, seed=2))
    edges, classes = length_classes(train.num_tokens, 3, fewer_if_tied=False)
    sizes = np.arange(2, 12, 2)
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    nothing = np.zeros(NUM_CLIENTS + 1, dtype=np.int64)
    partition = Partition(
        "test", np.arange(30, dtype=np.int64), offsets, np.zeros(0, dtype=np.int64), nothing,
        classes, edges, "tokens", np.zeros(30, dtype=bool), {},
    )  # fmt: skip
    test_classes = np.searchsorted(np.asarray(edges), test.num_tokens)
    return FederatedData(train, test, classes, test_classes, edges, partition, "made up", "made up")


def make_run(
    group: Group,
    strategy: str = "fedavg",
    size: int = 4,
    num_packs: int = 4,
    packed: bool = True,
    folder: Path | None = None,
    ranks: tuple[int, ...] = (2,),
    sharded: bool = False,
    probability: float | None = None,
    arguments: dict | None = None,
    **around: Any,
) -> Run:
    """A run of five clients; client k is of tier k mod len(ranks)."""
    data = make_data()
    base = tiny_opt()
    targets = find_targets(base, ["q_proj", "v_proj"])
    updatable = UpdatableBase(base, targets)
    trainer: Trainer
    scorer: Scorer
    if packed:
        stacked = StackedModel(base, targets, torch.device("cpu"))
        trainer, scorer = PackedTrainer(stacked, data.train, 2, 60, False, group.rank), PackedScorer(stacked)
    else:
        model = AdaptedModel(base, targets, torch.device("cpu"))
        trainer, scorer = SequentialTrainer(model, data.train, 1, False, group.rank), PaddedScorer(model, 1)
    test = LossEvaluator(scorer, data.test, data.test_classes, 3, np.arange(24), batch_tokens=40)
    tiers = Tiers(tuple(dict.fromkeys(targets, rank) for rank in ranks), np.arange(NUM_CLIENTS) % len(ranks))
    federation = make_federation(
        targets=targets, num_clients=NUM_CLIENTS, cohort_size=size, max_ranks=tiers.max_ranks, seed=1
    )
    scaffold = strategy == "scaffold"
    return Run(
        group=group,
        data=data,
        strategy=build_strategy(strategy, federation, arguments, **around),
        aggregator=Aggregator(torch.device("cpu"), sharded),
        tiers=tiers,
        store=ClientStore(folder or Path("unused")),
        base=updatable,
        trainer=trainer,
        global_test=test,
        client_test=CommonTest(test),
        cohort=CohortPolicy(NUM_CLIENTS, size, None, probability),
        budget=LocalBudget(1, None, 3),
        local=LocalSettings(
            batch_size=3,
            accumulation=1,
            max_grad_norm=None if scaffold else 1.0,
            optimizer=OptimizerSettings(name="sgd", lr=0.1) if scaffold else OptimizerSettings(lr=1e-2),
            schedule="linear",
            warmup_steps=0,
            lora_dropout=0.2,
            base_dropout=False,
            seed=1,
        ),
        num_packs=num_packs,
        rounds=3,
        evaluate_every=1,
        seed=1,
    )


def start_state(ranks: tuple[int, ...] = (2,)) -> ServerState:
    targets = find_targets(tiny_opt(), ["q_proj", "v_proj"])
    return ServerState(0, initial_adapter(targets, dict.fromkeys(targets, max(ranks)), ScalingRule(16.0), 1))


def bits_of(state: ServerState) -> dict[str, tuple[bytes, bytes]]:
    return {
        f"{name}/{module}": (factors.A.numpy().tobytes(), factors.B.numpy().tobytes())
        for name, adapter in state.adapters().items()
        for module, factors in adapter.items()
    }


def three_rounds(
    group: Group,
    strategy: str = "fedavg",
    num_packs: int = 2,
    packed: bool = True,
    folder: Path | None = None,
    ranks: tuple[int, ...] = (2,),
    options: dict | None = None,
) -> dict[str, list]:
    """Everything that must not depend on the number of processes, as exact bytes."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # the store makes its own folder in it, as in a run folder
        folder = folder / f"{group.world_size}"
    run = make_run(group, strategy, 4, num_packs, packed, folder, ranks, **(options or {}))
    state = start_state(ranks)
    figures = []
    for _ in range(3):
        state, report = run_round(state, run)
        metrics = round_metrics(report, 0.0)
        figures.append(
            {k: v for k, v in metrics.items() if not k.startswith(("time/", "ranks/")) and "_per_s" not in k}
        )
        rows = [
            {k: v for k, v in row.items() if k not in ("process_rank", "seconds")}
            for row in client_rows(report)
        ]
        figures.append(rows)
        figures.append(dict(report.spectra))
    clients = [run.client(client_id, state).state for client_id in range(NUM_CLIENTS)]
    kept = [{name: tensor.numpy().tobytes() for name, tensor in client.items()} for client in clients]
    return {"figures": figures, "bits": [bits_of(state)], "clients": kept}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "sequential"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_processes(world_size, packed, tmp_path):
    """Packs of two clients with dropout, refilled slots and a token budget that cuts their steps."""
    alone = three_rounds(SoloGroup(), packed=packed)
    for result in run_ranks(three_rounds, world_size, tmp_path, "fedavg", 2, packed):
        assert result == alone


def test_more_ranks_than_clients_and_the_local_baseline(tmp_path):
    """Two packs of two clients on four ranks; each client has an adapter of its own on the disk."""
    alone = three_rounds(SoloGroup(), "local", 2, folder=tmp_path)
    assert all(len(kept) == 8 for kept in alone["clients"]), "all five clients were drawn in three rounds"
    for result in run_ranks(three_rounds, 4, tmp_path, "local", 2, True, tmp_path):
        assert result == alone


def test_sequential_packs_do_not_change_what_clients_learn():
    one, four = (three_rounds(SoloGroup(), num_packs=packs, packed=False)["bits"] for packs in (1, 4))
    assert one == four


def test_packed_and_sequential_rounds_agree_to_rounding():
    packed, sequential = (three_rounds(SoloGroup(), packed=flag) for flag in (True, False))
    for mine, theirs in zip(packed["figures"][::3], sequential["figures"][::3], strict=True):
        for key in ("test/loss", "train/loss", "fairness/test_loss_mean", "test/loss_length_class_1"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5)


def test_a_round_lowers_the_training_loss_and_reports_itself():
    run = make_run(SoloGroup())
    state, report = run_round(start_state(), run)
    assert state.round_index == 1
    assert [client.client_id for client in report.clients] == sorted({c.client_id for c in report.clients})
    assert len(report.clients) == 4
    metrics = round_metrics(report, 0.5)
    assert metrics["comm/uplink_bytes"] == 4 * state.adapter.num_bytes
    assert metrics["comm/downlink_bytes"] == 4 * state.adapter.num_bytes
    assert metrics["test/perplexity"] == pytest.approx(np.exp(metrics["test/loss"]))
    assert metrics["fairness/test_loss_variance_before"] == 0.0, (
        "all start from one adapter and share one test set"
    )
    assert metrics["fairness/test_loss_variance"] > 0.0
    assert {"time/round_s", "time/train_s", "time/gather_s", "time/aggregate_s"} <= set(metrics)
    assert 0 < metrics["time/client_tests_s"] < metrics["time/train_s"]
    training_s = metrics["time/train_s"] - metrics["time/client_tests_s"]
    assert metrics["train/tokens_per_s"] == pytest.approx(metrics["train/tokens"] / training_s)
    assert metrics["ranks/peak_memory_mib"] > 1


def test_global_loss_is_the_mean_over_label_tokens():
    """Against a loop over single sequences without padding."""
    run = make_run(SoloGroup())
    state = start_state()
    sums = measure_global(run, state, "evaluation")
    base = tiny_opt()
    losses = []
    for index in range(len(run.data.test)):
        ids = torch.from_numpy(run.data.test.sequence(index).astype(np.int64))[None]
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert sums.mean == pytest.approx(float(torch.cat(losses).mean()), abs=1e-6)
    per_sequence = float(torch.stack([loss.mean() for loss in losses]).mean())
    assert abs(sums.mean - per_sequence) > 1e-4, "a mean of means is another figure"
    for index in range(3):
        own = torch.cat([loss for loss, c in zip(losses, run.data.test_classes, strict=True) if c == index])
        assert sums.class_means()[index] == pytest.approx(float(own.mean()), abs=1e-6)


def test_centralized_pools_the_data_with_the_budget_of_the_cohort():
    run = make_run(SoloGroup(), "centralized")
    cohort_run = make_run(SoloGroup(), "fedavg")
    _, pooled = run_round(start_state(), run)
    _, federated = run_round(start_state(), cohort_run)
    assert [client.client_id for client in pooled.clients] == [POOLED_CLIENT]
    assert pooled.clients[0].num_examples == sum(client.num_examples for client in federated.clients)


def test_evaluation_rounds():
    run = make_run(SoloGroup())
    assert [run.evaluates(index) for index in range(3)] == [True, True, True]
    every_two = replace(run, evaluate_every=2)
    assert [every_two.evaluates(index) for index in range(3)] == [False, True, True]
    _, report = run_round(start_state(), every_two)
    assert report.global_test is None
    assert report.clients[0].test_loss_after is None
    assert "test/loss" not in round_metrics(report, 0.0)


def test_the_last_round_decides_nothing_unless_it_is_a_regular_evaluation():
    """A run may be extended, and would then not have been evaluated there."""
    run = replace(
        make_run(SoloGroup()), evaluate_every=2, stopping=StoppingRule("test/loss", False, False, 3)
    )
    beaten = BestSoFar(1e6, 0, 0)
    after_regular, regular = run_round(replace(start_state(), round_index=1, best=beaten), run)
    after_last, last = run_round(replace(start_state(), round_index=2, best=beaten), run)

    assert after_regular.best == BestSoFar(regular.global_test.mean, 2, 0)
    assert last.global_test.mean < beaten.score
    assert after_last.best == beaten


def test_each_clients_loss_before_is_that_of_its_own_start(tmp_path):
    """Without aggregation a client starts where it ended the round before."""
    run = make_run(SoloGroup(), "local", size=NUM_CLIENTS, num_packs=1, folder=tmp_path)
    state, first = run_round(start_state(), run)
    _, second = run_round(state, run)
    ends = [client.test_loss_after for client in first.clients]

    assert [client.test_loss_before for client in second.clients] == pytest.approx(ends, abs=1e-6)
    assert np.abs(np.diff(sorted(ends))).min() > 1e-5, "all clients differ, or one's loss could be another's"


def fail_on_one_rank(group: Group) -> str:
    from fedsim.errors import PeerError, TrainingError

    class Broken:
        def train(self, pack, plans, round_index):
            raise TrainingError("the loss of client 2 must stay finite, got nan")

    run = make_run(group)
    if group.rank == 1:
        run = replace(run, trainer=Broken())
    try:
        run_round(start_state(), run)
    except PeerError as error:
        return str(error)
    return "no error"


def test_a_failing_client_ends_all_ranks(tmp_path):
    expected = (
        "local training, round 0 failed on 1 of 2 ranks; rank 1: TrainingError: the loss of client 2 must stay "
        "finite, got nan"
    )
    assert run_ranks(fail_on_one_rank, 2, tmp_path) == [expected, expected]
