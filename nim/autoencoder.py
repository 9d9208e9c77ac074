"""The denoiser: MAE's asymmetric encoder-decoder on patches, built from timm's public pieces.

Parameters have the names of the published MAE and NIM checkpoints. For the encoder these are timm's own, so the
encoder, a classifier fine-tuned from it and any plain timm ViT exchange weights by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from denim.kernels import Stream, noise_words
from denim.kernels.linear import computing_dtype
from denim.nim.attention import Attention
from denim.nim.block import Block, Mlp
from denim.nim.checkpoint import Pretrained, check_entries

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "PRESETS", "Autoencoder", "AutoencoderConfig", "Mask", "preset"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_architecture(config: Any, *sizes: str) -> None:
    """Check the entries that the configurations of all models share, and turn JSON's lists into tuples.

    Raises:
        ValueError: a size (patch_size, embed_dim, depth, num_heads and the named ones) that is no positive integer, an
            entry of another type, image sides that are no multiples of the patch size, an embed_dim that num_heads does
            not divide, bad mean, std or norm_eps.
    """
    for name in ("img_size", "mean", "std"):
        object.__setattr__(config, name, tuple(getattr(config, name)))
    for name in ("patch_size", "embed_dim", "depth", "num_heads", *sizes):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if len(config.img_size) != 2 or any(
        not isinstance(side, int) or side < 1 or side % config.patch_size for side in config.img_size
    ):
        raise ValueError(f"img_size must be two multiples of the patch size {config.patch_size}, got {config.img_size}")
    check_entries(config)
    if config.embed_dim % config.num_heads:
        raise ValueError(f"embed_dim {config.embed_dim} must be a multiple of num_heads {config.num_heads}")
    if (
        not config.mean
        or len(config.mean) != len(config.std)
        or not all(map(math.isfinite, (*config.mean, *config.std)))
        or min(config.std) <= 0
    ):
        raise ValueError(
            f"mean and std need one finite value per channel and std > 0, got {config.mean} and {config.std}"
        )
    if not 0 < config.norm_eps < 1:
        raise ValueError(f"norm_eps must lie between 0 and 1, got {config.norm_eps}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of an autoencoder, its pixel statistics and its target.

    Attributes:
        img_size: (H, W) in pixels, multiples of the patch size.
        patch_size: side P of a square patch.
        embed_dim: width of the encoder's tokens.
        depth: number of the encoder's blocks.
        num_heads: attention heads of each block of the encoder.
        decoder_embed_dim: width of the decoder's tokens.
        decoder_depth: number of the decoder's blocks.
        decoder_num_heads: attention heads of each block of the decoder.
        mean: per-channel mean in [0, 1] units; its length is the number of channels.
        std: per-channel standard deviation in [0, 1] units, as long as `mean`.
        target: what the decoder predicts: "norm" (each patch normalised by its own mean and variance) or "raw".
        objective: what it was pretrained for: nim, mae or dmae.
        norm_eps: eps of every LayerNorm: 1e-6 in MAE's code and timm, 1e-12 in models trained with transformers.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    target: str = "norm"
    objective: str = "nim"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_architecture(self, "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        for part in ("", "decoder_"):
            dim, heads = getattr(self, f"{part}embed_dim"), getattr(self, f"{part}num_heads")
            if dim % heads or dim % 4:
                raise ValueError(
                    f"{part}embed_dim {dim} must be a multiple of {part}num_heads {heads}, and of 4 (2-d positions)"
                )
        if self.target not in ("norm", "raw"):
            raise ValueError(f"target must be norm or raw, got {self.target!r}")
        if self.objective not in ("nim", "mae", "dmae"):
            raise ValueError(f"objective must be nim, mae or dmae, got {self.objective!r}")

    @property
    def channels(self) -> int:
        """Number of image channels C."""
        return len(self.mean)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Number L of patches."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        """Size D of a patch vector."""
        return self.patch_size**2 * self.channels


# base, large and huge as published (You et al. 2023; He et al. 2022, appendix A).
PRESETS: dict[str, AutoencoderConfig] = {
    "micro": AutoencoderConfig((16, 16), 4, 64, 3, 4, 64, 1, 4, mean=(0.5,), std=(0.25,)),
    "mini": AutoencoderConfig((32, 32), 4, 128, 6, 4, 128, 2, 4),
    "tiny": AutoencoderConfig((224, 224), 16, 192, 12, 3, 192, 4, 3),
    "small": AutoencoderConfig((224, 224), 16, 384, 12, 6, 256, 4, 8),
    "base": AutoencoderConfig(),
    "large": AutoencoderConfig(embed_dim=1024, depth=24, num_heads=16),
    "huge": AutoencoderConfig(patch_size=14, embed_dim=1280, depth=32, num_heads=16),
}
"""Architectures by name: micro (digits), mini (CIFAR), tiny, small, and base, large and huge as published."""


def preset(
    name: str,
    *,
    img_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    **other: Any,
) -> AutoencoderConfig:
    """The configuration of a preset, changed where an argument is given.

    Args:
        name: micro, mini, tiny, small, base, large or huge.
        img_size: side of a square image in pixels.
        patch_size: side of a patch in pixels.
        channels: sets mean and std as well, to ImageNet's for three channels and to 0.5 and 0.25 for any other number,
            unless `mean` and `std` are among the other entries.
        other: further entries of `AutoencoderConfig`.

    Raises:
        ValueError: unknown preset (the valid ones are listed) or sizes that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    changes: dict[str, Any] = dict(other)
    if img_size is not None:
        changes["img_size"] = (img_size, img_size)
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
    def random(cls, seeds: Tensor, num_patches: int, ratio: float) -> Mask:
        """Hide a share of the patches at random, as a pure function of the seeds (N,).

        int(L * (1 - ratio)) patches stay visible, as in the published code of MAE.

        Raises:
            ValueError: the ratio leaves no patch visible, or hides none.
        """
        visible = int(num_patches * (1 - ratio))
        if not 0 < visible < num_patches:
            raise ValueError(
                f"mask ratio {ratio} leaves {visible} of {num_patches} patches visible; choose one in between"
            )
        return cls(noise_words(seeds, num_patches, Stream.MASK).argsort(dim=-1, stable=True), visible)

    @property
    def hidden(self) -> Tensor:
        """bool (N, L), True where a patch is hidden from the encoder."""
        hidden = torch.zeros(self.order.shape, dtype=torch.bool, device=self.order.device)
        return hidden.scatter(1, self.order[:, self.visible :], True)


