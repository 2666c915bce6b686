"""The reference trainer: one client after another, in a plain loop.

Shapes: b = examples of a micro-batch, L = their padded length.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fedsim.data.batches import Batch, collate
from fedsim.data.tokens import TokenStore
from fedsim.errors import ModelError, TrainingError
from fedsim.lora.plan import ClientPlan
from fedsim.lora.updates import ClientUpdate
from fedsim.models.adapted import AdaptedModel, KeyedDropout
from fedsim.models.losses import label_losses
from fedsim.models.out_of_memory import REMEDIES, first_line, is_out_of_memory, place
from fedsim.training.loss_scale import loss_scales
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.plans import add_plan_gradients, check_plan, put_back
from fedsim.training.reports import check_finite, client_report
from fedsim.training.settings import LocalSettings, learning_rate, make_optimizer

logger = logging.getLogger(__name__)


class SequentialTrainer:
    """Trains the clients of a pack one after another; the oracle for every faster trainer.

    Args:
        model: the base with its adapter slots.
        store: training examples.
        pad_id: token id that fills a batch up; masked, so its value is of no consequence.
        drop_not_finite: leave out, with a warning, a client whose loss or adapter is not finite, instead of failing.
        process_rank: written into the reports.
    """

    def __init__(
        self, model: AdaptedModel, store: TokenStore, pad_id: int, drop_not_finite: bool, process_rank: int
    ) -> None:
        self.model = model
        self.store = store
        self.pad_id = pad_id
        self.drop_not_finite = drop_not_finite
        self.process_rank = process_rank

    def train(self, pack: Pack, plans: Sequence[ClientPlan], round_index: int) -> list[ClientUpdate]:
        """See `Trainer.train`."""
        updates = []
        for job, plan in zip(pack.jobs, plans, strict=True):
            check_plan(plan, self.model.targets)
            try:
                updates.append(self._train_client(job, plan, round_index, pack.index))
            except TrainingError as error:
                if not self.drop_not_finite:
                    raise
                logger.warning("dropped a client: %s", error)
        return updates

    def _train_client(
        self, job: ClientJob, plan: ClientPlan, round_index: int, pack_index: int
    ) -> ClientUpdate:
        began = time.perf_counter()
        settings = job.settings
        steps = job.batches(round_index)
        live = self.model.load(plan.start, trainable=plan.trains)
        leaves = [getattr(factors, side) for factors in live.values() for side in sorted(plan.trains)]
        optimizer = make_optimizer(leaves, settings.optimizer)
        losses: list[Tensor] = []
        trained_tokens = 0
        for step, micro_batches in enumerate(steps):
            batches = [collate(self.store, examples, self.pad_id) for examples in micro_batches]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step, len(steps))
            losses.append(self._gradients(leaves, batches, settings, (round_index, job.client_id, step)))
            add_plan_gradients(live, plan, settings.proximal_mu)
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(leaves, settings.max_grad_norm)
            optimizer.step()
            put_back(live, plan)
            trained_tokens += sum(batch.num_targets for batch in batches)
        adapter = self.model.read()
        step_losses = torch.stack(losses).tolist()
        check_finite(step_losses, adapter, job.client_id, round_index)
        report = client_report(
            job,
            plan,
            adapter,
            step_losses,
            trained_tokens,
            pack_index,
            self.process_rank,
            time.perf_counter() - began,
        )
        return ClientUpdate(report, adapter)

    def _gradients(
        self,
        leaves: Sequence[Tensor],
        batches: Sequence[Batch],
        settings: LocalSettings,
        key: tuple[int, ...],
    ) -> Tensor:
        """Gradients of one optimizer step, in place of those that the leaves had.

        Returns:
            The loss, detached, a scalar on the base's device.

        Raises:
            ModelError: a micro-batch does not fit the memory.
        """
        untyped: Any = self.model.model
        scales = loss_scales(untyped.dtype, sum(batch.num_targets for batch in batches))
        loss = torch.zeros(())
        for scale in scales:
            for leaf in leaves:
                leaf.grad = None
            try:
                loss = self._backward(batches, settings, key, scale)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"out of memory ({first_line(error)}): a micro-batch of {settings.batch_size} examples does not "
                    f"fit this {place(self.model.device)}; {REMEDIES}"
                ) from error
            if scale == 1.0 and len(scales) == 1:
                break
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.grad /= scale
            if all(leaf.grad is None or bool(torch.isfinite(leaf.grad).all()) for leaf in leaves):
                break
        return loss

    def _backward(
        self, batches: Sequence[Batch], settings: LocalSettings, key: tuple[int, ...], scale: float
    ) -> Tensor:
        """Gradients, times `scale`, of the mean loss over all label tokens, whatever the micro-batches.

        Returns:
            That loss without the scale, detached, a scalar on the base's device.
        """
        num_targets = sum(batch.num_targets for batch in batches)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for index, batch in enumerate(batches):
            input_ids = batch.input_ids.to(self.model.device)
            attention_mask = batch.attention_mask.to(self.model.device)
            with self._dropout(settings, (*key, index), attention_mask):
                logits = self.model.logits(input_ids, attention_mask)
            loss = label_losses(logits, batch.targets.to(self.model.device)).sum() / num_targets
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _dropout(
        self, settings: LocalSettings, key: tuple[int, ...], attention_mask: Tensor
    ) -> AbstractContextManager[None]:
        if settings.lora_dropout == 0 and not settings.base_dropout:
            return nullcontext()
        return self.model.keyed_dropout(
            KeyedDropout(settings.lora_dropout, settings.base_dropout, settings.seed, key, attention_mask)
        )
