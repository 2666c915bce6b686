"""Can a model be run on packed rows? Settled by trying, before anything depends on it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.models.out_of_memory import is_out_of_memory
from fedsim.models.packing import LAYOUT_ARGUMENT, layout_of
from fedsim.models.stacked import StackedModel

LENGTHS = (7, 3, 12, 5)
"""Tokens of the texts that are tried, besides a long one."""

LONGEST = 512
"""Most tokens of the long one; it shows attention that reaches so far only, whatever its name."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a logit, as a share of the largest logit."""


def alone_logits(model: nn.Module, device: torch.device, max_tokens: int) -> list[Tensor]:
    """Logits of a few texts of arbitrary tokens, each run by itself through the model as it is.

    Args:
        model: before it is set up for packed rows.
        device: of the model.
        max_tokens: longest sequence of the run.
    """
    untyped: Any = model
    with torch.no_grad():
        return [
            untyped(input_ids=ids[None].to(device), use_cache=False).logits[0]
            for ids in _texts(untyped, max_tokens)
        ]


def packing_problem(stacked: StackedModel, alone: list[Tensor], max_tokens: int) -> str | None:
    """Why packed rows cannot be trusted with this model; None if they give the logits that each text has alone.

    Models that ignore the layout mix the texts of a row silently, so the logits are compared, whatever the architecture
    says of itself.

    Args:
        stacked: the model, set up for packed rows.
        alone: from `alone_logits`, before it was set up.
        max_tokens: longest sequence of the run.
    """
    config = stacked.model.config.get_text_config()  # of models that also take images it is a part
    window = getattr(config, "sliding_window", None)
    if window is not None and window < max_tokens and getattr(config, "use_sliding_window", True):
        return f"its attention slides over {window} tokens, fewer than data.max_tokens={max_tokens}"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        # small logits would not show it
        if getattr(config, name, None):
            return f"packed rows do not have its {name}"
    texts = _texts(stacked.model, max_tokens)
    lengths = np.asarray([len(text) for text in texts], dtype=np.int64)
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    try:
        with torch.no_grad():
            body = stacked.body(
                torch.cat(texts)[None].to(stacked.device),
                positions[None].to(stacked.device),
                **{LAYOUT_ARGUMENT: layout_of(lengths, stacked.device)},
            )
            with stacked.head.whole():
                packed = stacked.head.logits(body[0])
    except (
        Exception
    ) as error:  # whatever an unknown architecture raises, the answer is that it cannot be packed
        if is_out_of_memory(error):  # which says nothing of the architecture
            raise
        return f"its forward pass does not take packed rows ({type(error).__name__}: {error})"
    expected = torch.cat(alone)
    if packed.shape != expected.shape:
        return f"packed logits have the shape {tuple(packed.shape)} instead of {tuple(expected.shape)}"
    difference = float((packed - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCES[stacked.dtype]:
        return f"texts in a packed row do not have the logits they have alone (relative difference {difference:.1e})"
    return None


def undivided_randomness(model: nn.Module) -> str | None:
    """Why the base's own dropout cannot be given to each client by itself; None if it can."""
    untyped: Any = model
    for name in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "layerdrop"):
        value = getattr(untyped.config.get_text_config(), name, 0.0)
        if value:
            return (
                f"model.dropout=as_config includes {name}={value}, whose draws cannot be told apart by client"
            )
    return None


def _texts(model: Any, max_tokens: int) -> list[Tensor]:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    lengths = (*LENGTHS, min(max_tokens, LONGEST))
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]
