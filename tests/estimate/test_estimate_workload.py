"""What rounds amount to, against what the real engine and real processes do."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.comm.exchange import broadcast_state, gather_stacks
from fedsim.comm.group import Group
from fedsim.estimate.memory import training
from fedsim.estimate.traffic import round_traffic
from fedsim.estimate.workload import CountingScorer, Limits, PackWork, Work, Workload
from fedsim.evaluation.clients import CommonTest
from fedsim.evaluation.losses import LossEvaluator
from fedsim.lora.initial import ScalingRule, initial_adapter
from fedsim.lora.plan import BOTH, ClientPlan
from fedsim.lora.state import ServerState
from fedsim.models.packing import PackedTokens
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel
from fedsim.models.targets import find_targets
from fedsim.training import packed as packed_module
from fedsim.training.packed import PackedTrainer
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.settings import LocalSettings, OptimizerSettings
from tests.estimate.test_estimate_trace import costs_of
from tests.helpers import make_store, random_texts, run_ranks, tiny_opt

RANKS = (2, 1, 3, 2, 1)
EXAMPLES = (9, 4, 17, 6, 11)
STORE_TEXTS = 60


def settings(accumulation: int = 1) -> LocalSettings:
    return LocalSettings(
        batch_size=2,
        accumulation=accumulation,
        max_grad_norm=1.0,
        optimizer=OptimizerSettings("adamw", 1e-3, 0.0, 0.9, 0.999, 1e-8, 0.0),
        schedule="constant",
        warmup_steps=0,
        lora_dropout=0.0,
        base_dropout=False,
        proximal_mu=0.0,
        seed=3,
    )


def jobs(store: Any, accumulation: int = 1) -> tuple[ClientJob, ...]:
    starts = np.cumsum((0, *EXAMPLES))
    made = []
    for client, (start, end) in enumerate(pairwise(starts.tolist())):
        examples = np.arange(start, end, dtype=np.int64)
        tokens = int(store.num_tokens[examples].sum())
        labels = int(store.num_label_tokens[examples].sum())
        made.append(ClientJob(client, examples, labels, 1, None, tokens, settings(accumulation)))
    return tuple(made)


class _Tiers:
    """LoRA ranks of the five clients."""

    def lora_ranks(self, client_id: int, round_index: int) -> dict[str, int]:
        return {"m": RANKS[client_id]}


def workload(store: Any, limits: Limits) -> Workload:
    """Only what `pack_work` reads."""
    untyped: Any = Workload.__new__(Workload)
    for name, value in {
        "data": type("Data", (), {"train": store}),
        "tiers": _Tiers(),
        "limits": limits,
    }.items():
        object.__setattr__(untyped, name, value)
    made: Workload = untyped
    return made


def real_work(
    store: Any, pack: Pack, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> tuple[Work, list[int]]:
    """What the engine puts through the base when it trains the pack, and the rank rows that it holds."""
    seen: list[PackedTokens] = []
    steps: list[int] = []
    held: list[int] = []
    pack_tokens, step, init = packed_module.pack_tokens, PackedTrainer._step, RankRows.__init__

    def watched_pack(*arguments: Any) -> PackedTokens:
        seen.append(pack_tokens(*arguments))
        return seen[-1]

    def watched_step(self: PackedTrainer, *arguments: Any) -> None:
        steps.append(1)
        step(self, *arguments)

    def watched_init(self: RankRows, targets: Any, capacities: Any, *rest: Any) -> None:
        held.append(sum(capacities))
        init(self, targets, capacities, *rest)

    monkeypatch.setattr(packed_module, "pack_tokens", watched_pack)
    monkeypatch.setattr(PackedTrainer, "_step", watched_step)
    monkeypatch.setattr(packed_module.RankRows, "__init__", watched_init)
    model = tiny_opt()
    targets = find_targets(model, ["q_proj"])
    width = sum(i + o for i, o in targets.values())
    monkeypatch.setitem(packed_module.MAX_ROW_VALUES, "cpu", limits.max_rows * width)
    trainer = PackedTrainer(
        StackedModel(model, targets, torch.device("cpu")),
        store,
        limits.max_slots,
        limits.max_tokens,
        False,
        0,
    )
    plans = [
        ClientPlan(
            initial_adapter(targets, dict.fromkeys(targets, RANKS[job.client_id]), ScalingRule(16.0), 0)
        )
        for job in pack.jobs
    ]
    trainer.train(pack, plans, round_index=1)
    sizes = [packed.input_ids.numel() for packed in seen]
    squares = sum(
        int((np.diff(packed.layout.boundaries.numpy()).astype(np.int64) ** 2).sum()) for packed in seen
    )
    labels = sum(packed.label_rows.numel() for packed in seen)
    return Work(len(seen), len(steps), sum(sizes), labels, squares, 0, max(sizes)), held


@pytest.mark.parametrize(
    ("limits", "accumulation"),
    [
        (Limits(3, 60, 100, 32), 1),
        (Limits(8, 2048, 100, 32), 1),
        (Limits(2, 25, 100, 32), 3),
        (Limits(5, 60, 4, 32), 2),
        (Limits(1, 1, 100, 32), 1),
    ],
    ids=["refilled slots", "all at once", "accumulation", "few rank rows", "a row for each micro-batch"],
)
def test_rows_are_those_that_the_engine_makes(
    limits: Limits, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(random_texts(STORE_TEXTS))
    pack = Pack(0, jobs(store, accumulation))

    counted = workload(store, limits).pack_work(pack, 1)
    real, held = real_work(store, pack, limits, monkeypatch)

    assert held == [counted.rank_rows]
    for name in ("passes", "steps", "tokens", "label_tokens", "squares", "most_tokens"):
        assert getattr(counted.work, name) == getattr(real, name), name


def test_rank_tokens_are_the_gate_s_size_where_one_dense_product_does() -> None:
    store = make_store(random_texts(STORE_TEXTS))
    pack = Pack(0, jobs(store))
    together = workload(store, Limits(8, 10_000, 1000, 32)).pack_work(pack, 0)
    alone = workload(store, Limits(1, 10_000, 1000, 32)).pack_work(pack, 0)
    tokens = [int(store.num_tokens[job.examples].sum()) for job in pack.jobs]

    assert together.work.rank_tokens > alone.work.rank_tokens
    # one slot is as wide as the widest client that it will hold
    assert alone.work.rank_tokens == sum(tokens) * max(RANKS)


def test_one_after_another_is_counted_with_padding() -> None:
    store = make_store(random_texts(STORE_TEXTS))
    pack = Pack(0, jobs(store))

    padded = workload(store, Limits(8, 10_000, 1000, 32, padded=True)).pack_work(pack, 0)

    expected = sum(
        len(examples) * int(store.num_tokens[examples].max())
        for job in pack.jobs
        for step in job.batches(0)
        for examples in step
    )
    assert padded.work.tokens == padded.work.label_tokens == expected
    assert padded.num_slots == 1


class _WatchedScorer(CountingScorer):
    """Remembers the tokens of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def losses(self, adapters: Any, store: Any, parts: Any) -> Any:
        self.calls.append(sum(int(store.num_tokens[part].sum()) for part in parts))
        return super().losses(adapters, store, parts)


