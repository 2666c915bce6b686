"""A pretend GPU: tensors that say `cuda:0` and are computed on the CPU, to find what would lie in the wrong place.

As on a real GPU, an operation refuses tensors of both kinds of memory, numpy does not see the GPU's, and the host waits
where it reads one. NCCL, which is gloo here, takes nothing but the GPU's. Kernels, streams, memory and a second GPU of
the same process are not pretended.
"""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fedsim.models.packing import HAS_VARLEN

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

INDEXED = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
"""Operations that take positions from the host's memory too; the host waits for the copy."""

JOINED = (aten.cat.default, aten.cat.out, aten.stack.default, aten.stack.out)
"""Operations that take nothing from the host, not even a single value."""

COUNTED = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_consecutive.default,
)
"""Operations after which the host waits: for a value, or for the size of the result."""


class OnGpu(torch.Tensor):
    """A tensor of the pretend GPU, of which a process has one, around one of the CPU."""

    place = CUDA
    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        tensor: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),  # what torch's own code sees: autograd has no threads for a GPU here
        )
        tensor.inner = inner
        return tensor

    device = property(lambda self: OnGpu.place)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} met a tensor of the pretend GPU outside of it")


class PretendGpu(TorchDispatchMode):
    """While it is entered, `cuda` is a device.

    Attributes:
        waits: how often the host waited for the GPU, by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._pin_memory.default:
            return args[0].clone()
        if func is aten.is_pinned.default:
            return False
        flat, shape = tree_flatten((args, dict(kwargs or {})))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        on_gpu = [value for value in tensors if isinstance(value, OnGpu)]
        asked = next((value.type for value in flat if isinstance(value, torch.device)), None)
        if asked == "meta" and torch.utils._device.CURRENT_DEVICE is None:
            asked = "cuda"  # by torch's own code, for something like a tensor of the pretend GPU
        self._check(func, tensors, on_gpu, asked)
        owners = {id(value.inner): value for value in on_gpu}
        flat = [value.inner if isinstance(value, OnGpu) else value for value in flat]
        if asked == "cuda":
            flat = [CPU if isinstance(value, torch.device) else value for value in flat]
        args, kwargs = tree_unflatten(flat, shape)
        found = func(*args, **kwargs)
        if asked != "cuda" and (asked is not None or not on_gpu):
            return found
        # what is written in place is the tensor that was given
        return tree_map_only(
            torch.Tensor, lambda value: owners[id(value)] if id(value) in owners else OnGpu(value), found
        )

    def _check(self, func: Any, tensors: list[torch.Tensor], on_gpu: list[OnGpu], asked: str | None) -> None:
        if func.namespace == "c10d" and len(on_gpu) < len(tensors):
            raise RuntimeError(f"{func}: tensors must be CUDA and dense")
        if not on_gpu:
            return
        on_host = [value for value in tensors if not isinstance(value, OnGpu)]
        if func is not aten.copy_.default and self._refuses(func, tensors, on_host):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
        masks = func in INDEXED and any(value.dtype == torch.bool for value in tensors[1:])
        copies = any(value.dim() > 0 for value in on_host)
        if copies or masks or func in COUNTED or asked == "cpu":
            self.waits[str(func)] += 1

    def _refuses(self, func: Any, tensors: list[torch.Tensor], on_host: list[torch.Tensor]) -> bool:
        """Whether a GPU refuses these tensors of the host beside its own: it takes single values and positions."""
        if not on_host:
            return False
        writes = any(
            argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if func in JOINED or ((writes or func in INDEXED) and not isinstance(tensors[0], OnGpu)):
            return True
        if func is aten.index.Tensor:
            return False
        if func in INDEXED:
            return not isinstance(tensors[-1], OnGpu) and tensors[-1].dim() > 0  # the values
        return any(value.dim() > 0 for value in on_host)


def plain_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """`F.scaled_dot_product_attention` in plain operations; torch's own asks the device for a kernel."""
    assert dropout_p == 0.0
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value


def plain_varlen_attention(real: Any, *args: Any, **kwargs: Any) -> Any:
    """`varlen_attn`, the `real` one, of packed sequences, (T, heads, width), sequence by sequence."""
    given = inspect.signature(real).bind(*args, **kwargs).arguments
    query, key, value, bounds = (given.pop(name) for name in ("query", "key", "value", "cu_seq_q"))
    assert given.pop("window_size") == (-1, 0)
    assert bounds.dtype == torch.int32
    assert given.pop("cu_seq_k") is bounds
    ranges = list(pairwise(bounds.tolist()))
    assert {given.pop("max_q"), given.pop("max_k")} == {max(end - begin for begin, end in ranges)}
    scale = given.pop("scale")
    assert not given
    return torch.cat(
        [
            plain_attention(
                *(tensor[begin:end].transpose(0, 1) for tensor in (query, key, value)),
                is_causal=True,
                scale=scale,
            ).transpose(0, 1)
            for begin, end in ranges
        ]
    )


NCCL = {"nccl": "gloo"}
"""What torch.distributed is asked for, and what it gets."""


@contextlib.contextmanager
def pretend_gpu(patch: pytest.MonkeyPatch, index: int = 0, count: int = 1) -> Iterator[PretendGpu]:
    """A machine with pretend GPUs of the kind of an H100, of which this process uses number `index`."""
    place = torch.device("cuda", index)
    patch.setattr(OnGpu, "place", place)
    values = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": count,
        "current_device": index,
        "set_device": None,
        "empty_cache": None,
        "synchronize": None,
        "current_stream": SimpleNamespace(synchronize=lambda: None),
        "get_rng_state": torch.get_rng_state(),
        "set_rng_state": None,
        "manual_seed_all": None,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "mem_get_info": (2**33, 2**34),
        "get_device_properties": SimpleNamespace(name="pretend", total_memory=2**34, major=9, minor=0),
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
    }
    for name, value in values.items():
        patch.setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    join = dist.init_process_group
    patch.setattr(dist, "init_process_group", lambda backend, **rest: join(NCCL[backend], **rest))
    patch.setattr(dist.distributed_c10d, "_get_object_coll_device", lambda _=None: place)
    patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread that reads weights would not be in the mode
    if HAS_VARLEN:
        from torch.nn.attention import varlen

        patch.setattr(varlen, "varlen_attn", functools.partial(plain_varlen_attention, varlen.varlen_attn))
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain_attention)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=cuda) asks the mode for the copy
    try:
        with PretendGpu() as gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
