"""Peak memory of a process."""

import gc
import json
import platform
import subprocess
import sys
import weakref

import pytest
import torch

from fedsim.training.memory import long_lived_set_aside, peak_memory_bytes

MIB = 2**20
PROGRAM = """
import json, subprocess, sys
import numpy as np
import torch
from fedsim.training.memory import peak_memory_bytes

CPU = torch.device("cpu")
peaks = {"before": peak_memory_bytes(CPU)}
block = np.ones(peaks["before"] + 64 * 2**20, dtype=np.uint8)
peaks |= {"block": block.size, "during": peak_memory_bytes(CPU)}
if len(sys.argv) > 1:
    child = subprocess.run([sys.executable, "-c", sys.argv[1]], capture_output=True, text=True, check=True)
    peaks["of the child"] = json.loads(child.stdout)["before"]
del block
peaks["after"] = peak_memory_bytes(CPU)
print(json.dumps(peaks))
"""


def test_a_peak_stays_and_is_the_process_own():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, PROGRAM], capture_output=True, text=True, check=True, timeout=120
    )
    peaks = json.loads(done.stdout)
    assert peaks["during"] >= peaks["block"] > peaks["before"]
    assert peaks["after"] >= peaks["block"]  # the kernel's counters are exact to some pages only
    if sys.platform == "linux":  # elsewhere there is no peak by memory map
        assert peaks["of the child"] < peaks["block"]  # what its parent held before it started does not count


@pytest.mark.gpu
def test_on_a_gpu_it_is_torchs_own_count():
    device = torch.device("cuda", torch.cuda.current_device())
    before = peak_memory_bytes(device)
    block = torch.empty(before + 8 * MIB, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) >= block.numel()


FREEING = """
import json, os
from fedsim.training.memory import FreeMemory

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

too_early = FreeMemory(period_s=1000.0).give_back()
before = resident_bytes()
blocks = [bytearray(b"x" * 20_000) for _ in range(5_000)]
pin = bytearray(20_000)  # at the end of the heap, so that what lies before it stays with the C library
del blocks
kept = resident_bytes() - before
done = FreeMemory(period_s=0.0).give_back()
print(json.dumps({"too early": too_early, "kept": kept, "done": done, "left": resident_bytes() - before}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the malloc_trim of glibc")
def test_freed_memory_goes_back_to_the_system_when_it_is_time():
    done = subprocess.run(
        [sys.executable, "-c", FREEING], capture_output=True, text=True, check=True, timeout=120
    )
    seen = json.loads(done.stdout)
    assert not seen["too early"]
    assert seen["done"]
    assert seen["kept"] > 10_000_000, "without it, the C library keeps what was freed"
    assert seen["left"] < seen["kept"] / 4


class Cycle:
    """Refers to itself, so that only a search for unreachable objects finds it."""

    def __init__(self):
        self.itself = self


def is_found(objects):
    """Whether Python finds a cycle that lived through its searches among young objects, while many more are made."""
    held = Cycle()
    cycle = weakref.ref(held)
    gc.collect(1)
    del held
    for _ in range(120_000):
        objects.append([])  # kept: what dies at once is not counted
    return cycle() is None


def test_garbage_of_rounds_is_found_beside_many_old_objects():
    old = [[] for _ in range(800_000)]
    gc.collect()
    assert not is_found(old), "it would wait for a quarter as many new objects as there are old ones"
    with long_lived_set_aside():
        assert is_found([])
        assert gc.get_freeze_count() > len(old)
    assert gc.get_freeze_count() == 0
