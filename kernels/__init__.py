"""Fused operations on tensors: noise, patches, losses, attack steps, attention, lean linear layers.

Importing this package registers the operators `torch.ops.denim.*`. It loads nothing but torch: Triton and xformers are
imported at the first call that needs them.
"""

from denim.kernels.attack_step import attack_start, attack_step
from denim.kernels.attention import attention, attention_backends, attention_kernel
from denim.kernels.decode_patches import decode_patches
from denim.kernels.gelu_linear import gelu_linear
from denim.kernels.noise import Stream, noise_words, normal_noise, uniform_noise
from denim.kernels.noise_patchify import noise_patchify, normalized_patches
from denim.kernels.norm_linear import norm_linear
from denim.kernels.patch_loss import patch_loss
from denim.kernels.patches import check_pixels
from denim.kernels.seeds import Domain, derive_seeds, draw_seeds

__all__ = [
    "Domain",
    "Stream",
    "attack_start",
    "attack_step",
    "attention",
    "attention_backends",
    "attention_kernel",
    "check_pixels",
    "decode_patches",
    "derive_seeds",
    "draw_seeds",
    "gelu_linear",
    "noise_patchify",
    "noise_words",
    "norm_linear",
    "normal_noise",
    "normalized_patches",
    "patch_loss",
    "uniform_noise",
]
