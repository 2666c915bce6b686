"""Random streams that depend on what they are for, never on who draws them.

Every stream is keyed by (seed, purpose, further integers such as round and client). Two processes that need the
same numbers ask for the same key; nothing reads or moves a global generator.
"""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *key: int) -> int:
    """A 63-bit seed for the stream (seed, purpose, key), the same on every platform and Python version."""
    text = "\x1f".join([str(seed), purpose, *(str(part) for part in key)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A fresh numpy generator (PCG64) for the stream (seed, purpose, key)."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *key)))


def torch_generator(
    seed: int, purpose: str, *key: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A fresh torch generator on `device` for the stream (seed, purpose, key)."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, *key))
