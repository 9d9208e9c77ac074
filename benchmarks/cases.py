"""The cases of every operation, written once: tests, builds, benchmarks and `gpu-check` all take them from here.

A class says what an operation is: its tensors, its call, the chain of PyTorch operations that a user would write
instead (`denim.benchmarks.baselines`), and how exact a result has to be. A row of `CASES` is one kind of input.

Every case runs in Triton's interpreter, on the CPU reference and in `gpu-check`, in the small and odd sizes of its row.
`built` names the passes that are also compiled ahead of time and held against a budget, `timed` the passes that
`denim bench kernels` times, and `compared` marks what the report sets beside `torch.compile`; these take the sizes of
real work (`Case.resized`). This module needs torch alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from denim import kernels
from denim.benchmarks import baselines
from denim.benchmarks.case import (
    BACKWARD,
    BF16,
    BOTH,
    FORWARD,
    FP16,
    FP32,
    NAMES,
    Case,
    ImageCase,
    LinearCase,
    Random,
    SampleCase,
    double,
    largest,
    strided,
    without_token,
)
from denim.benchmarks.exact_noise import CONTRACT, exact_noise
from denim.kernels import Stream, noise_words

__all__ = [
    "CASES",
    "OPERATIONS",
    "AttackStart",
    "AttackStep",
    "DecodePatches",
    "GeluLinear",
    "NoisePatchify",
    "NormLinear",
    "PatchLoss",
]

# Of a classifier that takes normalised patches.
CLASSIFIER_MEAN, CLASSIFIER_STD = (0.4, 0.5, 0.6, 0.2, 0.5), (0.25, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, kw_only=True)
class NoisePatchify(ImageCase):
    """`noise_patchify`, or `normalized_patches`; `dtype` is that of the patches.

    Attributes:
        clean: without noise, which is `normalized_patches`.
    """

    clean: bool = False

    operation: ClassVar[str] = "noise_patchify"
    triton_kernels: ClassVar[Mapping[str, str]] = {
        FORWARD: "noise_patchify_kernel",
        BACKWARD: "noise_patchify_backward_kernel",
    }

    @property
    def kind(self) -> str:
        return "clean, " * self.clean + f"{self.pixels}, patch {self.patch}, {NAMES[self.dtype]}{self._suffix}"

    @property
    def draws_numbers(self) -> str:
        return "" if self.clean else "normal"

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        images = self._images(random)
        if self.clean:
            return {"images": images}
        return {
            "images": images,
            "sigma": 255 * random.uniform(*self.levels, self.batch),
            "seeds": random.integers(-(2**63), 2**63 - 1, *self.draws, self.batch),
        }

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("images",) if self._float_pixels else ()

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        images, sigma, seeds = (inputs.get(name) for name in ("images", "sigma", "seeds"))
        return (images, sigma, seeds, self.patch, self.mean, self.std, self.dtype)

    def backward_arguments(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> tuple[Any, ...]:
        return (upstream, self.height, self.width, self.patch, self.std, inputs["images"].dtype)

    def fused(self, **inputs: Tensor) -> Tensor:
        operation = kernels.normalized_patches if self.clean else kernels.noise_patchify
        return operation(**inputs, patch_size=self.patch, mean=self.mean, std=self.std, dtype=self.dtype)

    def chain(self, **tensors: Tensor) -> Tensor:
        if self.clean:
            return baselines.patch_target(**tensors, patch_size=self.patch, norm_pix=False).to(self.dtype)
        given = {name: value for name, value in tensors.items() if name != "seeds"}
        return baselines.noisy_patches(**given, patch_size=self.patch, draws=self.draws, dtype=self.dtype)

    def definition(self, **inputs: Tensor) -> Tensor:
        if self.clean:
            constants = self.constants(inputs["images"].device, torch.float64)
            return baselines.patch_target(**inputs, **constants, patch_size=self.patch, norm_pix=False)
        seeds, shape = inputs["seeds"], (self.height, self.width, self.channels)
        noise = exact_noise(seeds.flatten(), math.prod(shape)).reshape(*seeds.shape, *shape)
        return baselines.noisy_patches(
            inputs["images"],
            inputs["sigma"],
            **self.constants(seeds.device, torch.float64),
            patch_size=self.patch,
            noise=noise.movedim(-1, -3),
            draws=self.draws,
            dtype=torch.float64,
        )

    def upstream(self, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor:
        """Where the pixels are strided, it is too."""
        upstream = super().upstream(inputs, result)
        return strided(upstream, -1, -2) if self.pixels.endswith("strided") else upstream

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        sigma, least = inputs.get("sigma"), min(self.std)
        # The contract's error; and float32: half a dozen roundings of numbers as large as the value, or as pixel / std
        # and mean / std, of which it is the difference.
        noise = CONTRACT * float(sigma.max()) / (255 * least) if sigma is not None and sigma.numel() else 0.0
        errors: list[Tensor | float] = [noise + 6 * 2.0**-24 * (exact[0].abs() + 2 / least)]
        if upstream is not None:
            # A float32 sum over levels and draws, one after the other, and two roundings more.
            errors.append((self.outer + 2) * self.outer * 2.0**-24 * largest(upstream) / least)
        return errors

    def loops(self, part: str) -> tuple[int, ...]:
        levels, draws = math.prod(self.levels), math.prod(self.draws)
        return tuple(n for n in ((draws, levels) if part == FORWARD else (self.outer,)) if n > 1)

    def naive(self, **inputs: Tensor) -> Callable[[], object] | None:
        if self.threads is not None or self.clean:
            return None
        images, sigma = inputs["images"], inputs["sigma"]
        mean, std = self.constants(images.device).values()

        def run() -> None:
            from denim.benchmarks import baselines_triton

            for level, draw in itertools.product(sigma.reshape(-1, self.batch), range(math.prod(self.draws))):
                baselines_triton.launch(images, level, draw, self.patch, mean, std, self.dtype)

        return run


@dataclass(frozen=True, kw_only=True)
class PatchLoss(ImageCase):
    """`patch_loss`; `dtype` is that of the prediction.

    Attributes:
        norm_pix: normalise targets by the statistics of their patch.
        masked: with a mask that selects some of the patches.
        view: the prediction is a view of a decoder's output without its class token.
    """

    norm_pix: bool = True
    masked: bool = False
    view: bool = False

    operation: ClassVar[str] = "patch_loss"
    triton_kernels: ClassVar[Mapping[str, str]] = {
        FORWARD: "partials_kernel",
        "sum": "loss_kernel",
        BACKWARD: "prediction_grad_kernel",
    }

    @property
    def kind(self) -> str:
        target, mask = "" if self.norm_pix else ", raw target", ", masked" if self.masked else ""
        return (
            f"{self.pixels}, patch {self.patch}, {NAMES[self.dtype]}{self._suffix}{target}{mask}" + ", view" * self.view
        )

    def _bytes(self, random: Random) -> Tensor:
        images = super()._bytes(random)
        # A patch that is nearly constant: the mean of its squares minus the square of its mean would lose its variance.
        images[:1, : self.patch, : self.patch] = 250 + images[:1, : self.patch, : self.patch] % 2
        return images

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        images = self._images(random)
        prediction = random.normal(self.batch, self.length, self.dimension).to(self.dtype)
        inputs = {"prediction": without_token(prediction) if self.view else prediction, "images": images}
        if self.masked:
            inputs["mask"] = random.uniform(self.batch, self.length) < 0.6
            inputs["mask"][0, 0], inputs["mask"][-1, -1] = True, False
        return inputs

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("prediction",)

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        given = (inputs["prediction"], inputs["images"], inputs.get("mask"))
        return (*given, self.patch, self.mean, self.std, self.norm_pix)

    def backward_arguments(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> tuple[Any, ...]:
        return (upstream, *self.arguments(inputs))

    def fused(self, **inputs: Tensor) -> Tensor:
        return kernels.patch_loss(**inputs, patch_size=self.patch, mean=self.mean, std=self.std, norm_pix=self.norm_pix)

    def chain(self, **tensors: Tensor) -> Tensor:
        return baselines.reconstruction_loss(**tensors, patch_size=self.patch, norm_pix=self.norm_pix)

    def upstream(self, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor:
        """Not 1: a backward pass that ignores it must not pass."""
        return torch.full_like(result, -3.5)

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        prediction, mask = inputs["prediction"], inputs.get("mask")
        constants = self.constants(prediction.device, torch.float64)
        target = baselines.patch_target(inputs["images"], **constants, patch_size=self.patch, norm_pix=False)
        # Half a dozen roundings of numbers as large as pixel / std and mean / std; normalisation by a patch's own
        # statistics divides them by its deviation, and adds some twenty of its own result (sums of a few thousand
        # numbers in a tree and one thread's run in a row; an approximate root with an error of 2^-22 and less).
        error = torch.full_like(target, 6 * 2.0**-24 / min(self.std))
        if self.norm_pix and len(target):
            error = error / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
            target = baselines.patch_target(inputs["images"], **constants, patch_size=self.patch, norm_pix=True)
            error = error + 20 * 2.0**-24 * (1 + target.abs())
        weight = torch.ones(target.shape[:2], dtype=torch.float64, device=target.device) if mask is None else mask
        weight = (weight / weight.sum() / self.dimension)[..., None]
        difference = (prediction - target).abs()
        errors: list[Tensor | float] = [(2 * difference * error * weight).sum() + 20 * 2.0**-24 * exact[0].abs()]
        if upstream is not None:
            errors.append(2 * error * weight * upstream.abs() + 4 * 2.0**-24 * exact[1].abs())
        return errors


@dataclass(frozen=True, kw_only=True)
class DecodePatches(ImageCase):
    """`decode_patches`; `dtype` is that of the prediction, `pixels` the source's for statistics of the input.

    Attributes:
        statistics: None, "input" or "noisy".
        source: dtype of the noisy patches; by default that of the prediction.
        patches: into the normalised patches of a classifier, not pixels.
        output: dtype of the result; by default float32 for pixels and the prediction's for patches.
        fixed: a float source gets no gradient.
        strided: prediction and its gradient are not contiguous.
        view: the prediction is a view of a decoder's output without its class token.
    """

    statistics: str | None = None
    source: torch.dtype | None = None
    patches: bool = False
    output: torch.dtype | None = None
    fixed: bool = False
    strided: bool = False
    view: bool = False

    operation: ClassVar[str] = "decode_patches"
    triton_kernels: ClassVar[Mapping[str, str]] = {
        FORWARD: "decode_kernel",
        BACKWARD: "decode_backward_kernel",
    }

    @property
    def kind(self) -> str:
        source = f"input, {self.pixels}" if self.statistics == "input" else self.statistics or "raw"
        if self.source not in (None, self.dtype):
            source += f" {NAMES[self.source]}"
        words = f"{source}, patch {self.patch}, {NAMES[self.dtype]}{self._suffix}"
        if self.patches:
            words += ", to patches" if self._output == self.dtype else f", to {NAMES[self._output]} patches"
        elif self._output != FP32:
            words += f", to {NAMES[self._output]} pixels"
        return words + ", fixed source" * self.fixed + ", strided" * self.strided + ", view" * self.view

    @property
    def _output(self) -> torch.dtype:
        return self.output or (self.dtype if self.patches else FP32)

    @property
    def classifier(self) -> tuple[list[float], list[float]]:
        """Mean and std of the classifier; empty for pixels."""
        if not self.patches:
            return [], []
        mean, std = (itertools.cycle(values) for values in (CLASSIFIER_MEAN, CLASSIFIER_STD))
        return list(itertools.islice(mean, self.channels)), list(itertools.islice(std, self.channels))

    def _bytes(self, random: Random) -> Tensor:
        images = super()._bytes(random)
        # A flat patch: with one channel only the 1e-6 is left of its variance. It equals the mean; otherwise the
        # gradient would be the rounding of the patch's mean, divided by the square root of 1e-6.
        images[:1, : self.patch, : self.patch] = 124
        return images

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        # Three standard deviations wide, so that many pixels end up on both sides of 0 and 1.
        prediction = 3 * random.normal(*self.levels, *self.draws, self.batch, self.length, self.dimension)
        inputs = {"prediction": prediction.to(self.dtype)}
        if self.statistics == "input":
            inputs["source"] = self._images(random)
        if self.statistics == "noisy":
            inputs["source"] = (2 * random.normal(*prediction.shape)).to(self.source or self.dtype)
            # Noise of less variance than a patch has, and of more.
            inputs["sigma"] = torch.linspace(20, 130, self.batch, device=device)
        if self.strided:
            inputs["prediction"] = strided(inputs["prediction"], -1, -2)
        if self.view:
            inputs["prediction"] = without_token(inputs["prediction"])
        return inputs

    @property
    def leaves(self) -> tuple[str, ...]:
        floating = self.statistics == "noisy" or (self.statistics == "input" and self._float_pixels)
        return ("prediction", "source") if floating and not self.fixed else ("prediction",)

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        tensors = (inputs["prediction"], inputs.get("source"), inputs.get("sigma"))
        geometry = (self.height, self.width, self.patch, self.mean, self.std, self.statistics or "raw")
        return (*tensors, *geometry, *self.classifier, self._output)

    def backward_arguments(self, inputs: Mapping[str, Tensor], upstream: Tensor) -> tuple[Any, ...]:
        tensors = (upstream, inputs["prediction"], inputs.get("source"), inputs.get("sigma"))
        geometry = (self.patch, self.mean, self.std, self.statistics or "raw")
        return (*tensors, *geometry, self.classifier[1], not self.fixed)

    def _options(self) -> dict[str, Any]:
        return {"img_size": (self.height, self.width), "patch_size": self.patch, "statistics": self.statistics}

    def fused(self, **inputs: Tensor) -> Tensor:
        return kernels.decode_patches(
            inputs["prediction"],
            source=inputs.get("source"),
            sigma=inputs.get("sigma"),
            **self._options(),
            mean=self.mean,
            std=self.std,
            normalize=self.classifier if self.patches else None,
            dtype=self._output,
        )

    def constants(self, device: torch.device | str, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
        constants = super().constants(device, dtype)
        if self.patches:
            names = ("classifier_mean", "classifier_std")
            constants |= {
                name: torch.tensor(values, dtype=dtype, device=device)
                for name, values in zip(names, self.classifier, strict=True)
            }
        return constants

    def chain(self, **tensors: Tensor) -> Tensor:
        return self._decoded(**tensors).to(self._output)

    def definition(self, **inputs: Tensor) -> Tensor:
        return self._decoded(**inputs, **self.constants(inputs["prediction"].device, torch.float64))

    def _decoded(self, **tensors: Tensor) -> Tensor:
        return baselines.decoded_pixels(
            tensors["prediction"],
            tensors["mean"],
            tensors["std"],
            source=tensors.get("source"),
            sigma=tensors.get("sigma"),
            **self._options(),
            normalize=(tensors["classifier_mean"], tensors["classifier_std"]) if self.patches else None,
        )

    def upstream(self, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor:
        """No gradient arrives where rounding may carry a pixel over an end of [0, 1], for it decides about the mask."""
        upstream = super().upstream(inputs, result)
        if result.device.type == "meta":
            return upstream
        exact = {name: double(value) for name, value in inputs.items()}
        flat = dataclasses.replace(self, patches=False)
        low, high = (flat.definition(**exact | {"prediction": exact["prediction"] + shift}) for shift in (-1e-3, 1e-3))
        edge = ((low == 0) != (high == 0)) | ((low == 1) != (high == 1))
        if self.patches:
            edge = baselines.patchify_planes(edge, self.patch)
        upstream = upstream.masked_fill(edge, 0)
        return strided(upstream, -1, -2) if self.strided else upstream

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        # float32: a pixel is a handful of roundings; mean and deviation are sums of a thread's run of at most 64 values
        # and of a tree over the runs, so some ten units in the last place of values up to 1 / 0.2, times predictions up
        # to 10: 10 * 10 * 2^-24. Normalising divides the pixel's error by the classifier's deviation; its own
        # roundings, of numbers up to 1 / 0.2, are much smaller. A gradient's error is relative to the largest, since
        # gradients are sums of terms of both signs.
        errors: list[Tensor | float] = [1e-5 / min(self.classifier[1], default=1)]
        return [*errors, *(1e-5 * largest(gradient) for gradient in exact[1:])]

    def loops(self, part: str) -> tuple[int, ...]:
        return (self.outer,) if part == BACKWARD and self.outer > 1 else ()

    def passes_over(self, part: str) -> Mapping[str, int]:
        """Forward, each prediction reads its source again."""
        return {"source": self.outer} if part == FORWARD else {}


@dataclass(frozen=True, kw_only=True)
class AttackStep(SampleCase):
    """`attack_step`.

    Attributes:
        origin: dtype of the clean images; by default that of the pixels.
        gradient: likewise.
        step_size: as `epsilon`.
    """

    origin: torch.dtype | None = None
    gradient: torch.dtype | None = None
    step_size: str = "each"

    operation: ClassVar[str] = "attack_step"
    triton_kernels: ClassVar[Mapping[str, str]] = {FORWARD: "attack_step_kernel"}
    bitwise: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        others = [
            f", {NAMES[dtype]} {name}"
            for name, dtype in (("origin", self.origin), ("gradient", self.gradient))
            if dtype is not None
        ]
        return super().kind + "".join(others)

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        # Moved by up to 0.2 from the origin, with radii up to 0.1 and steps up to 0.3: all branches of the clamp occur.
        origin = random.uniform(self.batch, *self.shape)
        pixels = (origin + 0.4 * (random.uniform(*origin.shape) - 0.5)).clamp(0, 1)
        gradient = random.normal(*origin.shape)
        if origin.numel():
            special = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf], device=device)
            places = gradient.view(-1)[: 4 * len(special) : 4]
            places.copy_(special[: len(places)])
            pixels.view(-1)[-1] = math.nan
            origin.view(-1)[-2] = math.nan
        tensors = {
            "pixels": pixels.to(self.dtype),
            "origin": origin.to(self.origin or self.dtype),
            "gradient": gradient.to(self.gradient or self.dtype),
        }
        if self.strided:
            tensors = {name: value.movedim(-1, 1) for name, value in tensors.items()}
        sizes = {"step_size": self._size(self.step_size, 0.3, device), "epsilon": self._size(self.epsilon, 0.1, device)}
        return tensors | sizes

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(inputs[name] for name in ("pixels", "origin", "gradient", "step_size", "epsilon"))

    def fused(self, **inputs: Tensor) -> Tensor:
        return kernels.attack_step(**inputs)

    def chain(self, **tensors: Tensor) -> Tensor:
        return baselines.linf_step(**tensors)

    def definition(self, **inputs: Tensor) -> Tensor:
        """The operation hands NaN gradients on; torch's sign makes 0 of them."""
        return self.chain(**inputs).masked_fill(inputs["gradient"].isnan(), math.nan)

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        return [4 * 2.0**-24]  # four roundings of numbers below 2


