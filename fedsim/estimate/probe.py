"""A few real steps on the real device: the engine, the tests and the server of the run, timed. Nothing is kept."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedsim.comm.agree import all_or_none, root_first
from fedsim.comm.exchange import gather_reports
from fedsim.comm.group import Group
from fedsim.comm.placement import place
from fedsim.config.schema import Config
from fedsim.errors import TrainingError
from fedsim.estimate.rates import Rate, fit_rate
from fedsim.estimate.workload import Work, Workload
from fedsim.lora.factors import AdapterState, LoraFactors
from fedsim.lora.plan import Client, ClientPlan
from fedsim.lora.state import ServerState
from fedsim.lora.updates import ClientReport, ClientUpdate
from fedsim.models.base import build_base
from fedsim.server.build import build_run
from fedsim.server.checkpoint import save_checkpoint
from fedsim.server.run import Run
from fedsim.server.summary import RunSummary
from fedsim.training.memory import peak_memory_bytes
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.reports import client_report

SECONDS = 6.0
"""Measuring goes on until so many seconds are spent on each kind of work, or `MOST_REPEATS` is reached."""

MOST_REPEATS = 6
TESTED_CLIENTS = 2

Flops = Callable[[Work, bool], float]
"""Operations of some work, with a backward pass or without."""


@dataclass(frozen=True, slots=True)
class Probed:
    """What was measured; the slowest process's where there are several.

    Attributes:
        train: local training.
        test: tests.
        server_s: exchange and aggregation of round 0's cohort, with the update of the base.
        answers_s: a batch of the test of answers; 0 without one.
        record_s: writing a checkpoint.
        loaded_s: from the start of the program until the run was built.
        loaded_cpu_s: seconds of that in which the process computed.
        cpu_share: seconds that the process computed, all its threads together, per second that was timed; on a GPU it
            says little.
        peak_bytes: most memory at any time: of the GPU that was allocated, or of the process.
    """

    train: Rate
    test: Rate
    server_s: float
    answers_s: float
    record_s: float
    loaded_s: float
    loaded_cpu_s: float
    cpu_share: float
    peak_bytes: int


def build_probe(
    config: Config, group: Group, summary: RunSummary, workload: Workload, flops: Flops
) -> Probed:
    """Load the base, build the run, and measure. Collective: each rank measures the same pack at the same time.

    Raises:
        PeerError: something failed on some rank.
        TrainingError: no client takes part in the first rounds.
    """
    base = root_first(group, "loading the base model", lambda: build_base(config.model, group.device))
    with all_or_none(group, "setting up the run"):
        run = build_run(config, group, base, summary.data, summary.tiers, summary.strategy)
    loaded_s, loaded_cpu_s = process_age_s(), time.process_time()
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(group.device)
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    probe = _Probe(run, ServerState(0, summary.adapter.to(group.device, dtype)), workload, flops)
    with all_or_none(group, "probing local training"):
        train = probe.train()
    with all_or_none(group, "probing the tests"):
        test = probe.test(fallback=train)
        answers_s = probe.answers()
    server_s, record_s = probe.server()
    peak_bytes = peak_memory_bytes(group.device)
    mine = Probed(
        train,
        test,
        server_s,
        answers_s,
        record_s,
        loaded_s,
        loaded_cpu_s,
        probe.cpu_s / probe.wall_s,
        peak_bytes,
    )
    return _slowest(group.gather_objects(mine))


def process_age_s() -> float:
    """Seconds since this process was started, as Linux knows it."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _slowest(measured: Sequence[Probed]) -> Probed:
    def slower(rate: Rate) -> tuple[float, float]:
        return rate.seconds_per_flop, rate.seconds_per_pass

    return Probed(
        train=max((one.train for one in measured), key=slower),
        test=max((one.test for one in measured), key=slower),
        server_s=max(one.server_s for one in measured),
        answers_s=max(one.answers_s for one in measured),
        record_s=max(one.record_s for one in measured),
        loaded_s=max(one.loaded_s for one in measured),
        loaded_cpu_s=max(one.loaded_cpu_s for one in measured),
        cpu_share=min(one.cpu_share for one in measured),
        peak_bytes=max(one.peak_bytes for one in measured),
    )


