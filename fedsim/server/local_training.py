"""Local training on one process: its packs, their tests, and what of it the server takes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import Client, ClientPlan
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport, ClientUpdate
from fedsim.server.run import Run
from fedsim.training.packs import Pack


@dataclass(frozen=True, slots=True)
class TrainingFigures:
    """What the other ranks must know about this rank's clients besides their reports.

    Attributes:
        test_s: seconds spent on the clients' tests.
        wrote_state: clients of which something is kept.
        num_clipped, num_corrupted: clients whose update was scaled down, or arrived broken.
        unused_downlink_bytes, unused_uplink_bytes: received and sent by clients of whom the server took nothing.
    """

    test_s: float
    wrote_state: tuple[int, ...]
    num_clipped: int
    num_corrupted: int
    unused_downlink_bytes: int
    unused_uplink_bytes: int


@dataclass(slots=True)
class Trained:
    """What this rank did in local training: what its clients send, and what happened to it on the way.

    Attributes:
        sent: by pack or client, what waits for the aggregation.
        waiting_bytes: of that on the device.
    """

    test_s: float = 0.0
    reports: list[ClientReport] = field(default_factory=list)
    sent: dict[int, AdapterState] = field(default_factory=dict)
    wrote_state: list[int] = field(default_factory=list)
    num_clipped: int = 0
    num_corrupted: int = 0
    unused_downlink_bytes: int = 0
    unused_uplink_bytes: int = 0
    waiting_bytes: int = 0

    def figures(self) -> TrainingFigures:
        """What is told to the others."""
        return TrainingFigures(
            self.test_s,
            tuple(self.wrote_state),
            self.num_clipped,
            self.num_corrupted,
            self.unused_downlink_bytes,
            self.unused_uplink_bytes,
        )


def train_packs(state: ServerState, run: Run, packs: Sequence[Pack]) -> Trained:
    """Train this rank's packs; test each client before and after where the round is evaluated."""
    done = Trained()
    num_clients = sum(len(pack.jobs) for pack in packs)
    received: dict[int, AdapterState] = {}  # by tier: what travels is cut to a tier's ranks once
    with run.passes.phase():
        for pack in packs:
            _train_pack(state, run, pack, received, done)
            tokens = sum(report.trained_tokens for report in done.reports)
            run.watch.clients_done(len(done.reports), num_clients, tokens)
    return done


def _train_pack(
    state: ServerState, run: Run, pack: Pack, received: dict[int, AdapterState], done: Trained
) -> None:
    """Train a pack into `done`; nothing else of its clients is held afterwards."""
    clients = {job.client_id: run.client(job.client_id, state) for job in pack.jobs}
    plans: dict[int, ClientPlan] = {}
    for client_id, client in clients.items():
        tier = id(client.lora_ranks)
        if tier not in received:
            received[tier] = run.strategy.download(state, client.lora_ranks)
        plans[client_id] = run.strategy.plan(state, client, received[tier])
    trained = run.trainer.train(pack, [plans[job.client_id] for job in pack.jobs], state.round_index)
    if run.evaluates(state.round_index) and trained:
        began = time.perf_counter()
        trained = _with_test_losses(run, plans, trained)
        done.test_s += time.perf_counter() - began
    sides = run.strategy.sends(state)
    uploads = []
    for update in trained:
        client_id = update.report.client_id
        upload = _upload(state, run, clients[client_id], plans[client_id], update, done)
        if upload is None:
            done.unused_uplink_bytes += plans[client_id].sent_bytes(sides)
        else:
            uploads.append(upload)
    used = {upload.report.client_id for upload in uploads}
    done.unused_downlink_bytes += sum(plans[client_id].received_bytes for client_id in plans.keys() - used)
    done.reports += [upload.report for upload in uploads]
    for number, waits in run.aggregator.contribution(run.strategy, state, pack.index, uploads).items():
        fits = done.waiting_bytes + waits.num_bytes <= run.most_waiting_bytes
        done.waiting_bytes += waits.num_bytes * fits
        done.sent[number] = waits if fits else waits.to("cpu")


def _with_test_losses(
    run: Run, plans: Mapping[int, ClientPlan], updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    client_ids = [update.report.client_id for update in updates]
    before = run.client_test.losses([plans[client_id].start for client_id in client_ids], client_ids)
    after = run.client_test.losses([update.adapter for update in updates], client_ids)
    return [
        replace(update, report=replace(update.report, test_loss_before=earlier, test_loss_after=later))
        for update, earlier, later in zip(updates, before, after, strict=True)
    ]


def _upload(
    state: ServerState, run: Run, client: Client, plan: ClientPlan, update: ClientUpdate, done: Trained
) -> ClientUpdate | None:
    """What the server takes of what a client returns, which may be nothing; what stays with it goes into the store.

    What stays is as the client trained it: an update breaks on its way, and is scaled down by the server.
    """
    upload = run.strategy.upload(state, client, plan, update.adapter, update.report)
    if upload.client_state is not None:
        run.store.save(client.client_id, state.round_index, upload.client_state)
        done.wrote_state.append(client.client_id)
    taken = _screened(run, plan.start, update, state.round_index, done)
    if taken is None:
        return None
    if taken is not update.adapter:
        upload = run.strategy.upload(state, client, plan, taken, update.report)
    uplink_bytes = plan.sent_bytes(run.strategy.sends(state), upload.adapter)
    return ClientUpdate(replace(update.report, uplink_bytes=uplink_bytes), upload.adapter)


def _screened(
    run: Run, start: AdapterState, update: ClientUpdate, round_index: int, done: Trained
) -> AdapterState | None:
    """The adapter as the server takes it, which may be not at all; counts into `done`."""
    adapter: AdapterState | None = update.adapter
    client_id = update.report.client_id
    if run.corruption is not None and run.corruption.hits(client_id, round_index):
        adapter = run.corruption.apply(start, update.adapter)
        done.num_corrupted += 1
    if run.screening is not None and adapter is not None:
        adapter, was_clipped = run.screening.screen(start, adapter, client_id, round_index)
        done.num_clipped += was_clipped
    return adapter
