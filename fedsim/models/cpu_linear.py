"""Frozen linear modules whose weights are packed once for oneDNN, which multiplies float32 faster on some CPUs.

Shapes: T = rows (tokens), i / o = in / out features; W (o, i) is a frozen weight.

torch multiplies float32 matrices with MKL. On AMD's CPUs MKL keeps to 256-bit instructions; oneDNN uses the 512-bit
ones, and a frozen weight can be brought into its blocked layout once: W for the output, W^T for the input gradient.
The two operations that do so are private to torch (its compiler calls them), so they are used in this module alone,
behind `onednn_available` and `self_check`, and `restore_linears` undoes everything.

Memory: the packed W and W^T are copies, so they cost twice the bytes of the packed weights on top of the weights
themselves, which stay for saving, for tied embeddings and for whoever reads `weight`.

Results equal torch's to float32 rounding, not bit by bit. At an equal number of threads they repeat bit by bit.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fedsim.errors import ModelError

KEY = "model.cpu_linear"
USE_TORCH = "set model.cpu_linear=torch to use torch's own"
CHECKED_SHAPES = ((5, 64, 48), (33, 17, 130), (1, 256, 64))
"""(T, o, i) of the self-check; sizes beside the block sizes of 16 and 64 among them."""
SMALLEST = 2**18
"""Values of a matrix from which on oneDNN's product makes a model faster."""
TOLERANCE = 1e-5
"""Largest error that the self-check accepts, relative to the largest value of the exact result."""

logger = logging.getLogger(__name__)


class PackedMatrix:
    """W in oneDNN's layout, and W^T. Multiplies; knows nothing of gradients.

    Args:
        weight: (o, i) float32 on the CPU, kept and not copied; it must not change afterwards.

    Raises:
        ModelError: the weight has another type or place, or it requires a gradient.
    """

    def __init__(self, weight: Tensor) -> None:
        _check_packable(weight, "weight")
        self.weight = weight
        plain = weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain)
        self._packed_t = torch.ops.mkldnn._reorder_linear_weight(plain.T)

    def __reduce__(self) -> tuple[type["PackedMatrix"], tuple[Tensor]]:
        """Copies and pickles pack anew: oneDNN's layout has no storage that torch could copy."""
        return PackedMatrix, (self.weight,)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the two packed copies, apart from rounding up to whole blocks."""
        return 2 * self.weight.numel() * self.weight.element_size()

    def times_weight_t(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., i) -> (..., o): x W^T + bias, newly allocated; no gradient is recorded."""
        return _multiply(x, self._packed, bias)

    def times_weight(self, grad: Tensor) -> Tensor:
        """(..., o) -> (..., i): grad W, newly allocated; no gradient is recorded."""
        return _multiply(grad, self._packed_t, None)


