"""The parts of an estimate, worked out from the rounds that were looked at.

Letters: i / o = in / out features of an adapted module.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.estimate.devices import (
    ACHIEVED_SHARE,
    ALLOCATOR_FACTOR,
    CONTEXT_BYTES,
    EXCHANGE_BYTES_PER_S,
    LOAD_BYTES_PER_S,
    SECONDS_PER_OPERATION,
    Device,
)
from fedsim.estimate.memory import (
    Memory,
    Phase,
    TrainingShape,
    answers,
    evaluation,
    exchange,
    slots_that_fit,
    tokens_that_fit,
    training,
)
from fedsim.estimate.probe import Probed, process_age_s
from fedsim.estimate.rates import Rate, work_flops
from fedsim.estimate.report import Amounts, Slots, Times
from fedsim.estimate.trace import ModelCosts
from fedsim.estimate.traffic import Traffic, round_traffic
from fedsim.estimate.workload import PackWork, RankLoad, RoundLoad, Work, Workload, total
from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, ClientPlan
from fedsim.lora.state import ServerState
from fedsim.lora.svd import route_seconds
from fedsim.server.aggregation import share_out


@dataclass(frozen=True, slots=True)
class Settings:
    """What of the configuration matters beside the work itself.

    Attributes:
        dtype: of the base.
        checkpointed: each layer is computed again in the backward pass.
        proximal: clients hold what they began with.
        server_moments: adapters that a server optimizer keeps.
        most_waiting_bytes: of trained adapters that wait on the device.
        packed_bytes: of copies of the base's weights for a CPU's library.
        sharded: the server's work is shared out by module.
        answer_batches: (sequences, longest) of each batch of the test of answers.
        generated: these are generated, not guessed with the true text in view.
        max_new_tokens: of an answer.
    """

    dtype: torch.dtype
    checkpointed: bool
    proximal: bool
    server_moments: int
    most_waiting_bytes: float
    packed_bytes: int
    sharded: bool
    answer_batches: tuple[tuple[int, int], ...]
    generated: bool
    max_new_tokens: int


@dataclass(frozen=True)
class Facts:
    """All that the parts of an estimate are worked out from.

    Attributes:
        settings: of the run.
        device: of each process.
        adapter: the initial global one.
        targets: module -> (i, o).
        costs: of the base.
        workload: who trains on what.
        plans: of each tier what a client receives in round 0, and its plan.
        loads: the rounds that were looked at.
    """

    settings: Settings
    device: Device
    adapter: AdapterState
    targets: Mapping[str, tuple[int, int]]
    costs: ModelCosts
    workload: Workload
    plans: Sequence[tuple[AdapterState, ClientPlan]]
    loads: tuple[RoundLoad, ...]

    @property
    def width(self) -> int:
        """Values of a rank row."""
        return sum(i + o for i, o in self.targets.values())

    @property
    def factor_bytes(self) -> int:
        """Of a factor's value."""
        return 8 if self.settings.dtype == torch.float64 else 4

    @property
    def half(self) -> bool:
        """Whether activations are in half precision."""
        return self.settings.dtype in (torch.bfloat16, torch.float16)

    @property
    def _packs(self) -> list[PackWork]:
        return [pack for load in self.loads for pack in load.packs]

    @property
    def _largest(self) -> PackWork:
        """The pack with most rank rows."""
        nobody = PackWork((), 0, Work(), 0, 0, 0.0)
        return max(self._packs, key=lambda pack: pack.rank_rows, default=nobody)

    @property
    def _most_tokens(self) -> int:
        """Of a packed row."""
        return max((pack.work.most_tokens for pack in self._packs), default=0)

    def flops(self, work: Work, trains: bool) -> float:
        """Operations of some work."""
        return work_flops(self.costs, work, self.width, trains, self.settings.checkpointed).total

    def traffic(self, load: RoundLoad) -> Traffic:
        """The exchange of a round."""
        strategy, tiers = self.workload.strategy, self.workload.tiers
        global_ranks = {module: factors.rank for module, factors in self.adapter.items()}
        sums = strategy.traits.takes_mean
        return round_traffic(
            self.targets,
            [
                [global_ranks] * rank.num_packs
                if sums
                else [tiers.lora_ranks(client, load.round_index) for client in rank.clients]
                for rank in load.ranks
            ],
            strategy.sends(ServerState(load.round_index, self.adapter)),
            global_ranks,
            self.factor_bytes,
            share_out(self.adapter, self._num_owners),
            torch.float64.itemsize if sums else None,
        )

    @property
    def _num_owners(self) -> int:
        """Processes that aggregate."""
        return self.device.world_size if self.settings.sharded else 1

    def memory(self, rss: int, traffic: Sequence[Traffic]) -> Memory:
        """Bytes of the process that needs most."""
        phases = {
            "training": self._training(self._largest.rank_rows, self._most_tokens),
            "tests": evaluation(
                self.costs,
                min(self.workload.counter.most_ranks, self.workload.limits.max_rows),
                self.width,
                self.factor_bytes,
                max(
                    max(rank.client_tests.most_tokens, rank.global_test.most_tokens)
                    for load in self.loads
                    for rank in load.ranks
                ),
                self.half,
                self.workload.limits.padded,
                self.device.kind == "cuda",
            ),
            "the exchange": exchange(
                max((one.module_bytes for one in traffic), key=sum),
                max((one.longest_shares for one in traffic), key=sum),
                self.device.world_size,
                self._num_owners,
            ),
        }
        batches = self.settings.answer_batches
        if batches:
            tokens = max(sequences * longest for sequences, longest in batches)
            phases["the test of answers"] = answers(
                self.costs,
                tokens,
                max(sequences for sequences, _ in batches),
                self.half,
                self.settings.generated,
            )
        return Memory(
            self._resident(rss), {name: self._with_allocator(phase) for name, phase in phases.items()}
        )

    def _with_allocator(self, phase: Phase) -> Phase:
        kept = int((ALLOCATOR_FACTOR[self.device.kind] - 1.0) * phase.num_bytes)
        return Phase({**phase.parts, "kept by the allocator": kept})

    def _training(self, rank_rows: int, row_tokens: int) -> Phase:
        phase = training(
            self.costs,
            TrainingShape(
                rank_rows=rank_rows,
                row_width=self.width,
                factor_bytes=self.factor_bytes,
                term_buffers=self._term_buffers(),
                row_tokens=row_tokens,
                label_tokens=row_tokens,
                checkpointed=self.settings.checkpointed,
                padded=self.workload.limits.padded,
                half=self.half,
                on_gpu=self.device.kind == "cuda",
            ),
        )
        trained = max(
            sum(self._rank_sum(client, load.round_index) for client in rank.clients)
            for load in self.loads
            for rank in load.ranks
        )
        trained *= self.factor_bytes
        waiting = int(min(trained, self.settings.most_waiting_bytes))
        waiting += 0 if self.workload.shares_start else trained
        kept = self.workload.counter.most_rank * self.width * self.factor_bytes
        return Phase(
            {**phase.parts, "trained adapters of its clients": waiting, "adapter of the last test": kept}
        )

    def _rank_sum(self, client_id: int, round_index: int) -> int:
        """Values of a client's adapter."""
        ranks = self.workload.tiers.lora_ranks(client_id, round_index)
        return sum(ranks[module] * (i + o) for module, (i, o) in self.targets.items())

    def _resident(self, rss: int) -> dict[str, int]:
        whole = self.adapter.num_parameters * self.factor_bytes
        parts = {"base": self.costs.parameter_bytes}
        if self.costs.dequantized_bytes:
            parts["a dequantized weight"] = self.costs.dequantized_bytes
        if self.device.kind == "cuda":
            parts["CUDA context"] = CONTEXT_BYTES
        else:
            parts["program, libraries and data"] = rss
            parts["base packed for oneDNN"] = self.settings.packed_bytes
        # what clients of a tier receive is cut from the global adapter
        parts["global adapter and server state"] = whole * (2 + self.settings.server_moments)
        if self.workload.strategy.traits.changes_base:
            parts["update of the base, at most"] = self._base_update_bytes()
        return parts

    def _base_update_bytes(self) -> int:
        """Factors of all clients of all rounds, one after another, or the dense sum where that is smaller."""
        num_bytes = 0
        for module, (i, o) in self.targets.items():
            rows = max(
                sum(
                    self.workload.tiers.lora_ranks(client, load.round_index)[module]
                    for rank in load.ranks
                    for client in rank.clients
                )
                for load in self.loads
            )
            values = min(rows * self.workload.rounds * (i + o), i * o + min(i, o) ** 2)
            num_bytes += values * self.factor_bytes
        return num_bytes

    def slots(self, memory: Memory) -> Slots:
        """Clients at once, as planned and as the memory would allow."""
        rank_rows, row_tokens = self._largest.rank_rows, self._most_tokens
        fitting = fitting_tokens = None
        if self.device.capacity is not None:
            free = (self.device.usable - memory.resident_bytes) / ALLOCATOR_FACTOR[self.device.kind]
            phase = self._training(0, row_tokens)
            buffers = self._term_buffers()
            per_slot = max(self.adapter[module].rank for module in self.targets)
            fitting = slots_that_fit(free - phase.num_bytes, per_slot, self.width, self.factor_bytes, buffers)
            fitting_tokens = tokens_that_fit(
                free - self._training(rank_rows, 0).num_bytes, self.costs, self.settings.checkpointed
            )
        return Slots(
            self._largest.num_slots,
            rank_rows,
            row_tokens,
            self.workload.limits.max_tokens,
            fitting,
            fitting_tokens,
        )

    def _term_buffers(self) -> float:
        plans = [plan for _, plan in self.plans]
        freezes = any(plan.trains != BOTH or plan.mask is not None for plan in plans)
        holds_start = freezes or self.settings.proximal
        return holds_start + 0.25 * freezes + any(plan.correction is not None for plan in plans)

    def amounts(self, traffic: Sequence[Traffic]) -> Amounts:
        """What a round amounts to."""
        loads = self.loads

        def mean(values: Sequence[float]) -> float:
            return math.fsum(values) / len(values)

        trained = [total([rank.train for rank in load.ranks]) for load in loads]
        tests = [
            total([work for rank in load.ranks for work in (rank.client_tests, rank.global_test)])
            for load in loads
        ]
        packs = [pack for load in loads for pack in load.packs]
        passes = sum(work.passes for work in trained)
        return Amounts(
            num_rounds=self.workload.rounds,
            num_sampled=len(loads),
            clients=mean([sum(len(rank.clients) for rank in load.ranks) for load in loads]),
            packs=mean([len(load.packs) for load in loads]),
            tokens=mean([work.tokens for work in trained]),
            label_tokens=mean([work.label_tokens for work in trained]),
            busiest_tokens=mean([max(rank.train.tokens for rank in load.ranks) for load in loads]),
            row_tokens=sum(work.tokens for work in trained) / passes if passes else 0.0,
            train_flops=mean([self.flops(work, True) for work in trained]),
            test_flops=mean([self.flops(work, False) for work in tests]),
            idle_share=mean([load.idle_share for load in loads]),
            occupancy=mean([pack.occupancy for pack in packs]) if packs else 0.0,
            gathered_bytes=mean([one.gathered_bytes for one in traffic]),
            received_bytes=mean([one.received_bytes for one in traffic]),
            broadcast_bytes=mean([one.broadcast_bytes for one in traffic]),
        )

    def times(self, probed: Probed | None, traffic: Sequence[Traffic]) -> Times | None:
        """Expected seconds; None without a rate."""
        measured = probed is not None
        probed = probed or self._from_data_sheet(traffic)
        if probed is None:
            return None
        train = [max(self._train_s(rank, probed, False) for rank in load.ranks) for load in self.loads]
        with_tests = [max(self._train_s(rank, probed, True) for rank in load.ranks) for load in self.loads]
        answers_s = -(-len(self.settings.answer_batches) // self.device.world_size) * probed.answers_s
        tests = [
            max(self._seconds(probed.test, rank.global_test, False) for rank in load.ranks) + answers_s
            for load in self.loads
        ]
        sampled = np.array([load.round_index for load in self.loads])
        rounds = []
        for index in range(self.workload.rounds):
            near = int(np.abs(sampled - index).argmin())
            tested = self.workload.evaluates(index)
            rounds.append((with_tests[near] + tests[near] if tested else train[near]) + probed.server_s)
        num_tested = sum(self.workload.evaluates(index) for index in range(self.workload.rounds))
        first_test = tests[0] - answers_s if self.workload.strategy.traits.has_global_model else 0.0
        share = num_tested / self.workload.rounds
        return Times(
            measured=measured,
            rounds=tuple(rounds),
            train_s=float(np.mean(train) * (1 - share) + np.mean(with_tests) * share),
            server_s=probed.server_s,
            test_s=float(np.mean(tests)),
            record_s=probed.record_s,
            start_s=probed.loaded_s + first_test,
            loaded_cpu_s=probed.loaded_cpu_s,
            cpu_share=probed.cpu_share,
        )

    def _train_s(self, rank: RankLoad, probed: Probed, tested: bool) -> float:
        seconds = self._seconds(probed.train, rank.train, True)
        return seconds + self._seconds(probed.test, rank.client_tests, False) if tested else seconds

    def _seconds(self, rate: Rate, work: Work, trains: bool) -> float:
        return rate.seconds(self.flops(work, trains), work.passes)

    def _from_data_sheet(self, traffic: Sequence[Traffic]) -> Probed | None:
        gpu = self.device.gpu
        if gpu is None:
            return None
        peak = gpu.half_flops if self.half else gpu.single_flops
        per_flop = 1.0 / (peak * ACHIEVED_SHARE)
        train = Rate(per_flop, self.costs.num_operations * SECONDS_PER_OPERATION, overlapped=True)
        test = Rate(per_flop, self.costs.forward_operations * SECONDS_PER_OPERATION, overlapped=True)
        token_s = max(
            self.costs.parameter_bytes / gpu.bandwidth, self.costs.forward_operations * SECONDS_PER_OPERATION
        )
        exchanged = max((one.received_bytes + one.broadcast_bytes for one in traffic), default=0)
        return Probed(
            train,
            test,
            server_s=self._decomposition_s() + exchanged / EXCHANGE_BYTES_PER_S,
            answers_s=token_s * (self.settings.max_new_tokens if self.settings.generated else 1),
            record_s=0.0,
            loaded_s=process_age_s() + self.costs.parameter_bytes / LOAD_BYTES_PER_S,
            loaded_cpu_s=0.0,
            cpu_share=1.0,
            peak_bytes=0,
        )

    def _decomposition_s(self) -> float:
        """Seconds of one core for a decomposition of each module, where the strategy may make one; an upper bound."""
        traits = self.workload.strategy.traits
        if traits.reduce != "stack" or traits.trains_pool:
            return 0.0
        load = max(self.loads, key=lambda load: sum(len(rank.clients) for rank in load.ranks))
        seconds = 0.0
        for module, (i, o) in self.targets.items():
            rows = sum(
                self.workload.tiers.lora_ranks(client, load.round_index)[module]
                for rank in load.ranks
                for client in rank.clients
            )
            if rows:
                count = min(self.adapter[module].rank, rows, i, o)
                seconds += min(route_seconds(o, i, rows, count).values())
        return seconds / self._num_owners
