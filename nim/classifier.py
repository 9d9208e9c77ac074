"""The classifier: a plain timm ViT that takes pixels in [0, 1] and normalises them inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denim.kernels.linear import computing_dtype
from denim.nim.attention import Attention
from denim.nim.autoencoder import IMAGENET_MEAN, IMAGENET_STD, AutoencoderConfig, check_architecture
from denim.nim.block import Block, Mlp
from denim.nim.checkpoint import Pretrained, as_numbers, first_words
from denim.nim.drop_path import draw_drop_path, key_drop_path

__all__ = ["Classifier", "ClassifierConfig", "check_logits"]


@dataclass(frozen=True)
class ClassifierConfig:
    """Architecture of a classifier, its pixel statistics, and what it was fine-tuned on.

    Attributes:
        num_classes: number of logits.
        img_size: (H, W) in pixels.
        patch_size, embed_dim, depth, num_heads: of the ViT.
        mean, std: per-channel statistics in [0, 1] units; their length is the number of channels.
        global_pool: "avg" (mean over patch tokens, LayerNorm after it, as published) or "token" (class token).
        drop_path: rate of stochastic depth in training, of the last block; it grows linearly from 0 in the first.
        classes: names of the classes, may be empty.
        trained_on: what it was fine-tuned on: "clean" images, "noisy" ones that no denoiser rebuilt, or rebuilt ones
            by degradation and statistics, such as "noise, raw target" (see `De3.case`).
        norm_eps: eps of every LayerNorm.
    """

    num_classes: int = 1000
    img_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    global_pool: Literal["avg", "token"] = "avg"
    drop_path: float = 0.0
    classes: tuple[str, ...] = ()
    trained_on: str = "clean"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_architecture(self, "num_classes")
        object.__setattr__(self, "classes", tuple(self.classes))  # JSON has lists
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")
        if self.global_pool not in ("avg", "token"):
            raise ValueError(f"global_pool must be avg or token, got {self.global_pool!r}")
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} class names for {self.num_classes} classes")

    @classmethod
    def for_encoder(cls, encoder: AutoencoderConfig, num_classes: int, **other: Any) -> ClassifierConfig:
        """The configuration of a classifier whose body is the encoder of an autoencoder.

        Args:
            encoder: the autoencoder's configuration.
            num_classes: number of logits.
            other: further entries of `ClassifierConfig`.
        """
        shared = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mean", "std", "norm_eps")
        return cls(num_classes, **{name: getattr(encoder, name) for name in shared}, **other)


class PatchEmbed(TimmPatchEmbed):
    """timm's patch embedding, for images (B, C, H, W) or their patches (B, L, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, embed_dim) for normalised images (B, C, H, W) or their patches (B, L, D)."""
        if x.dim() == 4:
            tokens: Tensor = super().forward(x)
            return tokens
        # The convolution's weight is (embed_dim, channel, row, column), a patch vector (row, column, channel).
        return F.linear(x, self.proj.weight.permute(0, 2, 3, 1).flatten(1), self.proj.bias)


