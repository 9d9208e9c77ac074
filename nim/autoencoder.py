"""The denoiser: MAE's asymmetric encoder-decoder, built from timm's public pieces, working on patches.

Parameters carry the names of the published MAE and NIM checkpoints, which for the encoder are timm's own: the encoder,
a classifier fine-tuned from it and any plain timm ViT exchange weights by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from denim.kernels import Stream, noise_words
from denim.nim.attention import Attention
from denim.nim.checkpoint import Pretrained

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PRESETS", "Autoencoder", "AutoencoderConfig", "Mask", "preset"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_architecture(config: Any, *sizes: str) -> None:
    """What the configs of all models share: tuples from JSON's lists, and values that fit together.

    Raises:
        ValueError: a size (patch_size, width, depth, heads and the named ones) that is no positive integer, image sides
            that are no multiples of the patch size, a width that its heads do not divide, bad mean or std.
    """
    for name in ("image_size", "mean", "std"):
        object.__setattr__(config, name, tuple(getattr(config, name)))
    for name in ("patch_size", "width", "depth", "heads", *sizes):
        if not isinstance(getattr(config, name), int) or getattr(config, name) < 1:
            raise ValueError(f"{name} must be a positive integer, got {getattr(config, name)!r}")
    if len(config.image_size) != 2 or any(
        not isinstance(side, int) or side < 1 or side % config.patch_size for side in config.image_size
    ):
        raise ValueError(
            f"image_size must be two multiples of the patch size {config.patch_size}, got {config.image_size}"
        )
    if config.width % config.heads:
        raise ValueError(f"width {config.width} must be a multiple of its {config.heads} heads")
    if (
        not config.mean
        or len(config.mean) != len(config.std)
        or not all(map(math.isfinite, (*config.mean, *config.std)))
        or min(config.std) <= 0
    ):
        raise ValueError(
            f"mean and std need one finite value per channel and std > 0, got {config.mean} and {config.std}"
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of an autoencoder, its pixel statistics and its target.

    Attributes:
        image_size: (H, W) in pixels, multiples of the patch size.
        patch_size: side P of a square patch.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        mean, std: per-channel statistics in [0, 1] units; their length is the number of channels.
        norm_pix: whether the target is normalised per patch (else raw).
        objective: what it was pretrained for: nim, mae or dmae.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    norm_pix: bool = True
    objective: str = "nim"

    def __post_init__(self) -> None:
        check_architecture(self, "decoder_width", "decoder_depth", "decoder_heads")
        for width, heads in ((self.width, self.heads), (self.decoder_width, self.decoder_heads)):
            if width % heads or width % 4:
                raise ValueError(f"width {width} must be a multiple of its {heads} heads, and of 4 (2-d positions)")
        if self.objective not in ("nim", "mae", "dmae"):
            raise ValueError(f"objective must be nim, mae or dmae, got {self.objective!r}")

    @property
    def channels(self) -> int:
        """Number of image channels."""
        return len(self.mean)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def length(self) -> int:
        """Number L of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Size D of a patch vector."""
        return self.patch_size**2 * self.channels


# base, large and huge as published (You et al. 2023; He et al. 2022, appendix A).
PRESETS: dict[str, AutoencoderConfig] = {
    "micro": AutoencoderConfig((16, 16), 4, 64, 3, 4, 64, 1, 4, mean=(0.5,), std=(0.25,)),
    "tiny": AutoencoderConfig(width=192, depth=12, heads=3, decoder_width=192, decoder_depth=4, decoder_heads=3),
    "small": AutoencoderConfig(width=384, depth=12, heads=6, decoder_width=256, decoder_depth=4, decoder_heads=8),
    "base": AutoencoderConfig(),
    "large": AutoencoderConfig(width=1024, depth=24, heads=16),
    "huge": AutoencoderConfig(patch_size=14, width=1280, depth=32, heads=16),
}


def preset(
    name: str,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    **other: Any,
) -> AutoencoderConfig:
    """A preset, with another image size, patch size or number of channels where given.

    Where `channels` is given, pixel statistics are ImageNet's for three channels, and mean 0.5, std 0.25 for any other
    number; `mean` and `std` take precedence.

    Raises:
        ValueError: unknown preset (the valid ones are listed) or sizes that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    changes: dict[str, Any] = dict(other)
    if image_size is not None:
        changes["image_size"] = (image_size, image_size)
    if patch_size is not None:
        changes["patch_size"] = patch_size
    if channels is not None:
        changes.setdefault("mean", IMAGENET_MEAN if channels == 3 else (0.5,) * channels)
        changes.setdefault("std", IMAGENET_STD if channels == 3 else (0.25,) * channels)
        if len(changes["mean"]) != channels:
            raise ValueError(f"{channels} channels need one mean and std each, got mean {changes['mean']}")
    return replace(config, **changes)


