"""Drop path whose choice is a function of seeds, in place of timm's, which draws from torch's generator."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from denim.kernels import Stream, noise_words

__all__ = ["KeyedDropPath", "draw_drop_path", "key_drop_path"]


class KeyedDropPath(nn.Module):
    """timm's `DropPath` (stochastic depth, Huang et al., ECCV 2016), except for where the choice comes from.

    In training mode x is multiplied by `scale`, which `draw_drop_path` sets; in evaluation mode x is returned. `scale`
    is a tensor, and nothing else changes between steps, so compiled blocks are not compiled again.

    Attributes:
        rate: probability of dropping a sample.
        scale: (B, 1, 1), 0 for samples that are dropped and 1 / (1 - rate) for others.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, dim), or x * `scale` in training mode, in the dtype of x.

        Raises:
            RuntimeError: in training mode, without a scale.
        """
        if not self.training:
            return x
        if self.scale is None:
            raise RuntimeError("drop path has no draws: call the whole model with seeds, which sets them")
        return x * self.scale.to(x.dtype)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3f}"


def key_drop_path(model: nn.Module) -> tuple[KeyedDropPath, ...]:
    """Replace every `DropPath` of a model by a keyed one of the same rate, in place.

    Returns:
        The new ones, in the order of the model's modules.
    """
    layers = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                layers.append(KeyedDropPath(child.drop_prob))
                setattr(module, name, layers[-1])
    return tuple(layers)


def draw_drop_path(layers: tuple[KeyedDropPath, ...], thresholds: Tensor, kept: Tensor, seeds: Tensor) -> None:
    """Choose which samples the next forward pass drops where: a function of the seeds. It holds until the next call.

    A block that is computed again in the backward pass (checkpointing of activations) uses the choice that holds then.
    So a backward pass comes before the next draw, unless that has the same seeds.

    Args:
        layers: L drop paths. Layer k drops a sample if word k of its stream `DROP_PATH` is below threshold k.
        thresholds: int64 (L,), the rates times 2^32.
        kept: (L,), 1 / (1 - rate).
        seeds: int64 (B,).
    """
    words = noise_words(seeds, len(layers), Stream.DROP_PATH)
    scales = torch.where(words >= thresholds, kept, 0.0)
    for layer, scale in zip(layers, scales[:, :, None, None].unbind(1), strict=True):
        layer.scale = scale
