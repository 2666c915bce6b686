"""Greedy answers of the base under one adapter, with `transformers`' own generation and its key-value cache.

Shapes: b = sequences of a batch, L = longest of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.lora.factors import AdapterState
from fedsim.models.adapted import AdaptedModel
from fedsim.models.out_of_memory import SmallerParts
from fedsim.models.quiet import quiet_transformers
from fedsim.models.stacked import StackedModel

Ints = NDArray[np.int64]


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: the tokenizer's end of sequence, and those of the model's generation settings."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    listed = [ends] if isinstance(ends, int) else list(ends or ())
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return tuple(sorted({*own, *listed}))


@final
class GreedyGenerator:
    """Lets the base of a run speak, whichever engine it is set up for.

    Only one token is ever the most likely one, so nothing is drawn. Settings that the model's files suggest for
    generation (temperature, repetition penalty and the like) are not used.

    Args:
        model: the base, set up for one adapter or for packed rows; within a call it works with one adapter and its own
            attention, afterwards as before.
        pad_id: token id that fills a batch up; always masked.
        stop_ids: tokens that end an answer, see `stop_tokens`.

    Raises:
        ModelError: the model has no `generate`.
    """

    def __init__(self, model: AdaptedModel | StackedModel, pad_id: int, stop_ids: Sequence[int]) -> None:
        untyped: Any = model.model
        if not getattr(untyped, "can_generate", lambda: False)():
            raise ModelError(
                f"the base must be able to generate text to be scored on answers, and {type(untyped).__name__} is not"
            )
        self._model = model
        self._pad_id = pad_id
        self._stop_ids = tuple(stop_ids)
        keys = "evaluation.batch_tokens or evaluation.answers.max_new_tokens"
        self._generated = SmallerParts("a batch of answers", model.device, keys)
        self._guessed = SmallerParts("a batch of answers", model.device, "evaluation.batch_tokens")

    def answers(
        self, adapter: AdapterState | None, batches: Sequence[Sequence[Ints]], max_new_tokens: int
    ) -> list[list[Ints]]:
        """What the model adds to prompts: the most likely token again and again, up to a stop token.

        Token for token what `model.generate(do_sample=False)` of `transformers` gives for the same batch; batches are
        padded on the left.

        Args:
            adapter: factors of all target modules; None for the plain base.
            batches: token ids of prompts, none of them empty; each batch goes through the model at once.
            max_new_tokens: most tokens of an answer, > 0.

        Returns:
            For each batch and prompt the ids of its answer, without the prompt and without the stop token.

        Raises:
            AdapterError: the adapter is not one for the base.
        """
        with self._under(adapter) as adapted, _no_settings(adapted.model), quiet_transformers():
            return [
                self._generated.run(
                    batch,
                    lambda some: len(some) * (max(map(len, some)) + max_new_tokens),
                    lambda some: self._answers(adapted, some, max_new_tokens),
                    _halves,
                )
                for batch in batches
            ]

    def teacher_forced(
        self, adapter: AdapterState | None, batches: Sequence[Sequence[Ints]]
    ) -> list[list[Ints]]:
        """The most likely next token at each position of given sequences, which is no generation.

        Args:
            adapter: as for `answers`.
            batches: token ids of whole sequences, none of them empty.

        Returns:
            For each batch and sequence as many ids as it has tokens: element t is the guess for token t + 1, made
            with the true tokens up to t in view.
        """
        with self._under(adapter) as adapted:
            return [
                self._guessed.run(
                    batch,
                    lambda some: len(some) * max(map(len, some)),
                    lambda some: self._guesses(adapted, some),
                    _halves,
                )
                for batch in batches
            ]

    def _answers(self, adapted: AdaptedModel, prompts: Sequence[Ints], max_new_tokens: int) -> list[Ints]:
        from transformers import GenerationConfig

        input_ids, attention_mask = padded(prompts, self._pad_id, on_the_left=True)
        untyped: Any = adapted.model
        output: Tensor = untyped.generate(
            input_ids=input_ids.to(adapted.device),
            attention_mask=attention_mask.to(adapted.device),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                eos_token_id=list(self._stop_ids) or None,
                pad_token_id=self._pad_id,
            ),
        )
        added = output[:, input_ids.shape[1] :].cpu().numpy()
        return [self._until_stop(row) for row in added]

    def _until_stop(self, row: Ints) -> Ints:
        """A row up to its first stop token; padding comes only after one."""
        ends = np.flatnonzero(np.isin(row, self._stop_ids))
        return row[: ends[0]] if ends.size else row

    def _guesses(self, adapted: AdaptedModel, sequences: Sequence[Ints]) -> list[Ints]:
        input_ids, attention_mask = padded(sequences, self._pad_id, on_the_left=False)
        with torch.no_grad():
            logits = adapted.logits(input_ids.to(adapted.device), attention_mask.to(adapted.device))
            guesses: Ints = logits.argmax(dim=-1).cpu().numpy()
        return [row[: len(sequence)] for row, sequence in zip(guesses, sequences, strict=True)]

    @contextmanager
    def _under(self, adapter: AdapterState | None) -> Iterator[AdaptedModel]:
        """The base with one adapter on it, within the block."""
        if isinstance(self._model, AdaptedModel):
            self._model.load(adapter)
            try:
                yield self._model
            finally:
                self._model.load(None)
            return
        with self._model.unwrapped() as plain:
            # its modules take the places that `unwrapped` fills again afterwards
            adapted = AdaptedModel(plain, self._model.targets, self._model.device)
            adapted.load(adapter)
            yield adapted


def _halves(batch: Sequence[Ints]) -> tuple[Sequence[Ints], Sequence[Ints]] | None:
    middle = len(batch) // 2
    return (batch[:middle], batch[middle:]) if middle else None


def padded(sequences: Sequence[Ints], pad_id: int, on_the_left: bool) -> tuple[Tensor, Tensor]:
    """Sequences as one batch: (b, L) int64 ids and (b, L) int64, 1 at a token and 0 at padding."""
    lengths = np.array([len(sequence) for sequence in sequences])
    assert all(lengths), "a batch holds sequences of at least one token"
    longest = int(lengths.max())
    positions = np.arange(longest)
    is_token = positions >= (longest - lengths)[:, None] if on_the_left else positions < lengths[:, None]
    ids = np.full(is_token.shape, pad_id, dtype=np.int64)
    ids[is_token] = np.concatenate(sequences)
    return torch.from_numpy(ids), torch.from_numpy(is_token.astype(np.int64))


@contextmanager
def _no_settings(model: Any) -> Iterator[None]:
    """Hide the model's own generation settings, which fill in whatever a call leaves open."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
