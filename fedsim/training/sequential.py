"""The reference trainer: one client after another, in a plain loop.

Shapes: b = examples of a micro-batch, L = their padded length.
"""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from fedsim.data.batches import Batch, collate, local_batches
from fedsim.data.tokens import TokenStore
from fedsim.errors import TrainingError
from fedsim.lora.factors import AdapterState
from fedsim.lora.updates import ClientReport, ClientUpdate
from fedsim.models.adapted import AdaptedModel, KeyedDropout
from fedsim.models.losses import label_losses
from fedsim.training.packs import ClientJob, Pack
from fedsim.training.settings import LocalSettings, lr_factor, make_optimizer


class SequentialTrainer:
    """Trains the clients of a pack one after another; the oracle for every faster trainer.

    Args:
        model: the base with its adapter slots.
        store: training examples.
        pad_id: token id that fills a batch up; masked, so its value is of no consequence.
        settings: how clients train.
        process_rank: written into the reports.
    """

    def __init__(
        self, model: AdaptedModel, store: TokenStore, pad_id: int, settings: LocalSettings, process_rank: int
    ) -> None:
        self.model = model
        self.store = store
        self.pad_id = pad_id
        self.settings = settings
        self.process_rank = process_rank

    def train(self, pack: Pack, starts: Sequence[AdapterState], round_index: int) -> list[ClientUpdate]:
        """See `Trainer.train`."""
        return [
            self._train_client(job, start, round_index, pack.index)
            for job, start in zip(pack.jobs, starts, strict=True)
        ]

    def _train_client(
        self, job: ClientJob, start: AdapterState, round_index: int, pack_index: int
    ) -> ClientUpdate:
        began = time.perf_counter()
        settings = self.settings
        steps = local_batches(
            len(job.examples),
            batch_size=settings.batch_size,
            local_epochs=job.local_epochs,
            local_steps=job.local_steps,
            accumulation=settings.accumulation,
            seed=settings.seed,
            round_index=round_index,
            client_id=job.client_id,
        )
        leaves = self.model.load(start, trainable=True)
        optimizer = make_optimizer(leaves, settings.optimizer)
        losses: list[Tensor] = []
        trained_tokens = 0
        for step, micro_batches in enumerate(steps):
            batches = [collate(self.store, job.examples[chosen], self.pad_id) for chosen in micro_batches]
            factor = lr_factor(step, len(steps), settings.schedule, settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.optimizer.lr * factor
            optimizer.zero_grad(set_to_none=True)
            losses.append(self._backward(batches, (round_index, job.client_id, step)))
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(leaves, settings.max_grad_norm)
            optimizer.step()
            trained_tokens += sum(batch.num_targets for batch in batches)
        adapter = self.model.read()
        step_losses = _finite(losses, adapter, job.client_id, round_index)
        report = ClientReport(
            client_id=job.client_id,
            num_examples=len(job.examples),
            num_tokens=job.num_tokens,
            lora_rank=max(factors.rank for factors in adapter.values()),
            steps=len(steps),
            train_loss_first=step_losses[0],
            train_loss_last=step_losses[-1],
            train_loss_mean=float(np.mean(step_losses)),
            trained_tokens=trained_tokens,
            uplink_bytes=adapter.num_bytes,
            downlink_bytes=start.num_bytes,
            pack=pack_index,
            process_rank=self.process_rank,
            seconds=time.perf_counter() - began,
        )
        return ClientUpdate(report, adapter)

    def _backward(self, batches: Sequence[Batch], key: tuple[int, ...]) -> Tensor:
        """Gradients of one optimizer step: the mean loss over all its label tokens, whatever the micro-batches.

        Returns:
            That loss, detached, a scalar on the base's device.
        """
        num_targets = sum(batch.num_targets for batch in batches)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for index, batch in enumerate(batches):
            input_ids = batch.input_ids.to(self.model.device)
            attention_mask = batch.attention_mask.to(self.model.device)
            with ExitStack() as randomness:
                self._enter_dropout(randomness, (*key, index), attention_mask)
                logits = self.model.logits(input_ids, attention_mask)
            loss = label_losses(logits, batch.targets.to(self.model.device)).sum() / num_targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _enter_dropout(self, randomness: ExitStack, key: tuple[int, ...], attention_mask: Tensor) -> None:
        settings = self.settings
        if settings.lora_dropout > 0:
            dropout = KeyedDropout(settings.lora_dropout, settings.seed, key, attention_mask)
            randomness.enter_context(self.model.keyed_dropout(dropout))
        if settings.base_dropout:
            randomness.enter_context(self.model.base_dropout(settings.seed, key))


def _finite(losses: Sequence[Tensor], adapter: AdapterState, client_id: int, round_index: int) -> list[float]:
    """The losses as numbers.

    Raises:
        TrainingError: a loss or a factor is not finite.
    """
    values: list[float] = torch.stack(list(losses)).tolist()
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss of client {client_id} must stay finite, got {value} at local step {step} of round "
                f"{round_index}; lower training.optimizer.lr or set training.max_grad_norm"
            )
    for module, factors in adapter.items():
        if not (torch.isfinite(factors.A).all() and torch.isfinite(factors.B).all()):
            raise TrainingError(
                f"the adapter of client {client_id} must stay finite, got a value that is not in {module} after "
                f"round {round_index}; lower training.optimizer.lr or set training.max_grad_norm"
            )
    return values
