"""Frozen linear modules whose weights are kept in 8 or 4 bits (bitsandbytes, the optional extra `quantization`).

transformers quantizes while it loads. What it leaves is replaced here, for two reasons. LLM.int8 looks for outliers in
the activations of a whole batch, so a client's result would depend on who shares its row; and bitsandbytes changes the
layout of 4-bit weights on a CPU at the first pass without gradients. Here every product takes the dequantized weight in
the activations' type, forward and backward: the numbers are those of a plain model with the dequantized weights.

Shapes: i / o = in / out features.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.errors import ModelError

KEY = "model.quantization"
Quantization = Literal["none", "int8", "nf4", "fp4"]

INT8_STEP = 1.0 / 127.0
"""Of an int8 weight, as a share of its row's largest."""

BLOCK = 64
"""Weights that share a scale in 4 bits, which is the default of bitsandbytes."""


def check_available(quantization: Quantization) -> None:
    """Check that the optional package is installed.

    Raises:
        ModelError: it is not.
    """
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{KEY}={quantization} needs the package bitsandbytes, which is not installed; run pip install "
            f"'fedsim[quantization]' or set {KEY}=none"
        )


def loading_options(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize on the way to the device; none without quantization."""
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization, bnb_4bit_compute_dtype=dtype
        )
    return {"quantization_config": settings}


class QuantizedLinear(nn.Linear):
    """A frozen linear module with a weight in 8 or 4 bits; differentiable in its input alone, and keeps nothing of it.

    Args:
        linear: as bitsandbytes has it, on its device.

    Attributes:
        weight: (o, i) int8, or (o * i / 2, 1) uint8 with two weights a byte.
        scales: (o,) float32 of a row's largest weight, or (o * i / 64,) of a block's.
        codebook: (16,) float32, what a 4-bit code stands for; empty for int8.
    """

    scales: Tensor
    codebook: Tensor

    def __init__(self, linear: Any) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and draw a new weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        quantized = linear.weight
        self.weight = nn.Parameter(quantized.data, requires_grad=False)
        self.bias = linear.bias
        self.training = False
        state = getattr(quantized, "quant_state", None)
        if state is None:
            self.kind = "int8"
            self.register_buffer("scales", quantized.SCB.detach())
            self.register_buffer("codebook", quantized.SCB.new_empty(0))
        else:
            assert state.blocksize == BLOCK
            assert not state.nested
            self.kind = state.quant_type
            self.register_buffer("scales", state.absmax.detach())
            self.register_buffer("codebook", state.code.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), in the type of x."""
        y: Tensor = _DequantizedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(o, i) the weight, newly allocated."""
        from bitsandbytes import functional

        if self.kind == "int8":
            # in one pass; the library's own makes two float32 copies on the way
            scales = (self.scales.float() * INT8_STEP)[:, None]
            out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
            return torch.mul(self.weight, scales, out=out)
        state = functional.QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.codebook,
            blocksize=BLOCK,
            quant_type=self.kind,
            dtype=dtype,
        )
        weight: Tensor = functional.dequantize_4bit(self.weight, state)
        return weight


class _DequantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, linear.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.linear.dequantized(gradient.dtype), None


def replace_quantized(model: nn.Module) -> int:
    """Put a `QuantizedLinear` in the place of each quantized module of bitsandbytes; how many."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Linear4bit | Linear8bitLt):
                setattr(parent, name, QuantizedLinear(child))
                count += 1
    return count


def weight_bytes(quantization: Quantization, out_features: int, in_features: int) -> int:
    """Bytes of a quantized weight with its scales."""
    if quantization == "int8":
        return out_features * in_features + 4 * out_features
    return out_features * in_features // 2 + 4 * -(-out_features * in_features // BLOCK)
