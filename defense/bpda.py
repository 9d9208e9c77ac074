"""Transforms of pixels without a useful derivative, such as JPEG, with a backward pass that an attack can follow."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch import Tensor, nn

from denim.nim.data.decode import decode

__all__ = ["Bpda", "Jpeg"]


class Bpda(nn.Module):
    """A transform of pixels whose derivative is replaced: backward pass differentiable approximation (BPDA).

    The forward pass is the transform, bit by bit. The backward pass is that of the identity ("straight through"), or of
    a substitute that is close to the transform and has a derivative (Athalye, Carlini, Wagner, "Obfuscated gradients
    give a false sense of security", ICML 2018, section 4.1). It goes before a classifier:
    `nn.Sequential(Bpda(transform), classifier)`.

    Args:
        transform: a function or module from pixels (B, C, H, W) in [0, 1] to what the classifier gets. It is called on
            a copy, without gradients: it may round, leave torch, or change its argument.
        substitute: a differentiable function or module from the same pixels to the shape of the transform's result;
            None is the identity, for a transform that keeps the shape.

    Raises:
        TypeError: `transform` or `substitute` cannot be called.
    """

    def __init__(
        self, transform: Callable[[Tensor], Tensor], substitute: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        for name, given in (("transform", transform), ("substitute", substitute)):
            if not callable(given) and (name == "transform" or given is not None):
                raise TypeError(f"{name} must be a function or module of pixels, got {type(given).__name__}")
        self.transform, self.substitute = transform, substitute

    def forward(self, pixels: Tensor) -> Tensor:
        """What the transform makes of pixels (B, C, H, W) in [0, 1], in their dtype and on their device.

        Raises:
            TypeError: the transform returns no tensor.
            ValueError: the shapes of the transform's result and of the substitute's differ.
        """
        with torch.no_grad():
            changed = self.transform(pixels.detach().clone())
        if not isinstance(changed, Tensor):
            raise TypeError(f"the transform must return a tensor, got {type(changed).__name__}")
        changed = changed.to(pixels.device, pixels.dtype)
        if not torch.is_grad_enabled():
            return changed
        near = pixels if self.substitute is None else self.substitute(pixels)
        if near.shape != changed.shape:
            whose = "its pixels have" if self.substitute is None else "the substitute returned"
            raise ValueError(
                f"the transform returned shape {tuple(changed.shape)}, and {whose} shape {tuple(near.shape)}: give a "
                "differentiable substitute that returns the shape of the transform's result"
            )
        return changed + (near - near.detach())  # the difference is 0, and has the derivative of `near`


class Jpeg(Bpda):
    """JPEG compression as a defense (Dziugaite et al. 2016; Guo et al., ICLR 2018); backward, it is the identity.

    Pixels are clipped to [0, 1], rounded to 8 bits, compressed and decompressed by Pillow; colour is subsampled 4:2:0.
    It goes before a classifier: `nn.Sequential(Jpeg(75), classifier)`. It computes on the CPU, one image after the
    other.

    Args:
        quality: of the compression, from 1 (smallest file) to 100.

    Raises:
        ValueError: another quality. When it is called: images that are not (B, 1 or 3, H, W), or not finite.
    """

    def __init__(self, quality: int = 75) -> None:
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"quality of JPEG must be a whole number from 1 to 100, got {quality!r}")
        super().__init__(functools.partial(_compressed, quality=quality))
        self.quality = quality

    def extra_repr(self) -> str:
        """Settings, for print, and the libraries whose results may differ between versions."""
        codec = f"libjpeg {features.version('jpg')}"
        if features.check("libjpeg_turbo"):
            codec = f"libjpeg-turbo {features.version('libjpeg_turbo')}"
        return f"quality={self.quality}, Pillow {PIL.__version__}, {codec}"


def _compressed(pixels: Tensor, quality: int) -> Tensor:
    if pixels.dim() != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"JPEG takes pixels (B, C, H, W) with 1 or 3 channels, got {tuple(pixels.shape)}")
    if not bool(pixels.isfinite().all()):
        raise ValueError("JPEG takes finite pixels, and some are not")
    levels = (pixels.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    out = np.empty_like(levels)
    for number, image in enumerate(levels):
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
            file, "JPEG", quality=quality, subsampling="4:2:0"
        )
        out[number] = np.asarray(decode(file.getvalue(), image.shape[2])).reshape(image.shape)
    return torch.from_numpy(out).permute(0, 3, 1, 2).float() / 255
