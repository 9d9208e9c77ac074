"""Pretrain a denoiser on a folder of images, and denoise one of them.

    python examples/pretrain_on_a_folder.py photos/ --out runs/photos --preset tiny --epochs 100

`photos/` holds images, or one folder of images for each class. A run that was stopped continues when the same command
is started again, and reaches the same weights. `denim pretrain` is the same function with every option.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

from denim.kernels import Domain, derive_seeds
from denim.nim import PretrainConfig, add_noise, pretrain, reconstruct
from denim.nim.data import EvalView, TorchLoader, open_source

parser = argparse.ArgumentParser(description="Pretrain a denoiser on a folder of images")
parser.add_argument("folder", type=Path)
parser.add_argument("--out", type=Path, default=Path("runs/photos"))
parser.add_argument("--preset", default="tiny", help="micro, mini, tiny, small, base, large or huge")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--sigma", type=float, default=70.0, help="noise level of the picture, 0-255 pixel levels")
args = parser.parse_args()

model = pretrain(
    PretrainConfig(
        out=args.out,
        data=str(args.folder),
        preset=args.preset,
        target="raw",  # pixels; the published "norm" is each patch without its own mean and variance
        sigma="uniform:0,150",  # one level for each image, so that one model serves every sigma up to 150
        channels=3,
        epochs=args.epochs,
        warmup_epochs=args.epochs / 10,
        batch_size=args.batch,
        resume=True,
    )
)

source = open_source(args.folder, "train", channels=3, labelled=False)
side = model.config.grid_size[0] * model.config.patch_size
batch = next(iter(TorchLoader(source, EvalView(side), batch_size=1, shuffle=False).epoch(0)))
sigma, seeds = torch.tensor([args.sigma]), derive_seeds(0, Domain.DEFENSE, batch.ids)
with torch.no_grad():
    model.cpu()
    noisy = add_noise(batch.images, sigma, seeds).clamp(0, 1)
    denoised = reconstruct(model, batch.images, sigma, seeds)
to_pil_image(torch.cat((noisy[0], denoised[0]), dim=-1)).save(args.out / "denoised.png")
print(f"the denoiser is in {args.out / 'model'}, a noisy and a denoised picture in {args.out / 'denoised.png'}")
