"""What a case is: an operation on one kind of input, with its tensors, its definition and its allowed errors.

The cases themselves are in `denim.benchmarks.cases`. This module needs torch alone.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "BACKWARD",
    "BOTH",
    "FORWARD",
    "Case",
    "ImageCase",
    "LinearCase",
    "SampleCase",
    "expected",
    "passes",
    "share_of_error",
    "stored_by_interpreter",
]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {torch.float64: "fp64", FP32: "fp32", FP16: "fp16", BF16: "bf16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
# Per channel; those of ImageNet, but for the first mean, which is the value of a byte. Later channels repeat the five.
MEAN = (124 / 255, 0.456, 0.406, 0.3, 0.7)
STD = (0.229, 0.224, 0.225, 0.5, 0.2)
# Of a classifier that takes normalised patches.
CLASSIFIER_MEAN, CLASSIFIER_STD = (0.4, 0.5, 0.6, 0.2, 0.5), (0.25, 0.2, 0.3, 0.4, 0.5)
# Side of the images for real work, by patch size. 224 is divisible by 2, 4, 8, 14, 16 and 32.
SIDE, SMALL_SIDE = 224, 32


class Random:
    """Reproducible tensors on a device; on "meta" they have no memory and no values."""

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """float32, standard normal."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """In [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class Case(abc.ABC):
    """One operation on one kind of input. Subclasses hold what an operation is; their fields hold the kind.

    Attributes:
        batch: images, or samples.
        threads: threads of a program, if the launcher has a choice; None takes its first configuration.
        what: words that distinguish the case from others of the same `kind`.
        built: passes (keys of `triton_kernels`) that are compiled ahead of time.
        timed: passes that `denim bench kernels` times together: `FORWARD` or `BOTH`.
        compared: whether the report counts the baselines of the case beside its built passes.
    """

    batch: int = 2
    threads: int | None = None
    what: str = ""
    built: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()
    compared: bool = False

    operation: ClassVar[str]
    """Name in `denim.kernels` and in `torch.ops.denim`."""
    triton_kernels: ClassVar[Mapping[str, str]]
    """Names of the Triton kernels by pass. Those of the forward launcher stand in the order in which they run."""
    bitwise: ClassVar[bool] = False
    """Whether every implementation gives the bits of the reference on the CPU."""

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """What the fields say, in words."""

    @property
    def name(self) -> str:
        """A name that no other case of the operation has."""
        parts = (self.kind, self.what, f"{self.threads} threads" if self.threads else "")
        return ", ".join(part for part in parts if part)

    @abc.abstractmethod
    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        """Tensors for the public operation, by the names of its arguments.

        They are the same in every call on a device.
        """

    @property
    def draws_numbers(self) -> str:
        """ "normal" or "uniform", if the forward pass draws random numbers."""
        return ""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs that get a gradient."""
        return ()

    @abc.abstractmethod
    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Arguments of `torch.ops.denim.<operation>`, and of its launcher."""

    def backward_arguments(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> tuple[Any, ...]:
        """Arguments of the backward operator, if there is one, for the gradient `upstream` of the result."""
        raise NotImplementedError(f"{self.operation} has no backward pass")

    @abc.abstractmethod
    def fused(self, **inputs: Tensor) -> Tensor:
        """The public operation."""

    def constants(self, device: torch.device | str, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
        """Small tensors that the chain takes beside the inputs, such as the mean and std of the channels."""
        return {}

    @abc.abstractmethod
    def chain(self, **tensors: Tensor) -> Tensor:
        """The baseline as a user runs it: on the inputs and `constants`, with noise from torch's global generator."""

    def definition(self, **inputs: Tensor) -> Tensor:
        """The baseline in float64 on the noise of the operation. Floating point inputs must be float64."""
        device = next(iter(inputs.values())).device
        return self.chain(**inputs, **self.constants(device, torch.float64))

    def upstream(self, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor:
        """A gradient for the result, in its dtype."""
        return Random(result.device, 1).normal(*result.shape).to(result.dtype)

    @abc.abstractmethod
    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        """The largest errors allowed to the result and to each gradient before they are rounded to their dtype.

        Args:
            inputs: the inputs, floating point ones in float64.
            exact: result and gradients by the definition, float64.
            upstream: gradient of the result in float64; None if there are no gradients.
        """

    @abc.abstractmethod
    def resized(self, batch: int, side: int) -> Case:
        """The same kind of input in the size of real work: `batch` images of `side` x `side`."""

    def launched(self, backward: bool) -> tuple[str, ...]:
        """Names of the Triton kernels that a launcher starts, in its order."""
        return tuple(name for part, name in self.triton_kernels.items() if (part == BACKWARD) == backward)

    def counted_chain(self, **tensors: Tensor) -> Tensor:
        """The part of the chain that the Triton kernels compute: all of it but products of matrices, which are torch's.

        The report sets its kernels beside those of the operation.
        """
        return self.chain(**tensors)

    def kernel_tensors(
        self, part: str, given: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What the Triton kernel of a pass reads and writes.

        Args:
            part: a pass, key of `triton_kernels`.
            given: what the launcher reads.
            outputs: what it returns.
        """
        return given, outputs

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides of the images on which the case is timed."""
        return (SIDE, SMALL_SIDE)

    @property
    def outer(self) -> int:
        """Number of results per image: levels times draws."""
        return 1

    def loops(self, part: str) -> tuple[int, ...]:
        """Trips of the loops in the kernel of a pass, outermost first. A loop of one trip is none in machine code."""
        return ()

    def passes_over(self, part: str) -> Mapping[str, int]:
        """How often the kernel of a pass reads an input, for inputs that it reads more than once."""
        return {}

    def naive(self, **inputs: Tensor) -> Callable[[], object] | None:
        """A function that launches the naive Triton kernel; None if the case has none. Its noise is from `tl.randn`."""
        return None


@dataclass(frozen=True, kw_only=True)
class ImageCase(Case):
    """A case on images that are cut into patches.

    Attributes:
        grid: rows and columns of patches.
        patch: side of a patch.
        channels: of the images.
        pixels: dtype and memory of the images: "uint8" is (B, H, W, C) and floats are (B, C, H, W); behind the dtype
            stands "planes" (contiguous), "channels_last" or "strided" (neither).
        dtype: of the patches or of the prediction.
        levels: sizes of the dimensions of the noise levels in front of the batch.
        draws: likewise of the draws.
    """

    grid: tuple[int, int] = (1, 3)
    patch: int = 16
    channels: int = 3
    pixels: str = "uint8"
    dtype: torch.dtype = FP32
    levels: tuple[int, ...] = ()
    draws: tuple[int, ...] = ()

    @property
    def outer(self) -> int:
        return math.prod(self.levels) * math.prod(self.draws)

    @property
    def height(self) -> int:
        return self.grid[0] * self.patch

    @property
    def width(self) -> int:
        return self.grid[1] * self.patch

    @property
    def length(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def dimension(self) -> int:
        """Elements of a patch."""
        return self.patch * self.patch * self.channels

    @property
    def mean(self) -> list[float]:
        return list(itertools.islice(itertools.cycle(MEAN), self.channels))

    @property
    def std(self) -> list[float]:
        return list(itertools.islice(itertools.cycle(STD), self.channels))

    @property
    def _suffix(self) -> str:
        """Channels, levels and draws in words."""
        words = "" if self.channels == 3 else f", {self.channels} channel{'s' * (self.channels > 1)}"
        counts = [f"{n} {what}" for sizes, what in ((self.levels, "levels"), (self.draws, "draws")) for n in sizes]
        return words + (", " + " of ".join(counts) if counts else "")

    @property
    def sides(self) -> tuple[int, ...]:
        return (SIDE,) if self.patch >= 14 else (SMALL_SIDE,)

    def resized(self, batch: int, side: int) -> ImageCase:
        return dataclasses.replace(self, batch=batch, grid=(side // self.patch,) * 2)

    def constants(self, device: torch.device | str, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
        if torch.device(device).type == "meta":
            return {name: torch.empty(self.channels, dtype=dtype, device=device) for name in ("mean", "std")}
        values = {"mean": self.mean, "std": self.std}
        return {name: torch.tensor(numbers, dtype=dtype, device=device) for name, numbers in values.items()}

    def _bytes(self, random: Random) -> Tensor:
        return random.integers(0, 256, self.batch, self.height, self.width, self.channels, dtype=torch.uint8)

    def _images(self, random: Random) -> Tensor:
        dtype, _, memory = self.pixels.partition(" ")
        images = self._bytes(random)
        if dtype == "uint8":
            return strided(images, 1, 2) if memory else images
        images = (images / 255).to(DTYPES[dtype]).permute(0, 3, 1, 2)
        if memory == "channels_last":
            return images
        return strided(images, -1, -2) if memory == "strided" else images.contiguous()

    @property
    def _float_pixels(self) -> bool:
        return not self.pixels.startswith("uint8")


def without_token(prediction: Tensor) -> Tensor:
    """The same values as a decoder's output without its class token: a view, with NaN in the row before each sample."""
    return torch.nn.functional.pad(prediction, (0, 0, 1, 0), value=math.nan)[..., 1:, :]


def strided(tensor: Tensor, first: int, second: int) -> Tensor:
    return tensor.transpose(first, second).contiguous().transpose(first, second)


@dataclass(frozen=True, kw_only=True)
class SampleCase(Case):
    """A case on samples of any shape.

    Attributes:
        shape: of one sample.
        dtype: of the pixels.
        odd: the number of elements of a sample is odd, so that samples do not begin at multiples of 16 bytes.
        epsilon: radii: a float32 of each sample ("each"), a "float64" of each, "strided" in memory, or "one" for all.
        strided: tensors are not contiguous.
    """

    batch: int = 3
    shape: tuple[int, ...] = (3, 16, 16)
    dtype: torch.dtype = FP32
    odd: bool = False
    epsilon: str = "each"
    strided: bool = False

    @property
    def kind(self) -> str:
        return NAMES[self.dtype] + ", odd size" * self.odd + ", strided" * self.strided

    def resized(self, batch: int, side: int) -> SampleCase:
        """An odd sample has three channels of 35 x 35."""
        return dataclasses.replace(self, batch=batch, shape=(3, 35, 35) if self.odd else (3, side, side))

    def _size(self, kind: str, largest: float, device: torch.device | str) -> Tensor:
        """Step sizes or radii, of which some are negative."""
        if kind == "one":
            return torch.full((), largest / 2, device=device)
        if kind == "float64":
            return torch.linspace(-largest / 3, largest, self.batch, dtype=torch.float64, device=device)
        sizes = torch.linspace(-largest / 3, largest, self.batch, device=device)
        return torch.stack([sizes, sizes], dim=-1)[:, 0] if kind == "strided" else sizes


@dataclass(frozen=True, kw_only=True)
class LinearCase(Case):
    """A case on tokens: something cheap, and a linear layer of it.

    Attributes:
        tokens: of an image.
        width: elements of a token, in_features of the layer.
        outputs: out_features of the layer.
        dtype: of the layer's parameters.
        stream: dtype of the tokens, if another than `dtype`: under autocast they are float32.
        bias: the layer has one.
        strided: the tokens are not contiguous.
    """

    tokens: int = 5
    width: int = 40
    outputs: int = 24
    dtype: torch.dtype = FP32
    stream: torch.dtype | None = None
    bias: bool = True
    strided: bool = False

    @property
    def kind(self) -> str:
        words = NAMES[self.dtype] + ("" if self.stream is None else f", {NAMES[self.stream]} tokens")
        return words + ", no bias" * (not self.bias) + ", strided" * self.strided

    @property
    def sides(self) -> tuple[int, ...]:
        return (SIDE,)

    def launched(self, backward: bool) -> tuple[str, ...]:
        """The backward launcher computes the input of the layer again."""
        return super().launched(False) + (super().launched(True) if backward else ())

    def _layer(self, random: Random) -> dict[str, Tensor]:
        layer = {"weight": random.normal(self.outputs, self.width) / math.sqrt(self.width)}
        if self.bias:
            layer["bias"] = random.normal(self.outputs)
        return {name: value.to(self.dtype) for name, value in layer.items()}

    def _tokens(self, random: Random) -> Tensor:
        x = (0.5 + random.normal(self.batch, self.tokens, self.width)).to(self.stream or self.dtype)
        return strided(x, -1, -2) if self.strided else x

    @property
    def leaves(self) -> tuple[str, ...]:
        return tuple(self.inputs("meta"))

    def backward_arguments(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> tuple[Any, ...]:
        arguments = self.arguments(inputs)
        wanted = [name in inputs for name in self._names if name != "eps"]
        return (
            upstream,
            *(value for name, value in zip(self._names, arguments, strict=True) if name != "bias"),
            wanted,
        )

    @property
    def _unit(self) -> float:
        """Error of what is stored in `dtype` between two kernels, relative. The interpreter truncates bfloat16."""
        return 0.0 if self.dtype == FP32 else torch.finfo(self.dtype).eps

    def _product(self, a: Tensor, b: Tensor, a_error: Tensor | float = 0.0) -> Tensor:
        """Largest error of the product a @ b in float32, whose factor `a` has an error; of two bytes with `_unit`.

        Every addition rounds once. GPUs may add parts of a sum in the dtype of the result. (That also covers torch's
        rounding of a product where it is compared with what the interpreter stores, which truncates.)
        """
        rounding = (a.shape[-1] + 1) * 2.0**-24 + self._unit
        return (rounding * a.abs() + a_error) @ b.abs()

    def _errors(
        self, inputs: Mapping[str, Tensor], cheap: Tensor, error: Tensor, upstream: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor | float]]:
        """Errors of the result, of the gradient of the layer's input, and of those of its parameters.

        Args:
            inputs: floating point ones in float64.
            cheap: the layer's input, float64.
            error: its largest error in float32.
            upstream: gradient of the result.
        """
        weight, rows = inputs["weight"], cheap.flatten(0, -2)
        error = error + self._unit * (cheap.abs() + error)
        result = self._product(cheap, weight.mT, error)
        if self.bias:
            result = result + 2.0**-23 * inputs["bias"].abs()
        if upstream is None:
            return result, result, []
        above = upstream.flatten(0, -2)
        parameters: list[Tensor | float] = [self._product(rows.mT, above, error.flatten(0, -2).mT).mT]
        if self.bias:
            parameters.append((len(above) * 2.0**-24 + self._unit) * above.abs().sum(dim=0))
        return result, self._product(upstream, weight), parameters

    @property
    @abc.abstractmethod
    def _names(self) -> tuple[str, ...]:
        """Names of the operator's arguments."""


def double(value: Tensor) -> Tensor:
    """Floats in float64; bytes stay bytes, masks masks and seeds seeds."""
    return value.double() if value.is_floating_point() else value


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def passes(
    function: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    leaves: Sequence[str] = (),
    upstream: Tensor | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `function` on the inputs that gives its result and, behind it, the gradients of the leaves."""
    given = {name: value.detach().requires_grad_(name in leaves) for name, value in inputs.items()}
    wanted = [given[name] for name in leaves]

    def call() -> tuple[Tensor, ...]:
        result = function(**given)
        return (result, *torch.autograd.grad(result, wanted, upstream)) if wanted else (result,)

    return call


def expected(
    case: Case, inputs: Mapping[str, Tensor], upstream: Tensor | None
) -> tuple[list[Tensor], list[Tensor | float]]:
    """Result and gradients by the definition in float64, and the largest error allowed to each before its store.

    Args:
        case: of `CASES`.
        inputs: from `case.inputs`.
        upstream: from `case.upstream`; None for the result alone.
    """
    exact = {name: double(value) for name, value in inputs.items()}
    doubled = None if upstream is None else upstream.double()
    leaves = () if upstream is None else case.leaves
    values = [value.detach() for value in passes(case.definition, exact, leaves, doubled)()]
    return values, case.errors(exact, values, doubled if leaves else None)


def share_of_error(got: Tensor, exact: Tensor, error: Tensor | float) -> float:
    """Largest error as a share of what is allowed: `error` before the store, and half a unit for the store's rounding.

    Args:
        got: in any floating dtype.
        exact: in float64. Where it is NaN, `got` has to be NaN.
        error: largest error before the store.

    Returns:
        At most 1 where all is well; NaN, which is beyond every limit, for a NaN that should be a number, a number that
        should be NaN, or another shape.
    """
    if got.shape != exact.shape:
        return math.nan
    information = torch.finfo(got.dtype)
    allowed = error + information.eps / 2 * (exact.abs() + error + information.smallest_normal)
    # An error of nothing where nothing is allowed; and numbers too large for fp16 are infinite on both sides.
    same = (got.double() == exact.to(got.dtype).double()) | (got.isnan() & exact.isnan())
    share = ((got.double() - exact).abs() / allowed).masked_fill(same, 0)
    return float(share.max()) if share.numel() else 0.0


def stored_by_interpreter(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value as Triton's interpreter stores it, which truncates float32 to bfloat16 instead of rounding.

    Both are monotonic, so bounds of a value are bounds of what is stored.
    """
    if dtype != BF16:
        return value.to(dtype)
    return (value.float().view(torch.int32) & ~0xFFFF).view(FP32).to(BF16)
