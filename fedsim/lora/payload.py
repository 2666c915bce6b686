"""What one client sends or receives, counted in two ways."""

import pickle
import sys

from fedsim.lora.factors import AdapterState

MIB = 1024**2

ADDRESS_DIGITS = 15
"""Of the memory addresses of most processes on 64-bit Linux."""


def pickled_payload_mib(adapter: AdapterState) -> float:
    """Size in MiB of the pickled state dict: the communication cost of arXiv 2502.18910, Table 1.

    That table's figures are those of the Plato framework, which measures the Python object that holds the pickled
    PEFT state dict of one client, one direction. It exceeds `AdapterState.num_bytes` by some 370 bytes a tensor.

    PyTorch writes the address of each tensor's memory into the pickle, in decimal digits. They are counted as
    `ADDRESS_DIGITS`, so that the same adapter has the same size in every process.
    """
    tensors = {}
    for module, factors in adapter.items():
        # cloned, because a view would be pickled with all the memory behind it
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.A.detach().cpu().clone()
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.B.detach().cpu().clone()
    data = pickle.dumps(tensors)
    surplus = 0
    for tensor in tensors.values():
        address = str(tensor.untyped_storage()._cdata).encode()
        surplus += data.count(address) * (len(address) - ADDRESS_DIGITS)
    return (sys.getsizeof(data) - surplus) / MIB
