"""The packed trainer: many clients go through the frozen base together.

The clients of a pack are worked off by a number of slots. In each step the micro-batches of all clients that hold a
slot lie in one row of tokens without padding; each token meets its own client's adapter, each client has its own loss,
gradient, clipping, schedule and optimizer state. A client ends where it would have ended alone, to rounding.

Letters: S = slots, T = tokens of a packed row, n = label tokens in it.
"""

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.tokens import TokenStore
from fedsim.errors import ModelError, TrainingError
from fedsim.lora.plan import ClientPlan, Side
from fedsim.lora.updates import ClientUpdate
from fedsim.models.adapted import BASE_DROPOUT, LORA_DROPOUT
from fedsim.models.dropout import token_keys
from fedsim.models.out_of_memory import REMEDIES, ROUNDING, first_line, free_cached, is_out_of_memory, place
from fedsim.models.packing import PackedTokens, pack_tokens
from fedsim.models.rows import MAX_ROW_VALUES, RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_products
from fedsim.models.transfer import to_device
from fedsim.training.loss_scale import loss_scales
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.plans import check_plan
from fedsim.training.reports import check_finite, client_report
from fedsim.training.row_optimizers import RowOptimizer, SlotStep
from fedsim.training.row_terms import make_row_terms
from fedsim.training.settings import learning_rate
from fedsim.training.slots import plan_slots_within

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass
class _Runner:
    """A client in its slot."""

    slot: int
    position: int
    job: ClientJob
    plan: ClientPlan
    steps: list[list[Ints]]
    num_targets: list[int]
    losses: list[float] = field(default_factory=list)
    trained_tokens: int = 0
    seconds: float = 0.0
    problem: str | None = None

    @property
    def step(self) -> int:
        """The local step it is about to take."""
        return len(self.losses)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some micro-batches of one client's step, in one packed row.

    Attributes:
        runner: the client.
        examples: of each micro-batch.
        first_micro_batch: index of the first of them within the step.
    """

    runner: _Runner
    examples: tuple[Ints, ...]
    first_micro_batch: int


class PackedTrainer:
    """Trains the clients of a pack together.

    Where memory does not suffice, a step is cut into smaller rows, and a pack is begun again with fewer slots, from
    then on and with a warning; either changes results to rounding alone.

    Args:
        model: the base with adapter slots for several clients.
        store: training examples.
        max_slots: clients that train at the same time; fewer where their adapters exceed `MAX_ROW_VALUES`.
        max_tokens: tokens of a packed row; a step with more is cut into several rows, a larger micro-batch stays whole.
        drop_not_finite: leave out, with a warning, a client whose loss or adapter is not finite, instead of failing.
        process_rank: written into the reports.
    """

    def __init__(
        self,
        model: StackedModel,
        store: TokenStore,
        max_slots: int,
        max_tokens: int,
        drop_not_finite: bool,
        process_rank: int,
    ) -> None:
        self.model = model
        self.store = store
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.drop_not_finite = drop_not_finite
        self.process_rank = process_rank
        self._padded_rows = 0
        self._tokens = 0
        self._num_slots = 0
        self._row = (0, 0)
        """Tokens and micro-batches of the row that is being computed."""

    def train(self, pack: Pack, plans: Sequence[ClientPlan], round_index: int) -> list[ClientUpdate]:
        """See `Trainer.train`. Clients that were left out are missing from the result."""
        while True:
            self._num_slots, self._row = min(self.max_slots, len(pack.jobs)), (0, 0)
            try:
                return self._train(pack, plans, round_index)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = first_line(error)
            free_cached(self.model.device)
            self._take_fewer_slots(problem)

    def _train(self, pack: Pack, plans: Sequence[ClientPlan], round_index: int) -> list[ClientUpdate]:
        for plan in plans:
            check_plan(plan, self.model.targets)
        schedules = [job.batches(round_index) for job in pack.jobs]
        width = sum(i + o for i, o in self.model.targets.values())
        slots, capacities = plan_slots_within(
            [len(steps) for steps in schedules],
            [max(factors.rank for factors in plan.start.values()) for plan in plans],
            self.max_slots,
            MAX_ROW_VALUES[self.model.device.type] // width,
        )
        self._num_slots = len(capacities)
        dtype = next(iter(plans[0].start.values())).A.dtype
        rows = RankRows(self.model.targets, capacities, dtype, self.model.device)
        terms = make_row_terms(rows, plans, [job.settings.proximal_mu for job in pack.jobs])
        optimizer = RowOptimizer(rows, terms)
        self.model.attach(rows)
        self._padded_rows = self._tokens = 0
        waiting = [list(queue) for queue in slots.queues]
        active: dict[int, _Runner] = {}
        finished: dict[int, ClientUpdate] = {}
        try:
            for _ in range(slots.num_steps):
                for slot in range(len(waiting)):
                    if slot not in active and waiting[slot]:
                        position = waiting[slot].pop(0)
                        job, plan = pack.jobs[position], plans[position]
                        optimizer.load(slot, plan, job.settings.proximal_mu)
                        active[slot] = _Runner(
                            slot,
                            position,
                            job,
                            plan,
                            schedules[position],
                            [self._count_targets(step) for step in schedules[position]],
                        )
                self._step(optimizer, [active[slot] for slot in sorted(active)], round_index)
                for slot in sorted(active):
                    runner = active[slot]
                    if runner.step == len(runner.steps):
                        update = self._finish(rows, runner, pack.index, round_index)
                        if update is not None:
                            finished[runner.position] = update
                        optimizer.clear(slot)
                        del active[slot]
        finally:
            self.model.attach(None)
        padding = self._padded_rows / max(1, self._tokens) - 1.0
        return [
            replace(
                update,
                report=replace(update.report, pack_occupancy=slots.occupancy, pack_padding=padding),
            )
            for _, update in sorted(finished.items())
        ]

    def _step(self, optimizer: RowOptimizer, runners: Sequence[_Runner], round_index: int) -> None:
        """One optimizer step of every client that holds a slot."""
        began = time.perf_counter()
        rows = optimizer.rows
        healthy = [runner for runner in runners if runner.problem is None]
        losses = self._gradients(rows, healthy, round_index) if healthy else []
        if healthy and not (np.isfinite(losses).all() and bool(torch.isfinite(rows.gradients).all())):
            healthy, losses = self._gradients_one_by_one(optimizer, healthy, round_index)
        if healthy:
            optimizer.step(
                [
                    SlotStep(
                        slot=runner.slot,
                        settings=runner.job.settings.optimizer,
                        lr=learning_rate(runner.job.settings, runner.step, len(runner.steps)),
                        step=runner.step,
                        max_grad_norm=runner.job.settings.max_grad_norm,
                    )
                    for runner in healthy
                ]
            )
        share = (time.perf_counter() - began) / len(runners)
        for runner, loss in zip(healthy, losses, strict=True):
            runner.trained_tokens += runner.num_targets[runner.step]
            runner.losses.append(loss)
        for runner in runners:
            runner.seconds += share
            if runner.problem is not None:
                runner.losses.append(float("nan"))  # its slot stays taken, so that nobody else's step changes

    def _gradients_one_by_one(
        self, optimizer: RowOptimizer, runners: Sequence[_Runner], round_index: int
    ) -> tuple[list[_Runner], list[float]]:
        """As `_gradients`, after something was not finite: find out whose it is and leave it out.

        A value that is not finite spreads to everybody in a joint product (0 times infinity is not a number), so each
        client is computed by itself.
        """
        rows = optimizer.rows
        rows.gradients.zero_()
        healthy, losses = [], []
        for runner in runners:
            own = slice(*rows.row_ranges[runner.slot])
            loss = float("nan")
            for attempt in range(len(loss_scales(self.model.dtype, 1))):
                rows.gradients[own] = 0
                [loss] = self._gradients(rows, [runner], round_index, attempt)
                if bool(torch.isfinite(rows.gradients[own]).all()):
                    break
            try:
                check_finite([*runner.losses, loss], None, runner.job.client_id, round_index)
                if not bool(torch.isfinite(rows.gradients[own]).all()):
                    raise TrainingError(
                        f"the gradient of client {runner.job.client_id} must stay finite at local step "
                        f"{runner.step} of round {round_index}"
                    )
            except TrainingError as error:
                self._leave_out(runner, error)
                optimizer.clear(runner.slot)
            else:
                healthy.append(runner)
                losses.append(loss)
        return healthy, losses

    def _leave_out(self, runner: _Runner, error: TrainingError) -> None:
        if not self.drop_not_finite:
            raise error
        runner.problem = str(error)
        logger.warning("dropped a client: %s", error)

    def _gradients(
        self, rows: RankRows, runners: Sequence[_Runner], round_index: int, attempt: int = 0
    ) -> list[float]:
        """Add each client's gradient of its mean loss over the label tokens of its step; theirs must be 0 before.

        Args:
            rows: adapters and gradients.
            runners: the clients.
            round_index: from 0.
            attempt: which of the `loss_scales` to use.

        Returns:
            These losses, in the order of `runners`.
        """
        while True:
            try:
                return self._pass_by_pass(rows, runners, round_index, attempt)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._row[1] < 2:
                    raise
                problem = first_line(error)
            for runner in runners:  # what the failed pass and those before it have added
                rows.gradients[slice(*rows.row_ranges[runner.slot])] = 0
            free_cached(self.model.device)
            self._take_smaller_rows(problem)

    def _pass_by_pass(
        self, rows: RankRows, runners: Sequence[_Runner], round_index: int, attempt: int
    ) -> list[float]:
        index_of = {id(runner): index for index, runner in enumerate(runners)}
        totals = torch.zeros(len(runners), dtype=torch.float64, device=self.model.device)
        targets = [runner.num_targets[runner.step] for runner in runners]
        scales = [loss_scales(self.model.dtype, count)[attempt] for count in targets]
        for parts in self._passes(runners):
            examples = [np.concatenate(part.examples) for part in parts]
            num_tokens = int(self.store.num_tokens[np.concatenate(examples)].sum())
            self._row = (num_tokens, sum(len(part.examples) for part in parts))
            packed = pack_tokens(self.store, examples, self.model.device)
            self._padded_rows += packed.layout.num_padded_rows
            self._tokens += packed.input_ids.numel()
            members = [index_of[id(part.runner)] for part in parts]
            share = to_device(
                [scales[index] / targets[index] for index in members], self.model.device, torch.float64
            )
            weights = share[packed.owner_of_label].to(rows.values.dtype)
            plan = StepPlan(
                plan_products(rows, packed, [part.runner.slot for part in parts], self.model.dtype),
                self._lora_dropout(parts, round_index),
                frozenset[Side]().union(*(part.runner.plan.trains for part in parts)),
            )
            dropout = self._base_dropout(parts, round_index)
            with self.model.planned(plan):
                there_and_back = functools.partial(self._there_and_back, packed, weights, dropout)
                losses = self.model.passes.run("train", there_and_back)
            owner = to_device(members, self.model.device, torch.int64)
            totals.index_add_(0, owner[packed.owner_of_label], losses.double())
        self._row = (0, 0)
        values: list[float] = totals.tolist()
        for index, (runner, scale) in enumerate(zip(runners, scales, strict=True)):
            if scale != 1.0:
                rows.gradients[slice(*rows.row_ranges[runner.slot])] /= scale
                values[index] /= scale
        return values

    def _there_and_back(self, packed: PackedTokens, weights: Tensor, dropout: Tensor | None) -> Tensor:
        """(n,) weighted losses; their gradients are added to those of the rows."""
        losses = self.model.label_losses(packed, weights, dropout)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _take_smaller_rows(self, problem: str) -> None:
        tokens, _ = self._row
        self.max_tokens = max(1, min(self.max_tokens, tokens) // 2)
        logger.warning(
            "out of memory (%s): a packed row of %d tokens does not fit this %s; rows have at most %d from here on, "
            "and the step is computed again; %s; set training.pack.max_tokens=%d to begin with that",
            problem,
            tokens,
            place(self.model.device),
            self.max_tokens,
            ROUNDING,
            self.max_tokens,
        )

    def _take_fewer_slots(self, problem: str) -> None:
        """After a row that cannot be cut, or the adapters themselves, did not fit.

        Raises:
            ModelError: there was one slot only.
        """
        if self._num_slots <= 1:
            what = f"a micro-batch of {self._row[0]} tokens" if self._row[1] else "one client's adapter"
            raise ModelError(
                f"out of memory ({problem}): {what} does not fit this {place(self.model.device)}; {REMEDIES}"
            )
        self.max_slots = self._num_slots // 2
        logger.warning(
            "out of memory (%s): %d clients at once do not fit this %s; the pack is trained again with %d, as are "
            "those after it; %s; set training.pack.max_slots=%d to begin with that",
            problem,
            self._num_slots,
            place(self.model.device),
            self.max_slots,
            ROUNDING,
            self.max_slots,
        )

    def _passes(self, runners: Sequence[_Runner]) -> list[list[_Part]]:
        """Cut the micro-batches of a step into packed rows within the token budget, in slot order."""
        passes: list[list[_Part]] = [[]]
        tokens = 0
        for runner in runners:
            for index, examples in enumerate(runner.steps[runner.step]):
                num_tokens = int(self.store.num_tokens[examples].sum())
                if passes[-1] and tokens + num_tokens > self.max_tokens:
                    passes.append([])
                    tokens = 0
                tokens += num_tokens
                current = passes[-1]
                if current and current[-1].runner is runner:
                    last = current.pop()
                    current.append(_Part(runner, (*last.examples, examples), last.first_micro_batch))
                else:
                    current.append(_Part(runner, (examples,), index))
        return passes

    def _count_targets(self, micro_batches: Sequence[Ints]) -> int:
        """Label tokens of a step, all its micro-batches together."""
        return int(self.store.num_label_tokens[np.concatenate(micro_batches)].sum())

    def _lora_dropout(self, parts: Sequence[_Part], round_index: int) -> tuple[Tensor, float] | None:
        probabilities = {part.runner.job.settings.lora_dropout for part in parts}
        assert len(probabilities) == 1, "the clients of a pack share one dropout probability"
        (probability,) = probabilities
        if probability == 0:
            return None
        return self._keys(LORA_DROPOUT, parts, round_index), probability

    def _base_dropout(self, parts: Sequence[_Part], round_index: int) -> Tensor | None:
        if not parts[0].runner.job.settings.base_dropout:
            return None
        return self._keys(BASE_DROPOUT, parts, round_index)

    def _keys(self, purpose: str, parts: Sequence[_Part], round_index: int) -> Tensor:
        """(T,) dropout keys: each micro-batch has its own, whatever row it lies in."""
        keys = [
            token_keys(
                part.runner.job.settings.seed,
                purpose,
                (round_index, part.runner.job.client_id, part.runner.step, part.first_micro_batch + index),
                int(self.store.num_tokens[examples].sum()),
            )
            for part in parts
            for index, examples in enumerate(part.examples)
        ]
        return to_device(np.concatenate(keys), self.model.device, torch.int32)

    def _finish(
        self, rows: RankRows, runner: _Runner, pack_index: int, round_index: int
    ) -> ClientUpdate | None:
        if runner.problem is not None:
            return None
        adapter = rows.read(runner.slot)
        try:
            values = rows.values[slice(*rows.row_ranges[runner.slot])]
            suspect = None if bool(torch.isfinite(values).all()) else adapter
            check_finite(runner.losses, suspect, runner.job.client_id, round_index)
        except TrainingError as error:
            self._leave_out(runner, error)
            return None
        report = client_report(
            runner.job,
            runner.plan,
            adapter,
            runner.losses,
            runner.trained_tokens,
            pack_index,
            self.process_rank,
            runner.seconds,
        )
        return ClientUpdate(report, adapter)
