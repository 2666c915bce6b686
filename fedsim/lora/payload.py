"""What one client sends or receives, counted in two ways."""

import pickle
import sys

from fedsim.lora.factors import AdapterState

MIB = 1024**2


def pickled_payload_mib(adapter: AdapterState) -> float:
    """Size in MiB of the pickled state dict: the communication cost of arXiv 2502.18910, Table 1.

    That table's figures are those of the Plato framework, which measures the Python object that holds the pickled
    PEFT state dict of one client, one direction. It exceeds `AdapterState.num_bytes` by some 370 bytes a tensor.
    """
    tensors = {}
    for module, factors in adapter.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = factors.A.detach().cpu().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = factors.B.detach().cpu().contiguous()
    return sys.getsizeof(pickle.dumps(tensors)) / MIB
