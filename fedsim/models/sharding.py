"""A base that no process holds whole: DeepSpeed's ZeRO-3 over the frozen weights.

Each rank of a sharding group keeps a part of every weight. A module's weights are gathered when a pass reaches it and
dropped after it, so the ranks of a group must run their passes together. They have different clients, hence `Passes`:
who has nothing to do runs an empty pass. Adapters, their gradients and their optimizers are not DeepSpeed's concern:
they are no parameters of the model, live on the rank that trains their clients, and are never split or averaged.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.data.tokens import TokenStore
from fedsim.errors import LostRankError, ModelError
from fedsim.models.packing import pack_tokens
from fedsim.models.passes import Kind
from fedsim.models.rows import RankRows
from fedsim.models.stacked import StackedModel, StepPlan, plan_products

T = TypeVar("T")

KEY = "model.sharding"

_NOTHING, _RANKED = 0, {"test": 1, "train": 2}

logger = logging.getLogger(__name__)


class SharedBy(Protocol):
    """The ranks that share one copy of the base; `fedsim.comm.sharding.ShardingGroup` is one.

    DeepSpeed asks more of it: what it calls a model parallel unit.
    """

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    @property
    def index(self) -> int:
        """This one's place among them."""
        ...

    @property
    def offload(self) -> bool:
        """Whether the parts lie in main memory."""
        ...

    @property
    def group(self) -> Any:
        """Of torch.distributed."""
        ...

    def highest(self, value: int) -> int:
        """The largest value that any of them gives; each of them calls it."""
        ...


@final
class LockstepPasses:
    """Passes that the ranks of a sharding group run together.

    Before each pass the ranks tell each other what they want to run; the highest kind that anybody wants is run by all,
    by those who want something else as an empty pass.

    Args:
        shell: the module whose forward pass DeepSpeed watches.
        ranks: that share the base's weights.
        empty: runs an empty pass of a kind; nothing of it is kept.
    """

    def __init__(
        self,
        shell: nn.Module,
        ranks: SharedBy,
        empty: Callable[[Kind], None],
    ) -> None:
        self._shell = shell
        self._ranks = ranks
        self._empty = empty

    def run(self, kind: Kind, work: Callable[[], T]) -> T:
        """See `Passes`.

        Raises:
            LostRankError: this rank failed within the pass, where the others wait for it and cannot be told.
        """
        while True:
            agreed = self._agree(_RANKED[kind])
            if agreed == _RANKED[kind]:
                return self._pass(work)
            self._run_empty(agreed)

    @contextlib.contextmanager
    def phase(self) -> Iterator[None]:
        """Work within; then empty passes until every rank of the group is through."""
        try:
            yield
        except LostRankError:
            raise
        except BaseException:
            self._run_out()
            raise
        self._run_out()

    def _run_out(self) -> None:
        while agreed := self._agree(_NOTHING):
            self._run_empty(agreed)

    def _agree(self, wanted: int) -> int:
        return self._ranks.highest(wanted)

    def _run_empty(self, agreed: int) -> None:
        kind: Kind = "train" if agreed == _RANKED["train"] else "test"
        self._pass(lambda: self._empty(kind))

    def _pass(self, work: Callable[[], T]) -> T:
        try:
            result: T = self._shell(work)
        except LostRankError:
            raise
        except Exception as error:
            raise LostRankError(
                f"{type(error).__name__} within a pass through the sharded base: {error}", failed_here=True
            ) from error
        return result


class Shell(nn.Module):
    """Runs any work as its forward pass, so that DeepSpeed sees where a pass begins."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], T]) -> T:
        """What `work` returns."""
        return work()


class ShardedHead:
    """A linear output head whose weights are gathered for the duration of `whole`."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self.num_tokens = linear.out_features

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Around the use of the head, on all ranks of the sharding group."""
        gathered: contextlib.AbstractContextManager[None] = _deepspeed().zero.GatheredParameters(
            list(self._linear.parameters())
        )
        return gathered

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Head`."""
        return torch.nn.functional.linear(hidden, self._linear.weight.detach(), self._bias())

    def backward(self, gradient: Tensor) -> Tensor:
        """See `Head`."""
        return gradient @ self._linear.weight.detach()

    def _bias(self) -> Tensor | None:
        return None if self._linear.bias is None else self._linear.bias.detach()


def load_sharded(
    folder: Path,
    model_config: Any,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    ranks: SharedBy,
) -> nn.Module:
    """The frozen model of which this rank holds a part, without ever holding it whole.

    Modules are made and split one after another; each rank then reads its own part of each tensor from the files, which
    are mapped into memory, so that a node reads them once.

    Args:
        folder: with the weights in safetensors format, in the layout that `save_pretrained` writes.
        model_config: of transformers.
        name: the value of `model.name_or_path`, for messages.
        dtype: of the weights.
        device: of this rank.
        ranks: that share the weights.

    Raises:
        ModelError: DeepSpeed is not installed; weights are missing or have another shape.
    """
    _name_device(device)
    import torch._dynamo  # DeepSpeed replaces torch's constructors meanwhile, at which its import would take offence
    from transformers import AutoModelForCausalLM, initialization
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    deepspeed = _deepspeed()
    if dtype == torch.float64:
        raise ModelError(f"model.dtype must be float32, bfloat16 or float16 with {KEY}=zero3, got float64")
    _return_large_blocks()
    # the type goes by way of the settings: DeepSpeed 0.19 overlooks the argument where a CPU has no float16
    settings = deepspeed_settings(ranks.offload) | _KINDS[dtype]
    with (
        deepspeed.zero.Init(data_parallel_group=ranks.group, config_dict_or_path=settings),
        initialization.no_init_weights(),  # they are read from files
        prevent_arange_dtype_change(),
    ):
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    model.tie_weights()
    tensors = _tensor_files(folder)
    for path, parameter in model.named_parameters():
        _read_part(parameter, path, tensors, name, folder, ranks)
    for path, buffer in model.named_buffers():
        if path in tensors:
            buffer.copy_(_tensor(tensors[path], path))
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen.to(device)