def _check_packable(tensor: Tensor, what: str) -> None:
    if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor.requires_grad:
        raise ModelError(
            f"{KEY}: a {what} must be float32, on the CPU and frozen to be packed, got {tensor.dtype} on "
            f"{tensor.device}{' with a gradient' if tensor.requires_grad else ''}; {USE_TORCH}"
        )


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a packed frozen weight, differentiable in x alone; nothing of x is kept for that.

    Args:
        x: (..., i) float32 on the CPU, any strides, any number of rows.
        bias: (o,), frozen.

    Returns:
        (..., o).
    """
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _PackedProduct.apply(x, matrix, bias, False)  # type: ignore[no-untyped-call]
        return y
    return matrix.times_weight_t(x, bias)


class _PackedProduct(torch.autograd.Function):
    """x W^T + bias, or x W. The gradient of either is the other, so gradients of any order exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix, bias: Tensor | None, is_backward: bool) -> Tensor:
        ctx.matrix = matrix
        ctx.is_backward = is_backward
        return matrix.times_weight(x) if is_backward else matrix.times_weight_t(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        product = _PackedProduct.apply(grads[0], ctx.matrix, None, not ctx.is_backward)  # type: ignore[no-untyped-call]
        return product, None, None, None


def _multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ModelError(
            f"{KEY}: packed linears take float32 on the CPU, got {x.dtype} on {x.device}; {USE_TORCH}"
        )
    rows = x.detach().reshape(-1, x.shape[-1])
    missing = padded_rows(len(rows)) - len(rows)
    if missing:
        rows = torch.cat((rows, rows.new_zeros(missing, rows.shape[1])))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product[: len(rows) - missing].view(*x.shape[:-1], product.shape[1])


def padded_rows(num_rows: int) -> int:
    """How many rows oneDNN is given for `num_rows`: at most an eighth more from 64 rows on, rows of 0.

    It makes a program for each number of rows and keeps it, about half a megabyte and half a millisecond each, and
    hardly two packed rows of tokens have the same length. So there are 8 lengths from one power of two to the next.
    """
    step = max(8, 2 ** (num_rows.bit_length() - 1) // 8) if num_rows else 8
    return -(-num_rows // step) * step


class FrozenCpuLinear(nn.Linear):
    """A frozen `nn.Linear` that multiplies with packed weights.

    It is an `nn.Linear` with the same parameter objects, so names in the state dict, ties to an embedding and searches
    for linear modules stay as they were. Loading a state dict packs anew; writing into `weight` in any other way is
    not seen.

    Args:
        linear: frozen, float32, on the CPU. Left as it is.

    Raises:
        ModelError: the linear module is none of this.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate and draw a new weight
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.training = linear.training
        if linear.bias is not None:
            _check_packable(linear.bias, "bias")
        self.packed = PackedMatrix(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o)."""
        return packed_linear(x, self.packed, self.bias)

    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` with the same parameter objects."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = self.weight
        linear.bias = self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise ModelError(
                f"{KEY}: packed linears cannot become {moved.dtype} on {moved.device}; call restore_linears first"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.packed = PackedMatrix(self.weight)


@dataclass(frozen=True)
class PrepackReport:
    """What `prepack_frozen_linears` did: modules replaced, and bytes of the copies it made."""

    num_modules: int
    extra_bytes: int


def prepack_frozen_linears(model: nn.Module, skip: Collection[str] = ()) -> PrepackReport:
    """Replace the linear modules of a frozen model by packed ones, in place.

    Subclasses of `nn.Linear` stay as they are. A module that is reachable by two paths is packed once.

    Args:
        model: float32, on the CPU, frozen.
        skip: dotted paths of linear modules to leave alone.

    Raises:
        ModelError: a path of `skip` names no linear module, or a linear module cannot be packed; nothing has been
            replaced then.
    """
    places = _linear_places(model)
    unknown = sorted(set(skip) - {path for path, *_ in places})
    if unknown:
        raise ModelError(f"{KEY}: {unknown[0]!r} is to be skipped, but it is no linear module of the model")
    packed: dict[nn.Linear, FrozenCpuLinear] = {}
    for path, _, _, linear in places:
        if path not in skip and linear not in packed:
            packed[linear] = FrozenCpuLinear(linear)
    for path, parent, name, linear in places:
        if path not in skip:
            setattr(parent, name, packed[linear])
    return PrepackReport(len(packed), sum(module.packed.extra_bytes for module in packed.values()))


def restore_linears(model: nn.Module) -> int:
    """Put plain linear modules with the original parameters back in place; how many."""
    restored: dict[FrozenCpuLinear, nn.Linear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, FrozenCpuLinear):
                setattr(parent, name, restored.setdefault(child, child.to_linear()))
    return len(restored)


def _linear_places(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """(path, parent, name in the parent, module) of each plain linear module below `model`."""
    return [
        (f"{parent_path}.{name}".lstrip("."), parent, name, child)
        for parent_path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if type(child) is nn.Linear
    ]


def onednn_available() -> bool:
    """True if this build of torch has oneDNN, switched on, with the two private operations."""
    operations = torch.ops.mkldnn
    return (
        bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(operations, "_reorder_linear_weight")
        and hasattr(operations, "_linear_pointwise")
    )


def self_check() -> bool:
    """True if packed products and their gradients equal float64 ones within `TOLERANCE` on a few shapes.

    False where the private operations are missing, take other arguments than they used to, or compute in less than
    float32 (torch can be told to do so).
    """
    generator = torch.Generator().manual_seed(0)
    try:
        return all(_is_exact(*shape, generator) for shape in CHECKED_SHAPES)
    except (
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:  # what torch raises for an unknown or changed operation
        logger.debug("oneDNN's packed linears do not run: %s", error)
        return False


def _is_exact(num_rows: int, out_features: int, in_features: int, generator: torch.Generator) -> bool:
    weight, bias, x, grad = (
        torch.randn(shape, generator=generator)
        for shape in (
            (out_features, in_features),
            (out_features,),
            (num_rows, in_features),
            (num_rows, out_features),
        )
    )
    with torch.enable_grad(), torch.inference_mode(False):
        x = x.requires_grad_()
        y = packed_linear(x, PackedMatrix(weight), bias)
        (x_grad,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double() @ weight.double().T + bias.double()
    exact_grad = grad.double() @ weight.double()
    return _is_near(y.detach(), exact) and _is_near(x_grad, exact_grad)


def _is_near(value: Tensor, exact: Tensor) -> bool:
    return bool((value.double() - exact).abs().max() <= TOLERANCE * exact.abs().max())


@dataclass(frozen=True)
class CpuKind:
    """What decides which library is faster: the vendor as the CPU names it, and what torch uses of it.

    Attributes:
        vendor: such as "AuthenticAMD"; empty where unknown.
        capability: torch's name of the widest instructions, such as "AVX512".
    """

    vendor: str
    capability: str


def read_cpu_kind(cpuinfo: Path = Path("/proc/cpuinfo")) -> CpuKind:
    """The kind of the first CPU of this machine, as Linux describes it."""
    fields: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return CpuKind(
        fields.get("vendor_id", ""),
        torch.backends.cpu.get_cpu_capability(),
    )


def pays(shapes: Sequence[tuple[int, int]], cpu: CpuKind) -> bool:
    """True if packed weights of these shapes make a model faster on such a CPU. A rule; nothing is timed.

    They do on AMD's CPUs with AVX-512 if at least half of the weights lie in matrices of at least 2^18 values.
    Elsewhere torch's own product stays: MKL has its fastest path on Intel's CPUs, and others were not measured.

    Measured in GFLOP/s of one thread, output and input gradient together, torch 2.13 and oneDNN 3.12, torch's own and
    packed, best of 15: on an EPYC of family 25 model 17 that others were using, and on one of family 26 model 2, whose
    512-bit units are twice as wide.

                        family 25                                    family 26
        o x i           T = 32    128       512       2048           T = 32    128        512        2048
        64 x 64         47 / 15   60 / 34   84 / 68   73 / 82        64 / 21   92 / 67    101 / 151  101 / 216
        128 x 128       73 / 40   89 / 76   94 / 97   89 / 96        87 / 68   104 / 153  107 / 219  69 / 104
        128 x 512       64 / 58   81 / 79   86 / 92   66 / 86        94 / 144  105 / 212  107 / 244  100 / 249
        256 x 256       84 / 73   92 / 94   92 / 101  87 / 99        96 / 147  107 / 214  111 / 246  103 / 253
        512 x 512       79 / 91   85 / 96   84 / 98   92 / 109       98 / 202  109 / 244  111 / 256  91 / 246
        2048 x 128      64 / 83   81 / 89   83 / 98   81 / 103       96 / 201  107 / 241  103 / 252  100 / 237
        768 x 768       79 / 95   86 / 93   96 / 107  95 / 108       98 / 221  107 / 248  107 / 243  106 / 246
        768 x 3072      61 / 85   87 / 104  93 / 109  96 / 111       87 / 202  100 / 233  106 / 241  108 / 240
        50272 x 768     56 / 95   82 / 107  86 / 100  -              76 / 181  99 / 231   100 / 204  -

    A call costs about 10 us more than torch's, and the first one with a new (T, o, i) about 0.4 ms and half a megabyte
    that stay (`padded_rows`). That is why smaller matrices are left alone even where the table favours them: on the
    second CPU a round of the quick start's base, 100 clients of Dirichlet sizes, took 1.28 s and 545 MiB with torch's
    product, 1.5 s and 1,470 MiB after 25 rounds with oneDNN's at every length, and 1.3 s and 770 MiB with padded rows.

    Args:
        shapes: (o, i) of each linear module that would be packed, repeats included.
    """
    if cpu.vendor != "AuthenticAMD" or not cpu.capability.startswith("AVX512"):
        return False
    sizes = [out_features * in_features for out_features, in_features in shapes]
    return bool(sizes) and 2 * sum(size for size in sizes if size >= SMALLEST) >= sum(sizes)


def choose_cpu_linear(
    wanted: Literal["auto", "torch", "onednn"],
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]],
    cpu: CpuKind | None = None,
) -> bool:
    """Whether to pack the frozen linear modules; the same on every run on the same kind of CPU.

    Args:
        wanted: "torch" never packs, "onednn" always, "auto" where it is possible and `pays`. If "auto" would pack and
            the private operations are missing or wrong, it warns once and does not.
        device, dtype: of the base.
        shapes: (o, i) of each linear module that would be packed; `linear_shapes` reads them off a model.
        cpu: None for the CPU of this machine.

    Raises:
        ModelError: "onednn" is wanted and not possible.
    """
    if wanted == "torch":
        return False
    if wanted == "auto":
        fits = device.type == "cpu" and dtype == torch.float32
        if not fits or not pays(shapes, cpu or read_cpu_kind()):
            return False
    obstacle = _obstacle(device, dtype)
    if obstacle is None:
        return True
    if wanted == "onednn":
        raise ModelError(f"{KEY}=onednn needs {obstacle}; set {KEY}=auto or torch")
    logger.warning("%s=auto: frozen linears stay torch's own, slower here; packing needs %s", KEY, obstacle)
    return False


def linear_shapes(model: nn.Module, skip: Collection[str] = ()) -> list[tuple[int, int]]:
    """(o, i) of each linear module that `prepack_frozen_linears` would pack; works on the meta device."""
    linears = dict.fromkeys(linear for path, _, _, linear in _linear_places(model) if path not in skip)
    return [(linear.out_features, linear.in_features) for linear in linears]


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """What packed linears need and do not have here."""
    if device.type != "cpu":
        return f"the base on a CPU, got device {device.type}"
    if dtype != torch.float32:
        return f"model.dtype=float32, got {str(dtype).removeprefix('torch.')}"
    if not onednn_available():
        return f"a torch with oneDNN and its packed linear operations, which torch {torch.__version__} lacks"
    if not self_check():
        return f"exact float32 products, and oneDNN's of torch {torch.__version__} failed the self-check"
    return None