class Mask(NamedTuple):
    """Which patches the encoder sees.

    Attributes:
        order: int64 (N, L), patch numbers, the visible ones first.
        visible: how many are visible, the same for every sample.
    """

    order: Tensor
    visible: int

    @classmethod
    def random(cls, seeds: Tensor, length: int, ratio: float) -> Mask:
        """Hide a share of the patches at random, as a pure function of the seeds (N,).

        int(L * (1 - ratio)) patches stay visible, as in the published code of MAE.

        Raises:
            ValueError: the ratio leaves no patch visible, or hides none.
        """
        visible = int(length * (1 - ratio))
        if not 0 < visible < length:
            raise ValueError(f"mask ratio {ratio} leaves {visible} of {length} patches visible; choose one in between")
        return cls(noise_words(seeds, length, Stream.MASK).argsort(dim=-1, stable=True), visible)

    @property
    def hidden(self) -> Tensor:
        """bool (N, L), True where a patch is hidden from the encoder."""
        hidden = torch.zeros(self.order.shape, dtype=torch.bool, device=self.order.device)
        return hidden.scatter(1, self.order[:, self.visible :], True)


def _sincos(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-d sine-cosine positions (1, 1 + L, width), with a zero row for the class token."""
    # timm puts the row's half first, the published code the column's.
    positions = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True).roll(width // 2, dims=1)
    return torch.cat((torch.zeros(1, width), positions)).unsqueeze(0)


class Autoencoder(Pretrained, nn.Module):
    """Encoder over patches, decoder back to patches.

    `forward` takes patches (N, L, D) in normalised space, with a `Mask` for MAE and DMAE, and returns predictions
    (N, L, D): of the normalised target where `config.norm_pix`, of the raw one otherwise.
    """

    config_class: ClassVar[type[Any]] = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm, attn_layer=Attention)
        # timm's module holds the projection under the published name; `_embed` applies it to patches.
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, config.channels, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(_sincos(config.grid, config.width), requires_grad=False)
        self.blocks = nn.ModuleList(block(config.width, config.heads) for _ in range(config.depth))
        self.norm = norm(config.width)
        self.decoder_embed = nn.Linear(config.width, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.decoder_pos_embed = nn.Parameter(_sincos(config.grid, config.decoder_width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            block(config.decoder_width, config.decoder_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = norm(config.decoder_width)
        self.decoder_pred = nn.Linear(config.decoder_width, config.patch_dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.width, -1))
        nn.init.zeros_(cast(Tensor, self.patch_embed.proj.bias))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def _embed(self, patches: Tensor) -> Tensor:
        # The convolution's weight is (width, channel, row, column), a patch vector (row, column, channel).
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.patch_embed.proj.bias)

    def encode(self, patches: Tensor, mask: Mask | None = None) -> Tensor:
        """Patches (N, L, D) to tokens (N, 1 + visible, width), class token first.

        Raises:
            ValueError: patches of another number or size than the config's.
        """
        expected = (self.config.length, self.config.patch_dim)
        if patches.dim() != 3 or tuple(patches.shape[1:]) != expected:
            raise ValueError(f"patches must have shape (N, {expected[0]}, {expected[1]}), got {tuple(patches.shape)}")
        tokens = self._embed(patches) + self.pos_embed[:, 1:]
        if mask is not None:
            chosen = mask.order[:, : mask.visible, None].expand(-1, -1, tokens.shape[-1])
            tokens = tokens.gather(1, chosen)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((first, tokens), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded

    def decode(self, tokens: Tensor, mask: Mask | None = None) -> Tensor:
        """Tokens (N, 1 + visible, width) to predicted patches (N, L, D)."""
        tokens = self.decoder_embed(tokens)
        if mask is not None:
            chosen = mask.order[:, : mask.visible, None].expand(-1, -1, tokens.shape[-1])
            full = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], self.config.length, -1)
            tokens = torch.cat((tokens[:, :1], full.scatter(1, chosen, tokens[:, 1:])), dim=1)
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return predicted[:, 1:]

    def forward(self, patches: Tensor, mask: Mask | None = None) -> Tensor:
        """Predicted patches (N, L, D) for patches (N, L, D) in normalised space."""
        return self.decode(self.encode(patches, mask), mask)