@dataclass(frozen=True, kw_only=True)
class AttackStart(SampleCase):
    """`attack_start`."""

    operation: ClassVar[str] = "attack_start"
    triton_kernels: ClassVar[Mapping[str, str]] = {FORWARD: "attack_start_kernel"}
    bitwise: ClassVar[bool] = True

    @property
    def draws_numbers(self) -> str:
        return "uniform"

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        pixels = random.uniform(self.batch, *self.shape).to(self.dtype)
        if pixels.numel():
            pixels.view(-1)[-1] = math.nan
        seeds = random.integers(-(2**63), 2**63 - 1, self.batch)
        if seeds.numel():
            seeds[0] = -(2**63)
        if self.strided:
            pixels, seeds = pixels.movedim(-1, 1), torch.stack([seeds, seeds], dim=-1)[:, 0]
        # Radii up to 0.4, both signs: many points leave [0, 1] on either side.
        return {"pixels": pixels, "seeds": seeds, "epsilon": self._size(self.epsilon, 0.4, device)}

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(inputs[name] for name in ("pixels", "seeds", "epsilon"))

    def fused(self, **inputs: Tensor) -> Tensor:
        return kernels.attack_start(**inputs)

    def chain(self, **tensors: Tensor) -> Tensor:
        return baselines.linf_start(tensors["pixels"], epsilon=tensors["epsilon"])

    def definition(self, **inputs: Tensor) -> Tensor:
        pixels, seeds = inputs["pixels"], inputs["seeds"]
        words = noise_words(seeds, math.prod(pixels.shape[1:]), Stream.START).double()
        uniform = ((words + 0.5) * 2.0**-32).view(pixels.shape)
        return baselines.linf_start(pixels, epsilon=inputs["epsilon"], uniform=uniform)

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        # The uniform is rounded to float32, half a unit in the last place below one, and doubled; that of the
        # difference, the product and the sum, all below two, come along.
        return [5 * 2.0**-24]


