"""What one client sends or receives, counted in two ways."""

import pickle
import sys

import torch

from fedsim.lora.factors import AdapterState
from fedsim.lora.plan import BOTH, Sides

MIB = 1024**2

ADDRESS_DIGITS = 15
"""Of the memory addresses of most processes on 64-bit Linux."""


def pickled_payload_mib(adapter: AdapterState, sides: Sides = BOTH) -> float:
    """Size in MiB of the pickled state dict: the communication cost of arXiv 2502.18910, Table 1.

    That table's figures are those of the Plato framework, which measures the Python object that holds the pickled
    PEFT state dict of one client, one direction. It exceeds `AdapterState.num_bytes` by some 370 bytes a tensor.

    PyTorch writes the address of each tensor's memory into the pickle, in decimal digits. They are counted as
    `ADDRESS_DIGITS`, so that the same adapter has the same size in every process.
    """
    tensors = {}
    for module, factors in adapter.items():
        for side in sorted(sides):
            # cloned, because a view would be pickled with all the memory behind it
            factor = getattr(factors, side).detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = factor
    data = pickle.dumps(tensors)
    surplus = 0
    for tensor in tensors.values():
        address = str(tensor.untyped_storage()._cdata).encode()
        surplus += data.count(address) * (len(address) - ADDRESS_DIGITS)
    return (sys.getsizeof(data) - surplus) / MIB
