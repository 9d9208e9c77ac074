"""Denoise patches with a model of your own: `noise_patchify` makes its input, `patch_loss` is its loss.

    python examples/noise_patchify_in_your_model.py --steps 300

The model is a small residual MLP that sees one patch at a time. The data are scikit-learn's digits. The operators also
work under torch.compile (fullgraph=True), and on CUDA they run as Triton kernels.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from denim.kernels import Domain, derive_seeds, noise_patchify, patch_loss

PATCHES = {"patch_size": 2, "mean": (0.5,), "std": (0.25,)}  # the statistics have one entry for each channel


class PatchDenoiser(nn.Module):
    """Noisy patches (B, L, D) to clean patches (B, L, D)."""

    def __init__(self, size: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))

    def forward(self, patches: Tensor) -> Tensor:
        """Noisy patch plus a learned correction."""
        return patches + self.layers(patches)


parser = argparse.ArgumentParser(description="Noisy patches in a model of your own")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--sigma", type=float, default=50.0, help="noise level in 0-255 pixel levels")
args = parser.parse_args()

digits = torch.from_numpy(load_digits().images / 16).float().unsqueeze(1)  # (1797, 1, 8, 8), pixels in [0, 1]
torch.manual_seed(0)
model = PatchDenoiser(size=PATCHES["patch_size"] ** 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(args.steps):
    ids = torch.randint(len(digits), (args.batch,))
    images, sigma = digits[ids], torch.full((args.batch,), args.sigma)
    # A pure function of (run seed, sample, step): the same noise on every device and in every batch.
    seeds = derive_seeds(0, Domain.TRAINING, ids, step)
    patches = noise_patchify(images, sigma, seeds, **PATCHES)
    loss = patch_loss(model(patches), images, norm_pix=False, **PATCHES)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 0 or step == args.steps - 1:
        noisy = patch_loss(patches, images, norm_pix=False, **PATCHES)
        print(f"step {step}: squared error {loss.item():.3f}, of the noisy patches {noisy.item():.3f}")