@pytest.mark.parametrize("shares_start", [True, False])
def test_an_adapter_that_all_start_from_is_tested_once(shares_start: bool) -> None:
    store = make_store(random_texts(STORE_TEXTS))
    scorer = _WatchedScorer()
    classes = np.zeros(len(store), dtype=np.int64)
    test = CommonTest(LossEvaluator(scorer, store, classes, 1, np.arange(STORE_TEXTS), 10_000))
    made: Any = workload(store, Limits(8, 100, 100, 32))
    one_tier = {"m": 2}
    made_tiers = type("Tiers", (), {"lora_ranks": staticmethod(lambda *_: one_tier)})
    for name, value in {
        "counter": scorer,
        "client_test": test,
        "shares_start": shares_start,
        "tiers": made_tiers,
    }.items():
        object.__setattr__(made, name, value)
    packs = [Pack(0, jobs(store)[:2]), Pack(1, jobs(store)[2:3])]

    work = made._client_tests(packs, 0)

    once = int(store.num_tokens.sum())
    assert work.tokens == sum(scorer.calls) == once * (3 + (1 if shares_start else 3))


class RecordingGroup:
    """A group that counts the bytes of its tensors."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.world_size, self.device = group.rank, group.world_size, group.device
        self.gathered = self.received = self.broadcasted = 0

    def gather_objects(self, value: Any) -> list[Any]:
        return self._group.gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        return self._group.broadcast_object(value)

    def start_gather(self, tensor: Tensor, root: int) -> Any:
        finish = self._group.start_gather(tensor, root)
        self.gathered += tensor.numel() * tensor.element_size()

        def count() -> list[Tensor]:
            parts = finish()
            self.received += sum(part.numel() * part.element_size() for part in parts)
            return parts

        return count

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        self.broadcasted += tensor.numel() * tensor.element_size()
        return self._group.broadcast(tensor, source)

    def note(self, what: str) -> None:
        self._group.note(what)

    def note_part(self, part: str) -> None:
        self._group.note_part(part)

    def close(self) -> None:
        self._group.close()


TARGETS = {"first": (12, 20), "second": (20, 8)}
CLIENTS = ((0, 2, 3), (1, 4))
"""Of the five clients, those of each process."""


def exchanged(group: Group) -> tuple[int, int, int]:
    """Exchange a round's factors and its result; bytes gathered, received and broadcast."""
    adapters = {
        client: initial_adapter(TARGETS, dict.fromkeys(TARGETS, RANKS[client]), ScalingRule(16.0), 0)
        for client in CLIENTS[group.rank]
    }
    recording: Any = RecordingGroup(group)
    for _ in gather_stacks(recording, adapters, dict.fromkeys(TARGETS, 0)):
        pass
    start = ServerState(0, initial_adapter(TARGETS, dict.fromkeys(TARGETS, 3), ScalingRule(16.0), 0))
    new = initial_adapter(TARGETS, dict.fromkeys(TARGETS, 3), ScalingRule(16.0), 1)
    broadcast_state(recording, start, ServerState(1, new) if group.rank == 0 else None)
    return recording.gathered, recording.received, recording.broadcasted