class _Probe:
    """The run, and its first round that has clients."""

    def __init__(self, run: Run, state: ServerState, workload: Workload, flops: Flops) -> None:
        self.run = run
        self.state = state
        self.workload = workload
        self.flops = flops
        self.wall_s = self.cpu_s = 0.0
        self.round_index, self.packs = next(
            ((index, packs) for index in range(run.rounds) if (packs := workload.packs(index))), (0, ())
        )
        if not self.packs:
            raise TrainingError(f"--probe needs a round with clients, and none of {run.rounds} has any")
        self._received: dict[int, AdapterState] = {}

    def train(self) -> Rate:
        """The rate of local training: the slots of the largest pack together, and one client by itself."""
        pack = max(self.packs, key=lambda pack: (pack.cost_tokens, -pack.index))
        longest = sorted(pack.jobs, key=lambda job: (-job.cost_tokens, job.client_id))
        together = longest[: self.workload.limits.max_slots]
        middle = longest[len(longest) // 2]
        self._sample(pack.index, [middle], 1)  # the first steps of a process are slow
        first = self._sample(pack.index, together, 1)
        steps = max(2, min(8, int(SECONDS / 4 / max(first[2], 1e-3))))
        samples: list[tuple[float, int, float]] = []
        while len(samples) < 2 * MOST_REPEATS and sum(seconds for *_, seconds in samples) < SECONDS:
            samples.append(self._sample(pack.index, together, steps))
            samples.append(self._sample(pack.index, [middle], steps))
        return fit_rate(samples)

    def _sample(self, index: int, jobs: Sequence[ClientJob], steps: int) -> tuple[float, int, float]:
        """Operations, rows and seconds of the first steps of some clients."""
        pack = Pack(index, tuple(replace(job, local_epochs=None, local_steps=steps) for job in jobs))
        plans = [self._plan(job) for job in jobs]
        work = self.workload.pack_work(pack, self.round_index).work
        seconds = self._timed(lambda: self.run.trainer.train(pack, plans, self.round_index))
        return self.flops(work, True), work.passes, seconds

    def test(self, fallback: Rate) -> Rate:
        """The rate of tests: batches of the global test, and a test of clients as it is made in a round."""
        samples: list[tuple[float, int, float]] = []
        test, adapter = self.run.global_test, self.state.adapter
        measured = self._counted(lambda: self.workload.client_test.losses(*self._adapters()))
        if measured.passes:
            self.run.client_test.losses(*self._adapters())
            seconds = self._timed(lambda: self.run.client_test.losses(*self._adapters()))
            samples.append((self.flops(measured, False), measured.passes, seconds))
        if self.run.strategy.traits.has_global_model:
            middle = len(test.batches) // 2
            for chosen in ([0], [middle], [len(test.batches) - 1], [0], [middle]):
                work = self._counted(lambda chosen=chosen: self.workload.global_test.measure(adapter, chosen))  # type: ignore[misc]
                seconds = self._timed(lambda chosen=chosen: test.measure(adapter, chosen))  # type: ignore[misc]
                samples.append((self.flops(work, False), work.passes, seconds))
            samples = (
                samples[:1] + samples[2:] if measured.passes else samples[1:]
            )  # the first batch warms up
        return fit_rate(samples) if samples else fallback

    def _adapters(self) -> tuple[list[AdapterState], list[int]]:
        """Adapters of a few clients after training, as far as a test can tell, and who they are."""
        jobs = max(self.packs, key=lambda pack: len(pack.jobs)).jobs[:TESTED_CLIENTS]
        adapters = [AdapterState(dict(self._plan(job).start)) for job in jobs]
        return adapters, [job.client_id for job in jobs]

    def _counted(self, measure: Callable[[], object]) -> Work:
        counter = self.workload.counter
        counter.start()
        counter.ranks = {}
        measure()
        return counter.work

    def answers(self) -> float:
        """Seconds of the longest batch of answers."""
        if self.run.answers is None:
            return 0.0
        test = self.run.answers.test
        return self._timed(lambda: test.measure(self.state.adapter, [0]))

    def server(self) -> tuple[float, float]:
        """Seconds of the exchange and aggregation of the cohort, and of writing the result down."""
        run, group = self.run, self.run.group
        mine = place([pack.cost_tokens for pack in self.packs], group.world_size)[group.rank]
        reports: list[ClientReport] = []
        sent: dict[int, AdapterState] = {}
        with all_or_none(group, "probing the server"):
            for pack in (self.packs[index] for index in mine):
                updates = [self._update(job, pack.index) for job in pack.jobs]
                reports += [update.report for update in updates]
                sent |= run.aggregator.contribution(run.strategy, self.state, pack.index, updates)
        group.gather_objects(None)  # all start together
        began = time.perf_counter()
        everybody = gather_reports(group, reports)
        aggregated, _ = run.aggregator.aggregate(group, run.strategy, self.state, everybody, sent)
        with all_or_none(group, "probing the update of the base"):
            if aggregated.state.base_update is not None:
                run.base.apply(aggregated.state.base_update)
        self._wait()
        server_s = time.perf_counter() - began
        record_s = 0.0
        with all_or_none(group, "probing a checkpoint"):
            if group.rank == 0:
                with TemporaryDirectory() as folder:
                    record_s = self._timed(lambda: save_checkpoint(aggregated.state, Path(folder), 1))
        return server_s, record_s

    def _update(self, job: ClientJob, pack: int) -> ClientUpdate:
        """What a client would return if training were noise."""
        plan = self._plan(job)
        generator = torch.Generator().manual_seed(max(0, job.client_id))
        trained = AdapterState(
            {
                module: LoraFactors(
                    factors.A + 0.01 * _noise(factors.A, generator),
                    factors.B + 0.01 * _noise(factors.B, generator),
                    factors.scaling,
                )
                for module, factors in plan.start.items()
            }
        )
        steps = len(job.batches(self.round_index))
        report = client_report(
            job, plan, trained, [1.0] * steps, job.num_tokens, pack, self.run.group.rank, 1.0
        )
        upload = self.run.strategy.upload(self.state, self._client(job), plan, trained, report)
        return ClientUpdate(report, upload.adapter)

    def _client(self, job: ClientJob) -> Client:
        return Client(job.client_id, self.run.tiers.lora_ranks(job.client_id, self.round_index))

    def _plan(self, job: ClientJob) -> ClientPlan:
        client = self._client(job)
        tier = id(client.lora_ranks)
        if tier not in self._received:
            self._received[tier] = self.run.strategy.download(self.state, client.lora_ranks)
        return self.run.strategy.plan(self.state, client, self._received[tier])

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        began, began_cpu = time.perf_counter(), time.process_time()
        work()
        self._wait()
        seconds = time.perf_counter() - began
        self.wall_s += seconds
        self.cpu_s += time.process_time() - began_cpu
        return seconds

    def _wait(self) -> None:
        if self.run.group.device.type == "cuda":
            torch.cuda.synchronize(self.run.group.device)


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like)