class Classifier(Pretrained, VisionTransformer):
    """A timm `VisionTransformer` from pixels (B, C, H, W) in [0, 1] to logits (B, K).

    Its state dict has timm's names and nothing else, so it goes into `timm.create_model` and back unchanged. Its drop
    path is a function of seeds: in training mode, a classifier with drop path takes them beside the images.
    """

    config_class: ClassVar[type[Any]] = ClassifierConfig
    part: ClassVar[str] = "classifier"
    head: nn.Linear
    mean: Tensor
    std: Tensor
    drop_thresholds: Tensor
    drop_kept: Tensor

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(
            img_size=config.img_size,
            patch_size=config.patch_size,
            in_chans=len(config.mean),
            num_classes=config.num_classes,
            global_pool=config.global_pool,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            drop_path_rate=config.drop_path,
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            embed_layer=PatchEmbed,
            attn_layer=Attention,
            block_fn=Block,
            mlp_layer=Mlp,
        )
        self.config = config
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.tensor(config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(-1, 1, 1), persistent=False)
        self._drop_paths = key_drop_path(self)
        rates = torch.tensor([layer.rate for layer in self._drop_paths], dtype=torch.float64)
        self.register_buffer("drop_thresholds", (rates * 2**32).round().long(), persistent=False)
        self.register_buffer("drop_kept", (1 / (1 - rates)).float(), persistent=False)

    def forward(self, pixels: Tensor, seeds: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits (B, K) for pixels (B, C, H, W) in [0, 1].

        Args:
            pixels: (B, C, H, W).
            seeds: int64 (B,), of drop path; without effect in evaluation mode and without drop path. A sample drops the
                same paths in every batch. With checkpointing of activations the backward pass must come before the next
                forward pass, unless that has the same seeds.

        Raises:
            ValueError: in training mode, a classifier with drop path has no seeds, or not one for each sample.
        """
        self._draw_drop_path(seeds, len(pixels))
        logits: Tensor = super().forward((pixels - self.mean) / self.std)
        return logits

    def forward_patches(self, patches: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Logits (B, K) for patches (B, L, D) in (row, column, channel) order, normalised with `config.mean` and std.

        The logits are those of `forward` on the same images. `decode_patches` and `normalized_patches` return such
        patches. Forward hooks of this module, and of the convolution in its `patch_embed`, are not called.

        Args:
            patches: of dtype `patch_dtype`.
            seeds: see `forward`.

        Raises:
            ValueError: patches of another number or size than the config's; and see `forward`.
        """
        config: ClassifierConfig = self.config
        (height, width), area = config.img_size, config.patch_size**2
        expected = (height * width // area, area * len(config.mean))
        if patches.dim() != 3 or tuple(patches.shape[1:]) != expected:
            raise ValueError(f"patches must have shape (B, {expected[0]}, {expected[1]}), got {tuple(patches.shape)}")
        self._draw_drop_path(seeds, len(patches))
        logits: Tensor = super().forward(patches)
        return logits

    def _draw_drop_path(self, seeds: Tensor | None, batch: int) -> None:
        if not (self.training and self._drop_paths):
            return
        if seeds is None:
            raise ValueError(
                "training with drop path needs seeds: call the classifier with those of denim.kernels.derive_seeds, "
                "int64 (B,), or build it with drop_path=0"
            )
        if seeds.shape != (batch,):
            raise ValueError(f"drop path needs one seed for each of {batch} samples, got shape {tuple(seeds.shape)}")
        draw_drop_path(self._drop_paths, self.drop_thresholds, self.drop_kept, seeds)

    @property
    def patch_dtype(self) -> torch.dtype:
        """dtype in which the embedding multiplies patches: that of its weight, or autocast's where autocast is on."""
        return computing_dtype(self.patch_embed.proj.weight)

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Take the encoder's weights, by name, from the state dict of an autoencoder, a classifier or a plain timm ViT.

        The final norm comes along only for the pooling that has it ("token"); the published "avg" starts a new one.

        Raises:
            ValueError: a weight is missing, has another shape, or belongs to a part that this classifier does not have
                (registers, layer scale, more blocks, ...), or is not finite; nothing has been changed then.
        """
        own = self.state_dict()
        wanted = [name for name in own if not name.startswith(("head.", "fc_norm."))]
        missing = [name for name in wanted if name not in state]
        if missing:
            raise ValueError(f"no encoder for this classifier: {len(missing)} weights missing, first {missing[:3]}")
        left = ("head.", "fc_norm.", "norm.", "decoder_", "mask_token")
        unknown = [name for name in state if name not in own and not name.startswith(left)]
        if unknown:
            raise ValueError(f"encoder of another architecture: {len(unknown)} weights unknown, first {unknown[:3]}")
        for name in wanted:
            if state[name].shape != own[name].shape:
                raise ValueError(
                    f"encoder of another architecture: {name} has shape {tuple(state[name].shape)}, "
                    f"expected {tuple(own[name].shape)}"
                )
        weights = as_numbers({name: state[name] for name in wanted}, own, "the encoder")
        self.load_state_dict(weights, strict=False)


def check_logits(logits: Tensor, ids: Tensor) -> None:
    """Refuse logits that would be scored as an answer, and are none.

    Args:
        logits: (..., B, K).
        ids: int64 (B,), sample ids, for the message.

    Raises:
        FloatingPointError: an image has a logit that is NaN or infinite.
    """
    finite = logits.isfinite().all(dim=-1)
    while finite.dim() > 1:
        finite = finite.all(dim=0)
    if not finite.all():
        broken = [str(number) for number in ids[(~finite).to(ids.device)].tolist()]
        raise FloatingPointError(
            f"the logits of {len(broken)} of {len(ids)} images are not finite (sample ids {first_words(broken)}): "
            "the weights of a model, or numbers within it, have overflowed"
        )