def _read_part(
    parameter: Any, path: str, tensors: dict[str, Path], name: str, folder: Path, ranks: SharedBy
) -> None:
    """Copy this rank's part of a tensor from its file."""
    if path not in tensors:
        raise ModelError(
            f"model.name_or_path={name}: {folder} has no tensor {path}; with {KEY}=zero3 the files must have the "
            "layout that save_pretrained of transformers writes: load the model once and save it again"
        )
    whole = _tensor(tensors[path], path)
    if tuple(whole.shape) != tuple(parameter.ds_shape):
        raise ModelError(
            f"model.name_or_path={name}: {path} must have the shape {tuple(parameter.ds_shape)}, got "
            f"{tuple(whole.shape)}"
        )
    part = parameter.ds_tensor
    begin = part.ds_numel * ranks.index
    own = whole.reshape(-1)[begin : begin + part.ds_numel].to(part.dtype)
    part.data.zero_()
    part.data[: own.numel()].copy_(own)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> its file."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _tensor(path: Path, name: str) -> Tensor:
    """A tensor that lies in the mapped file; what is not looked at is not read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _return_large_blocks() -> None:
    """Let the C library give gathered weights back at once: it would keep about as much as was gathered at a time."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


_MMAP_THRESHOLD = -3
"""Of mallopt: larger blocks are mapped by themselves, and unmapped when they are freed."""

_KINDS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {},
    torch.bfloat16: {"bf16": {"enabled": True}},
    torch.float16: {"fp16": {"enabled": True}},
}


def run_in_lockstep(stacked: StackedModel, ranks: SharedBy, store: TokenStore) -> None:
    """Let the passes of a model on a sharded base be run by the ranks of its group together.

    Args:
        stacked: on a base of `load_sharded`.
        ranks: that share the weights.
        store: of which the shortest example stands in an empty pass.
    """
    shell = watch_passes(stacked.model, ranks)
    shortest = np.array([int(np.argmin(store.num_tokens))])

    def empty(kind: Kind) -> None:
        rows = RankRows(stacked.targets, [1], torch.float32, stacked.device)
        packed = pack_tokens(store, [shortest], stacked.device)
        plan = StepPlan(plan_products(rows, packed, [0], stacked.dtype))
        trains = kind == "train"
        with stacked.aside(), torch.set_grad_enabled(trains):
            stacked.attach(rows)
            with stacked.planned(plan):
                weights = torch.ones(len(packed.label_targets), device=stacked.device) if trains else None
                losses = stacked.label_losses(packed, weights)
                if trains:
                    losses.sum().backward()  # type: ignore[no-untyped-call]

    stacked.passes = LockstepPasses(shell, ranks, empty)


def watch_passes(model: nn.Module, ranks: SharedBy) -> Shell:
    """Let DeepSpeed gather and drop the weights of a model of `load_sharded` as passes go through it."""
    from deepspeed.runtime.zero import partitioned_param_coordinator
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    # at each new order of modules, and ours alternate, it asks all processes whether they saw the same; those of other
    # groups are elsewhere, and within a group the passes are agreed on
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None  # noqa: ARG005
    shell = Shell(model)
    engine, *_ = _deepspeed().initialize(model=shell, config=deepspeed_settings(ranks.offload), mpu=ranks)
    if not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
        raise ModelError(
            f"{KEY}=zero3: DeepSpeed did not split the base, but made {type(engine.optimizer).__name__}"
        )
    watched: Shell = engine.module
    object.__setattr__(watched, "engine", engine)  # whose hooks live as long as it does
    return watched


def deepspeed_settings(offload: bool) -> dict[str, Any]:
    """Gather each module's weights when it is reached, keep none: memory counts, and no order is guessed."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
    if offload:
        on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def sharded_fingerprint(model: nn.Module, content: Callable[[Tensor], bytes], digest: Any) -> str:
    """As `fingerprint` of the whole model: parameters are gathered one after another, on all ranks of the group."""
    state = dict(model.state_dict(keep_vars=True))
    for name, tensor in sorted(state.items()):
        untyped: Any = tensor
        if hasattr(untyped, "ds_shape"):
            with _deepspeed().zero.GatheredParameters([untyped]):
                digest.update(f"{name} {tuple(untyped.ds_shape)} {untyped.dtype}".encode())
                digest.update(content(untyped.data))
        else:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(content(tensor))
    return str(digest.hexdigest())


def _name_device(device: torch.device) -> None:
    """Tell DeepSpeed, before it is loaded, where this process computes; it would take the GPU of LOCAL_RANK.

    Under srun that is another number than the device's where each task sees a GPU of its own.
    """
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"


def _deepspeed() -> Any:
    """The library.

    Raises:
        ModelError: it is not installed, or does not run here.
    """
    try:
        import deepspeed
    except ImportError as error:
        raise ModelError(
            f"{KEY}=zero3 needs DeepSpeed, which cannot be imported ({error}); pip install 'fedsim[deepspeed]'"
        ) from error
    return deepspeed