def test_bytes_are_those_that_real_processes_exchange(tmp_path: Any) -> None:
    ranks = [[dict.fromkeys(TARGETS, RANKS[client]) for client in clients] for clients in CLIENTS]
    expected = round_traffic(TARGETS, ranks, BOTH, dict.fromkeys(TARGETS, 3), 4, dict.fromkeys(TARGETS, 0))

    for rank, measured in enumerate(run_ranks(exchanged, 2, tmp_path)):
        received = expected.received_bytes if rank == 0 else 0
        assert measured == (expected.gathered_bytes, received, expected.broadcast_bytes)


def test_slots_that_are_planned_decide_the_memory() -> None:
    from tests.estimate.test_estimate_figures import shape

    store = make_store(random_texts(STORE_TEXTS))
    pack = Pack(0, jobs(store))
    few: PackWork = workload(store, Limits(2, 100, 100, 32)).pack_work(pack, 0)
    many: PackWork = workload(store, Limits(5, 100, 100, 32)).pack_work(pack, 0)
    costs = costs_of("opt")

    def slots(work: PackWork) -> int:
        return training(costs, shape(work.rank_rows, 10_000)).parts["adapters in slots, gradients, optimizer"]

    assert (few.num_slots, many.num_slots) == (2, 5)
    assert slots(many) * few.rank_rows == slots(few) * many.rank_rows