def _sincos(grid_size: tuple[int, int], embed_dim: int) -> Tensor:
    """Fixed 2-d sine-cosine positions (1, 1 + L, embed_dim), with a zero row for the class token."""
    # timm's first half encodes the row of a patch, that of the published code the column.
    positions = build_sincos2d_pos_embed(list(grid_size), embed_dim, interleave_sin_cos=True).roll(
        embed_dim // 2, dims=1
    )
    return torch.cat((torch.zeros(1, embed_dim), positions)).unsqueeze(0)


class Autoencoder(Pretrained, nn.Module):
    """The asymmetric autoencoder of MAE (He et al. 2022), from patches to predicted patches.

    `forward` takes patches (N, L, D) in normalised space, with a `Mask` for MAE and DMAE, and returns predictions
    (N, L, D): of the normalised target where `config.target` is "norm", of pixels otherwise.
    """

    config_class: ClassVar[type[Any]] = AutoencoderConfig
    part: ClassVar[str] = "denoiser"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        norm: Any = partial(nn.LayerNorm, eps=config.norm_eps)
        block = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm, attn_layer=Attention, mlp_layer=Mlp)
        # timm's module holds the projection under the published name; `_embed` applies it to patches.
        self.patch_embed = PatchEmbed(config.img_size, config.patch_size, config.channels, config.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(_sincos(config.grid_size, config.embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(block(config.embed_dim, config.num_heads) for _ in range(config.depth))
        self.norm = norm(config.embed_dim)
        self.decoder_embed = nn.Linear(config.embed_dim, config.decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(_sincos(config.grid_size, config.decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            block(config.decoder_embed_dim, config.decoder_num_heads) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = norm(config.decoder_embed_dim)
        self.decoder_pred = nn.Linear(config.decoder_embed_dim, config.patch_dim)
        self.grad_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.zeros_(cast(Tensor, self.patch_embed.proj.bias))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def _embed(self, patches: Tensor) -> Tensor:
        # The convolution's weight is (embed_dim, channel, row, column), a patch vector (row, column, channel).
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(self.patch_dtype), weight, self.patch_embed.proj.bias)

    @property
    def patch_dtype(self) -> torch.dtype:
        """dtype in which the embedding multiplies patches: that of its weight, or autocast's where autocast is on."""
        return computing_dtype(self.patch_embed.proj.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of each block again in the backward pass (Chen et al. 2016), as timm's ViTs do."""
        self.grad_checkpointing = enable

    def _through(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        for block in blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens)
        return tokens

    def encode(self, patches: Tensor, mask: Mask | None = None) -> Tensor:
        """Patches (N, L, D) to tokens (N, 1 + visible, embed_dim), class token first.

        Raises:
            ValueError: patches of another number or size than the config's.
        """
        expected = (self.config.num_patches, self.config.patch_dim)
        if patches.dim() != 3 or tuple(patches.shape[1:]) != expected:
            raise ValueError(f"patches must have shape (N, {expected[0]}, {expected[1]}), got {tuple(patches.shape)}")
        positions = self.pos_embed[:, 1:]
        if mask is not None:
            # Before the embedding: hidden patches need none.
            chosen = mask.order[:, : mask.visible, None]
            patches = patches.gather(1, chosen.expand(-1, -1, patches.shape[-1]))
            positions = positions.expand(len(chosen), -1, -1).gather(1, chosen.expand(-1, -1, positions.shape[-1]))
        tokens = self._embed(patches) + positions
        first = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((first, tokens), dim=1)
        encoded: Tensor = self.norm(self._through(self.blocks, tokens))
        return encoded

    def decode(self, tokens: Tensor, mask: Mask | None = None) -> Tensor:
        """Tokens (N, 1 + visible, embed_dim) to predicted patches (N, L, D)."""
        tokens = self.decoder_embed(tokens)
        if mask is not None:
            chosen = mask.order[:, : mask.visible, None].expand(-1, -1, tokens.shape[-1])
            full = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], self.config.num_patches, -1)
            tokens = torch.cat((tokens[:, :1], full.scatter(1, chosen, tokens[:, 1:])), dim=1)
        tokens = tokens + self.decoder_pos_embed
        tokens = self._through(self.decoder_blocks, tokens)
        predicted: Tensor = self.decoder_pred(self.decoder_norm(tokens))
        return predicted[:, 1:]

    def forward(self, patches: Tensor, mask: Mask | None = None) -> Tensor:
        """Predicted patches (N, L, D) for patches (N, L, D) in normalised space."""
        return self.decode(self.encode(patches, mask), mask)