@dataclass(frozen=True, kw_only=True)
class NormLinear(LinearCase):
    """`norm_linear`.

    Attributes:
        norm: dtype of the norm's parameters.
    """

    norm: torch.dtype = FP32

    operation: ClassVar[str] = "norm_linear"
    triton_kernels: ClassVar[Mapping[str, str]] = {FORWARD: "norm_kernel", BACKWARD: "norm_backward_kernel"}
    EPS: ClassVar[float] = 1e-6

    @property
    def kind(self) -> str:
        return super().kind + ("" if self.norm == FP32 else f", {NAMES[self.norm]} norm")

    @property
    def _names(self) -> tuple[str, ...]:
        return ("x", "norm_weight", "norm_bias", "weight", "bias", "eps")

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        x = self._tokens(random)
        if self.norm == FP32:
            # A token that is nearly constant: the mean of its squares minus the square of its mean has no variance.
            x[:1, :1] = 3 + 0.01 * x[:1, :1]
        norm = {"norm_weight": 1 + 0.5 * random.normal(self.width), "norm_bias": random.normal(self.width)}
        return {"x": x, **{name: value.to(self.norm) for name, value in norm.items()}, **self._layer(random)}

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return (*(inputs.get(name) for name in self._names[:-1]), self.EPS)

    def fused(self, **inputs: Tensor) -> Tensor:
        if self.stream is None:
            return kernels.norm_linear(**inputs, eps=self.EPS)
        return cast(Tensor, torch.ops.denim.norm_linear(*self.arguments(inputs)))

    def chain(self, **tensors: Tensor) -> Tensor:
        return baselines.linear_of_norm(**tensors, eps=self.EPS)

    def counted_chain(self, **tensors: Tensor) -> Tensor:
        normal = F.layer_norm(tensors["x"], (self.width,), tensors["norm_weight"], tensors["norm_bias"], self.EPS)
        return normal.to(self.dtype)

    def kernel_tensors(
        self, part: str, given: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if part == FORWARD:
            x, *norm, _, _ = given
            return (x, *norm), (x.new_empty(x.shape, dtype=self.dtype),)
        _, x, norm_weight, *_ = given
        programs = -(-x.shape[:-1].numel() // self.loops(part)[0])
        partials = x.new_empty((programs, 2, self.width), dtype=FP32)
        return (x.new_empty(x.shape, dtype=self.dtype), x, norm_weight), (outputs[0], partials)

    def loops(self, part: str) -> tuple[int, ...]:
        from denim.kernels import norm_linear_triton

        return (norm_linear_triton.ROWS if part == FORWARD else norm_linear_triton.BACKWARD_ROWS,)

    def resized(self, batch: int, side: int) -> NormLinear:
        """The projection to queries, keys and values of ViT-B/16, without the class token."""
        return dataclasses.replace(self, batch=batch, tokens=(side // 16) ** 2, width=768, outputs=2304)

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        x, gain, shift = inputs["x"], inputs["norm_weight"], inputs["norm_bias"]

        def mean(values: Tensor) -> Tensor:
            return values.mean(dim=-1, keepdim=True)

        inverse_std = (mean((x - mean(x)).square()) + self.EPS).rsqrt()
        normal = (x - mean(x)) * inverse_std
        # float32: some twenty roundings of a sum (a thread's run, and a tree), of numbers as large as x; and the root,
        # approximate to 2^-22.
        unit = 20 * 2.0**-24
        centre = unit * (x.abs() + mean(x.abs()))
        relative = 2 * unit + inverse_std * mean(centre)
        normal_error = inverse_std * centre + relative * normal.abs()
        cheap = normal * gain + shift
        cheap_error = normal_error * gain.abs() + unit * (normal * gain).abs() + unit * shift.abs()
        result, error, parameters = self._errors(inputs, cheap, cheap_error, upstream)
        if upstream is None:
            return [result]
        grad = upstream @ inputs["weight"]
        scaled, scaled_error = grad * gain, error * gain.abs() + unit * (grad * gain).abs()
        # torch's kernel on the CPU has sums of products with x, of which it takes the mean off afterwards.
        apart = unit * inverse_std * (mean((scaled * x).abs()) + mean(x).abs() * mean(scaled.abs()))
        if self.norm != FP32:
            # There it also keeps mean and deviation in the dtype of the norm's parameters.
            kept = torch.finfo(self.norm).eps / 2
            normal_error = normal_error + kept * (inverse_std * mean(x).abs() + normal.abs())
            relative = relative + kept
        along = mean(scaled * normal)
        along_error = mean(scaled_error * normal.abs() + scaled.abs() * normal_error)
        to_x = scaled_error + mean(scaled_error) + normal.abs() * (along_error + apart) + normal_error * along.abs()
        to_x = to_x * inverse_std + relative * (exact[1].abs() + inverse_std * (scaled.abs() + mean(scaled.abs())))
        rows = (x.shape[:-1].numel() + 20) * 2.0**-24
        to_gain = error * normal.abs() + grad.abs() * normal_error + rows * (grad * normal).abs()
        to_shift = error + rows * grad.abs()
        return [result, to_x, to_gain.sum(dim=(0, 1)), to_shift.sum(dim=(0, 1)), *parameters]


@dataclass(frozen=True, kw_only=True)
class GeluLinear(LinearCase):
    """`gelu_linear`."""

    operation: ClassVar[str] = "gelu_linear"
    triton_kernels: ClassVar[Mapping[str, str]] = {FORWARD: "gelu_kernel", BACKWARD: "gelu_backward_kernel"}

    @property
    def _names(self) -> tuple[str, ...]:
        return ("x", "weight", "bias")

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        random = Random(device)
        # Up to some six deviations: where the GELU is 0 and where it is x.
        return {"x": 2 * self._tokens(random), **self._layer(random)}

    def arguments(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(inputs.get(name) for name in self._names)

    def fused(self, **inputs: Tensor) -> Tensor:
        if self.stream is None:
            return kernels.gelu_linear(**inputs)
        return cast(Tensor, torch.ops.denim.gelu_linear(*self.arguments(inputs)))

    def chain(self, **tensors: Tensor) -> Tensor:
        return baselines.linear_of_gelu(**tensors)

    def counted_chain(self, **tensors: Tensor) -> Tensor:
        return F.gelu(tensors["x"]).to(self.dtype)

    def kernel_tensors(
        self, part: str, given: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        x = given[1] if part == BACKWARD else given[0]
        other = x.new_empty(x.shape, dtype=self.dtype)
        return ((other, x), outputs[:1]) if part == BACKWARD else ((x,), (other,))

    def resized(self, batch: int, side: int) -> GeluLinear:
        """The second layer of an MLP of ViT-Ti/16, without the class token."""
        return dataclasses.replace(self, batch=batch, tokens=(side // 16) ** 2, width=768, outputs=192)

    def errors(
        self, inputs: Mapping[str, Tensor], exact: Sequence[Tensor], upstream: Tensor | None
    ) -> list[Tensor | float]:
        # erf is exact to two units in the last place of 1, and four operations follow.
        x, unit = inputs["x"], 8 * 2.0**-24
        result, error, parameters = self._errors(inputs, F.gelu(x), unit * x.abs(), upstream)
        if upstream is None:
            return [result]
        grad = upstream @ inputs["weight"]
        density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
        slope = (1 + torch.erf(x / math.sqrt(2))) / 2 + x * density
        # The exponential's argument has a relative error of two roundings.
        slope_error = unit * (1 + (1 + x.square()) * (x * density).abs())
        return [result, error * slope.abs() + grad.abs() * slope_error + unit * exact[1].abs(), *parameters]


NOISE_PATCHIFY = (
    NoisePatchify(dtype=BF16, built=(FORWARD,), timed=(FORWARD,), compared=True),
    *(NoisePatchify(dtype=BF16, threads=threads, built=(FORWARD,)) for threads in (64, 256)),
    NoisePatchify(built=(FORWARD,), timed=(FORWARD,)),
    NoisePatchify(dtype=BF16, patch=2, grid=(5, 7), built=(FORWARD,)),
    NoisePatchify(dtype=BF16, patch=4, grid=(5, 3), built=(FORWARD,), timed=(FORWARD,)),
    NoisePatchify(dtype=BF16, patch=8, grid=(3, 1), built=(FORWARD,)),
    NoisePatchify(dtype=BF16, patch=14, batch=1, built=(FORWARD,)),
    NoisePatchify(dtype=BF16, patch=32, batch=1, built=(FORWARD,)),
    NoisePatchify(dtype=BF16, channels=1, grid=(2, 1), built=(FORWARD,)),
    NoisePatchify(patch=4, channels=1, batch=5, grid=(3, 3), built=(FORWARD,)),
    NoisePatchify(dtype=BF16, channels=5, batch=1, grid=(3, 1), built=(FORWARD,)),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, built=(FORWARD, BACKWARD), compared=True),
    *(NoisePatchify(pixels="fp32 planes", dtype=BF16, threads=threads, built=(BACKWARD,)) for threads in (64, 256)),
    NoisePatchify(pixels="fp32 planes", patch=14, built=(FORWARD,)),
    NoisePatchify(pixels="fp32 channels_last", dtype=BF16, built=(FORWARD,)),
    NoisePatchify(dtype=BF16, levels=(4,), built=(FORWARD,)),
    NoisePatchify(dtype=BF16, draws=(4,), built=(FORWARD,)),
    NoisePatchify(dtype=BF16, levels=(4,), draws=(2,), built=(FORWARD,), timed=(FORWARD,), compared=True),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, levels=(4,), draws=(2,), built=(FORWARD,)),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, levels=(8,), built=(BACKWARD,)),
    NoisePatchify(pixels="fp32 planes", built=(BACKWARD,), timed=(BOTH,)),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, patch=4, batch=3, grid=(5, 3), built=(BACKWARD,)),
    NoisePatchify(pixels="bf16 planes", dtype=BF16, patch=14, built=(BACKWARD,)),
    # The small images of the benchmarks.
    NoisePatchify(patch=4, grid=(5, 3), timed=(FORWARD,)),
    NoisePatchify(dtype=BF16, patch=4, levels=(4,), draws=(2,), grid=(3, 1), timed=(FORWARD,)),
    NoisePatchify(pixels="fp32 planes", patch=4, grid=(3, 5), timed=(BOTH,)),
    # Levels and draws in every combination, on programs of few threads, the last of which is partly empty.
    NoisePatchify(levels=(2,), draws=(3,), grid=(1, 5), threads=64),
    NoisePatchify(dtype=FP16, levels=(2,), threads=32),
    NoisePatchify(channels=1, draws=(2,), batch=3, grid=(2, 1), threads=32),
    NoisePatchify(patch=8, levels=(1,), draws=(1,), batch=3, grid=(3, 1), threads=16),
    NoisePatchify(dtype=BF16, patch=4, levels=(3,), draws=(2,), grid=(5, 3), threads=32),
    NoisePatchify(patch=2, levels=(2,), draws=(2,), grid=(5, 7), threads=32),
    NoisePatchify(patch=2, channels=1, draws=(2,), grid=(3, 5), threads=16),
    NoisePatchify(patch=14, levels=(2,), grid=(3, 2), threads=64),
    NoisePatchify(patch=14, channels=1, batch=1, grid=(3, 1), threads=16),
    NoisePatchify(patch=32, levels=(2,), draws=(1,), batch=1, threads=64),
    NoisePatchify(patch=7, draws=(2,), grid=(3, 1), threads=16),
    NoisePatchify(patch=1, levels=(2,), grid=(3, 5), threads=16),
    NoisePatchify(patch=1, channels=1, batch=1, grid=(1, 1), threads=16),
    # Numbers of channels: periods of registers, and too many to unroll.
    NoisePatchify(patch=8, channels=2, batch=1, grid=(3, 3), threads=16),
    NoisePatchify(channels=4, batch=1, grid=(3, 3), threads=128),
    NoisePatchify(channels=6, batch=1, grid=(3, 1), threads=32),
    NoisePatchify(channels=5, levels=(2,), batch=1, grid=(3, 1), threads=32),
    NoisePatchify(pixels="fp32 planes", patch=2, channels=5, draws=(2,), grid=(3, 1), threads=16),
    # Memory and dtypes of the pixels; with float pixels the backward pass runs too.
    NoisePatchify(pixels="fp32 planes", levels=(2,), draws=(2,), grid=(3, 1), threads=32),
    NoisePatchify(pixels="fp32 planes", levels=(3,), draws=(2,), threads=128),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, levels=(2,), threads=64),
    NoisePatchify(pixels="bf16 planes", dtype=BF16, levels=(2,), batch=1, threads=64),
    NoisePatchify(pixels="bf16 planes", batch=1, threads=64),
    NoisePatchify(pixels="fp16 planes", dtype=FP16, levels=(9,), batch=1, grid=(2, 1), threads=64),
    NoisePatchify(pixels="fp32 planes", channels=1, levels=(2,), batch=3, grid=(2, 1), threads=32),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, patch=8, batch=3, grid=(3, 1), threads=16),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, patch=4, levels=(2,), draws=(2,), batch=3, grid=(5, 3), threads=32),
    NoisePatchify(pixels="fp32 planes", patch=2, levels=(2,), grid=(5, 7), threads=16),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, patch=14, levels=(3,), grid=(3, 2), threads=128),
    NoisePatchify(pixels="fp32 planes", patch=14, draws=(2,), threads=32),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, patch=32, batch=1, grid=(1, 2), threads=32),
    NoisePatchify(pixels="fp32 planes", dtype=FP16, patch=32, levels=(2,), batch=1, threads=64),
    NoisePatchify(pixels="fp32 planes", patch=7, levels=(2,), grid=(3, 1), threads=16),
    NoisePatchify(pixels="fp32 planes", patch=1, channels=1, levels=(2,), batch=1, grid=(1, 1), threads=16),
    NoisePatchify(pixels="fp32 planes", dtype=BF16, channels=4, levels=(2,), batch=1, threads=32),
    NoisePatchify(pixels="fp32 planes", patch=2, channels=64, levels=(2,), batch=1, grid=(3, 1), threads=16),
    NoisePatchify(pixels="bf16 planes", patch=8, batch=1, threads=16),
    NoisePatchify(pixels="fp32 channels_last", levels=(2,), threads=32),
    NoisePatchify(pixels="fp32 channels_last", dtype=FP16, patch=14, batch=1, threads=16),
    NoisePatchify(pixels="uint8 strided", patch=8, levels=(2,), draws=(2,), grid=(3, 1), threads=16),
    NoisePatchify(pixels="fp32 strided", patch=8, levels=(2,), draws=(3,), grid=(3, 1), threads=16),
    # Without noise.
    NoisePatchify(clean=True, dtype=BF16, built=(FORWARD,), compared=True),
    NoisePatchify(clean=True, pixels="fp32 planes", dtype=BF16, built=(FORWARD,)),
    NoisePatchify(clean=True, patch=4, grid=(5, 3), threads=32),
    NoisePatchify(clean=True, dtype=FP16, patch=14, channels=5, batch=1, threads=32),
    NoisePatchify(clean=True, pixels="fp32 planes", patch=4, grid=(3, 5), threads=32),
    NoisePatchify(clean=True, pixels="bf16 planes", patch=2, channels=5, grid=(3, 1), threads=16),
    NoisePatchify(clean=True, pixels="fp32 channels_last", patch=7, grid=(3, 1), threads=16),
    NoisePatchify(clean=True, pixels="uint8 strided", dtype=BF16, patch=8, grid=(3, 1), threads=16),
    NoisePatchify(clean=True, pixels="fp32 strided", patch=8, batch=1, threads=16),
    NoisePatchify(clean=True, patch=8, batch=0, what="no image", threads=16),
    # Nothing to do.
    *(
        NoisePatchify(pixels=pixels, patch=8, batch=batch, levels=(levels,), draws=(draws,), what=what, threads=16)
        for pixels in ("uint8", "fp32 planes")
        for batch, levels, draws, what in ((0, 2, 2, "no image"), (2, 0, 2, "no level"), (2, 2, 0, "no draw"))
    ),
)
PATCH_LOSS = (
    PatchLoss(dtype=BF16, built=(FORWARD, "sum", BACKWARD), timed=(FORWARD, BOTH), compared=True),
    PatchLoss(grid=(3, 3), built=(FORWARD, BACKWARD), timed=(FORWARD, BOTH)),
    PatchLoss(dtype=BF16, norm_pix=False, built=(FORWARD, BACKWARD)),
    PatchLoss(dtype=BF16, masked=True, grid=(3, 3), built=(FORWARD, "sum", BACKWARD)),
    PatchLoss(dtype=BF16, patch=4, grid=(5, 7), built=(FORWARD, BACKWARD), timed=(FORWARD, BOTH)),
    PatchLoss(dtype=BF16, patch=14, grid=(3, 1), built=(FORWARD, BACKWARD)),
    PatchLoss(dtype=BF16, patch=32, batch=1, built=(FORWARD, BACKWARD)),
    PatchLoss(pixels="fp32 planes", dtype=BF16, grid=(3, 1), built=(FORWARD, BACKWARD)),
    PatchLoss(dtype=BF16, patch=2, grid=(9, 8), built=(FORWARD,)),
    PatchLoss(dtype=FP16, patch=8, grid=(3, 7), built=(FORWARD,)),
    PatchLoss(patch=4, channels=1, grid=(5, 7), built=(FORWARD,)),
    PatchLoss(dtype=BF16, channels=5, batch=1, grid=(3, 1), built=(FORWARD,)),
    PatchLoss(pixels="fp32 channels_last", dtype=BF16, built=(FORWARD,)),
    # What only the benchmarks time, on images of both sizes.
    PatchLoss(patch=4, grid=(5, 7), timed=(FORWARD, BOTH)),
    *(PatchLoss(pixels="fp32 planes", patch=patch, grid=(3, 1), timed=(FORWARD, BOTH)) for patch in (16, 4)),
    *(PatchLoss(masked=True, patch=patch, grid=(3, 3), timed=(BOTH,)) for patch in (16, 4)),
    *(PatchLoss(norm_pix=False, patch=patch, batch=1, timed=(BOTH,)) for patch in (16, 4)),
    # Grids whose last program is partly empty; runs that pad a patch come with 14, 7 and 5.
    PatchLoss(dtype=FP16, norm_pix=False, masked=True, grid=(3, 1)),
    PatchLoss(channels=1, batch=1, grid=(2, 1)),
    PatchLoss(patch=8, masked=True, batch=3, grid=(3, 7)),
    PatchLoss(dtype=BF16, patch=4, masked=True, grid=(5, 7)),
    PatchLoss(patch=2, masked=True, grid=(9, 8)),
    PatchLoss(patch=2, channels=1, grid=(9, 8)),
    PatchLoss(patch=14, masked=True, grid=(3, 1)),
    PatchLoss(dtype=FP16, patch=14, norm_pix=False, batch=1, grid=(1, 2)),
    PatchLoss(patch=14, channels=1, batch=1, grid=(3, 1)),
    PatchLoss(patch=32, masked=True, batch=1),
    PatchLoss(patch=7, grid=(3, 1)),
    PatchLoss(patch=1, masked=True, grid=(3, 5)),
    PatchLoss(channels=5, batch=1, grid=(3, 1)),
    PatchLoss(patch=5, channels=5, masked=True, batch=1, grid=(3, 1)),
    PatchLoss(pixels="fp32 planes", masked=True, grid=(3, 1)),
    PatchLoss(pixels="fp32 planes", dtype=BF16, patch=14, batch=1, grid=(3, 1)),
    PatchLoss(pixels="bf16 planes", patch=8, batch=1),
    PatchLoss(pixels="fp32 channels_last"),
    PatchLoss(pixels="uint8 strided", patch=8, norm_pix=False, masked=True, grid=(3, 1)),
    PatchLoss(dtype=BF16, patch=14, grid=(3, 1), view=True, built=(FORWARD, BACKWARD)),
    *(PatchLoss(patch=patch, masked=True, grid=(3, 1), view=True) for patch in (16, 7)),
    PatchLoss(patch=8, batch=0, grid=(3, 1), what="no image"),
)
DECODE_PATCHES = (
    *(
        DecodePatches(statistics="input", dtype=BF16, built=(FORWARD, BACKWARD), **fields)
        for fields in (
            {"timed": (FORWARD, BOTH)},
            {"levels": (4,)},
            {"patch": 4, "grid": (5, 3), "batch": 3, "timed": (FORWARD, BOTH)},
            {"patch": 32, "batch": 1, "grid": (1, 2)},
            {"pixels": "fp32 planes", "compared": True},
            {"pixels": "fp32 planes", "patch": 14, "batch": 1, "grid": (3, 1)},
            {"pixels": "fp32 planes", "patches": True},
        )
    ),
    DecodePatches(statistics="input", levels=(2,), built=()),
    DecodePatches(statistics="input", built=(FORWARD, BACKWARD)),
    DecodePatches(statistics="noisy", dtype=BF16, batch=3, built=(FORWARD, BACKWARD)),
    DecodePatches(statistics="noisy", dtype=BF16, batch=3, patches=True, built=(FORWARD, BACKWARD)),
    DecodePatches(dtype=BF16, batch=3, grid=(3, 1), built=(FORWARD, BACKWARD), compared=True),
    DecodePatches(dtype=BF16, patch=4, batch=3, grid=(5, 7), patches=True, built=(FORWARD, BACKWARD)),
    DecodePatches(statistics="input", dtype=BF16, patch=2, grid=(5, 7), built=(FORWARD,)),
    DecodePatches(statistics="input", dtype=FP16, patch=8, batch=1, built=(FORWARD,)),
    DecodePatches(statistics="input", patch=4, channels=1, batch=3, grid=(5, 3), built=(FORWARD,)),
    DecodePatches(statistics="noisy", dtype=BF16, batch=3, fixed=True, built=(BACKWARD,)),
    # What only the benchmarks time, on images of both sizes.
    *(
        DecodePatches(patch=patch, batch=batch, grid=grid, timed=timed, **fields)
        for patch, batch, grid in ((16, 2, (1, 3)), (4, 3, (3, 3)))
        for timed, fields in (
            ((FORWARD, BOTH), {}),
            ((FORWARD, BOTH), {"statistics": "input", "pixels": "fp32 planes"}),
            ((FORWARD, BOTH), {"statistics": "noisy"}),
            ((BOTH,), {"statistics": "input", "pixels": "fp32 planes", "patches": True}),
        )
    ),
    # No case fills its last program, except where a program is one patch.
    DecodePatches(dtype=FP16, channels=1, levels=(2,), batch=1),
    DecodePatches(patch=2, batch=3, grid=(5, 7)),
    DecodePatches(patch=1, channels=1, batch=3, grid=(5, 7)),
    DecodePatches(patch=7),
    DecodePatches(dtype=BF16, patch=14, channels=5, grid=(3, 1)),
    DecodePatches(patch=32, batch=1, grid=(1, 2)),
    DecodePatches(patch=8, grid=(2, 3), strided=True),
    DecodePatches(statistics="input", dtype=BF16, levels=(3,)),
    DecodePatches(statistics="input", dtype=FP16, patch=8, levels=(2,), draws=(3,), batch=1),
    DecodePatches(statistics="input", pixels="fp32 planes", levels=(2,)),
    DecodePatches(statistics="input", pixels="bf16 planes", grid=(3, 1)),
    DecodePatches(statistics="input", pixels="fp16 planes", dtype=BF16, patch=8, channels=1, grid=(3, 3)),
    DecodePatches(statistics="input", patch=2, levels=(2,), batch=3, grid=(5, 7)),
    DecodePatches(statistics="input", pixels="fp32 planes", dtype=BF16, patch=2, channels=1, grid=(5, 7)),
    DecodePatches(statistics="input", pixels="fp32 planes", dtype=BF16, patch=4, batch=3, grid=(5, 3)),
    DecodePatches(statistics="input", patch=7, channels=5, batch=3, grid=(3, 3)),
    DecodePatches(statistics="input", patch=14, levels=(2,), batch=1, grid=(3, 2)),
    DecodePatches(statistics="input", pixels="fp32 planes", dtype=BF16, patch=14, channels=1, batch=1, grid=(3, 1)),
    DecodePatches(statistics="input", pixels="fp32 planes", dtype=BF16, patch=32, levels=(2,), batch=1, grid=(1, 2)),
    DecodePatches(statistics="input", patch=32, channels=1, batch=1, grid=(1, 2)),
    DecodePatches(statistics="input", dtype=BF16, channels=5, levels=(2,), batch=1),
    DecodePatches(statistics="input", pixels="fp32 strided", patch=8, levels=(2,), grid=(2, 3), strided=True),
    DecodePatches(statistics="noisy", levels=(2,)),
    DecodePatches(statistics="noisy", source=FP16, patch=4, grid=(3, 3)),
    DecodePatches(statistics="noisy", dtype=BF16, source=FP32, patch=2, batch=3, grid=(5, 7)),
    DecodePatches(statistics="noisy", patch=14, levels=(1,), batch=3),
    DecodePatches(statistics="noisy", patch=32, channels=1, grid=(1, 1)),
    DecodePatches(statistics="noisy", patch=8, channels=5, batch=3),
    DecodePatches(statistics="input", pixels="fp32 planes", levels=(2,), fixed=True),
    DecodePatches(statistics="noisy", dtype=BF16, patch=4, batch=3, grid=(3, 3), fixed=True),
    DecodePatches(dtype=BF16, batch=3, grid=(3, 1), output=BF16),
    DecodePatches(statistics="input", pixels="fp32 planes", patch=8, levels=(2,), batch=1, output=FP16),
    # Every patch size with every number of channels into patches; statistics and dtypes in turn.
    *(
        DecodePatches(patches=True, batch=batch, grid=grid, patch=patch, channels=channels, dtype=dtype, **fields)
        for batch, grid, patch, channels, dtype, fields in (
            (2, (1, 3), 16, 3, BF16, {"statistics": "input", "pixels": "fp32 planes", "levels": (2,)}),
            (3, (1, 3), 16, 3, BF16, {}),
            (3, (1, 3), 16, 3, BF16, {"statistics": "noisy", "output": FP16}),
            (2, (3, 1), 16, 1, FP32, {"statistics": "input"}),
            (1, (1, 3), 16, 4, FP16, {"statistics": "noisy", "source": FP32, "levels": (2,)}),
            (3, (5, 7), 2, 3, BF16, {"output": FP32}),
            (3, (5, 7), 2, 1, FP32, {"statistics": "noisy", "source": FP16, "output": BF16}),
            (2, (5, 7), 2, 4, FP16, {"statistics": "input", "levels": (2,), "output": FP32}),
            (3, (5, 7), 4, 3, BF16, {"statistics": "noisy", "source": FP32}),
            (3, (5, 7), 4, 3, FP32, {"output": FP16}),
            (2, (5, 3), 4, 1, BF16, {"statistics": "input", "pixels": "fp16 planes", "levels": (2,), "output": FP16}),
            (3, (5, 3), 4, 4, FP32, {}),
            (3, (1, 3), 8, 3, FP16, {"statistics": "input", "pixels": "fp32 planes", "output": BF16}),
            (3, (1, 3), 8, 1, BF16, {}),
            (2, (3, 3), 8, 4, FP32, {"statistics": "noisy", "source": BF16}),
            (3, (1, 3), 14, 3, FP16, {"levels": (1,)}),
            (1, (3, 2), 14, 1, BF16, {"statistics": "noisy", "source": FP32, "levels": (2,), "output": FP32}),
            (1, (3, 1), 14, 4, FP32, {"statistics": "input", "pixels": "bf16 planes", "output": BF16}),
            (2, (1, 1), 32, 3, BF16, {"statistics": "noisy", "source": FP16}),
            (1, (1, 2), 32, 1, FP32, {"statistics": "input", "pixels": "fp32 planes"}),
            (1, (1, 2), 32, 4, FP16, {"output": BF16}),
            (2, (1, 3), 8, 3, BF16, {"statistics": "input", "pixels": "fp32 planes", "levels": (2,), "fixed": True}),
            (3, (1, 3), 8, 3, FP32, {"statistics": "noisy", "fixed": True}),
            (2, (2, 3), 8, 3, FP32, {"statistics": "input", "pixels": "fp32 strided", "levels": (2,), "strided": True}),
        )
    ),
    DecodePatches(
        statistics="input", dtype=BF16, patch=14, levels=(2,), grid=(3, 1), view=True, built=(FORWARD, BACKWARD)
    ),
    DecodePatches(dtype=BF16, patch=14, batch=3, grid=(3, 1), view=True),
    DecodePatches(statistics="noisy", patch=4, levels=(2,), grid=(3, 3), view=True),
    DecodePatches(patches=True, statistics="input", dtype=BF16, patch=14, channels=1, levels=(2,), view=True),
    # Nothing to do.
    DecodePatches(patch=8, levels=(2,), batch=0, what="no image"),
    DecodePatches(patch=8, levels=(2,), batch=0, patches=True, what="no image"),
    DecodePatches(statistics="input", pixels="fp32 planes", patch=8, levels=(0,)),
)
ATTACK_STEP = (
    AttackStep(built=(FORWARD,), timed=(FORWARD,), compared=True),
    *(AttackStep(threads=threads, built=(FORWARD,)) for threads in (256, 512)),
    AttackStep(dtype=BF16, shape=(3, 7, 9), batch=2, built=(FORWARD,), timed=(FORWARD,)),
    AttackStep(odd=True, shape=(3, 5, 7), built=(FORWARD,)),
    # A program has 1,024 elements.
    AttackStep(batch=2, shape=(2049,), epsilon="one", what="the last program has one element"),
    AttackStep(odd=True, shape=(3, 5, 7), step_size="one", what="one step size"),
    AttackStep(batch=2, shape=(1024,), step_size="one", epsilon="one", what="one program exactly"),
    AttackStep(batch=1, shape=(1, 9, 9), what="one sample"),
    AttackStep(batch=5, shape=(), what="samples of one element"),
    AttackStep(dtype=FP16, batch=2, shape=(3, 7, 9)),
    AttackStep(batch=2, shape=(3, 7, 9), origin=FP16, gradient=BF16, step_size="one"),
    AttackStep(dtype=BF16, batch=2, shape=(1500,), origin=FP32, gradient=FP16, epsilon="one"),
    AttackStep(batch=2, shape=(700,), step_size="float64", epsilon="float64", what="float64 sizes"),
    AttackStep(batch=2, shape=(8, 6, 3), step_size="strided", strided=True),
    AttackStep(batch=0, shape=(3, 4, 4), epsilon="one", what="no sample"),
    AttackStep(batch=2, shape=(3, 0, 4), epsilon="one", what="empty samples"),
)
ATTACK_START = (
    AttackStart(built=(FORWARD,)),
    AttackStart(dtype=BF16, batch=2, shape=(1500,), built=(FORWARD,)),
    AttackStart(odd=True, shape=(3, 5, 7), built=(FORWARD,)),
    AttackStart(batch=2, shape=(2049,), epsilon="one", what="the last program has one element"),
    AttackStart(batch=2, shape=(1024,), epsilon="one", what="one program exactly"),
    AttackStart(batch=1, shape=(1, 9, 9), what="one sample"),
    AttackStart(batch=5, shape=(), what="samples of one element"),
    AttackStart(dtype=FP16, batch=2, shape=(3, 7, 9)),
    AttackStart(batch=2, shape=(700,), epsilon="float64", what="float64 epsilon"),
    AttackStart(batch=2, shape=(8, 6, 3), epsilon="strided", strided=True),
    AttackStart(batch=0, shape=(3, 4, 4), what="no sample"),
    AttackStart(batch=2, shape=(3, 0, 4), what="empty samples"),
    # Enough words for every way in which they are rounded to float32.
    AttackStart(batch=1, shape=(400_000,), epsilon="one", what="many words"),
)
NORM_LINEAR = (
    # bf16 under autocast, whose tokens are float32; and all in float32.
    NormLinear(dtype=BF16, stream=FP32, built=(FORWARD, BACKWARD), timed=(FORWARD, BOTH), compared=True),
    NormLinear(built=(FORWARD, BACKWARD), timed=(FORWARD, BOTH)),
    NormLinear(dtype=BF16, norm=BF16, built=(FORWARD, BACKWARD)),
    NormLinear(dtype=FP16, stream=FP32, bias=False),
    NormLinear(dtype=FP16, norm=FP16, width=65, outputs=7),
    # More rows than a program has, and rows that do not fill its last tile.
    NormLinear(batch=3, tokens=43, width=24, outputs=5, what="several programs"),
    NormLinear(batch=1, tokens=67, width=1025, outputs=3, what="a row of more than eight warps"),
    NormLinear(batch=1, tokens=1, width=192, what="one token"),
    NormLinear(width=1, outputs=3, what="tokens of one element"),
    NormLinear(strided=True, width=33),
    NormLinear(batch=0, what="no image"),
)
GELU_LINEAR = (
    GeluLinear(dtype=BF16, built=(FORWARD, BACKWARD), timed=(FORWARD, BOTH), compared=True),
    GeluLinear(built=(FORWARD, BACKWARD), timed=(FORWARD, BOTH)),
    GeluLinear(dtype=BF16, stream=FP32, built=(FORWARD, BACKWARD)),
    GeluLinear(dtype=FP16, bias=False),
    GeluLinear(batch=3, tokens=43, width=24, what="several programs"),
    GeluLinear(batch=1, tokens=2, width=512, what="one program exactly"),
    GeluLinear(width=33, strided=True),
    GeluLinear(width=1, outputs=3, what="tokens of one element"),
    GeluLinear(batch=0, what="no image"),
)
CASES: tuple[Case, ...] = (
    *NOISE_PATCHIFY,
    *PATCH_LOSS,
    *DECODE_PATCHES,
    *ATTACK_STEP,
    *ATTACK_START,
    *NORM_LINEAR,
    *GELU_LINEAR,
)
OPERATIONS: dict[str, tuple[Case, ...]] = {
    name: tuple(cases) for name, cases in itertools.groupby(CASES, key=lambda case: case.operation)
}
