"""`denim denoise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

SIDE = 256  # of a picture, where the photo and the denoiser allow it


def main(
    photo: Annotated[Path, tyro.conf.Positional],
    sigma: tuple[float, ...] = (70.0, 140.0),
    denoiser: str = "cifar10-tiny",
    out: Path | None = None,
    side: int | None = None,
    statistics: str = "input",
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
) -> None:
    """Write a picture of a photo at every noise level: clean, with noise, and denoised.

    Args:
        photo: Image file; its centre is cut out.
        sigma: Noise levels, standard deviations in 0-255 pixel levels.
        denoiser: The denoiser: folder of a model or a run, name of a model that ships with Denim, or owner/name on the
            Hugging Face hub. That which ships, cifar10-tiny, has learnt from photos of 32 x 32.
        out: File of the picture, a PNG; without it, PHOTO-denoised.png in the current folder.
        side: Side of the picture in pixels, to which the shorter side of the photo is resized. What is larger than the
            images of the denoiser is rebuilt in tiles that overlap. Without it 256, or the photo's shorter side if that
            is less; but the size of the denoiser's images if that is more, and for a denoiser with target norm, which
            takes no other.
        statistics: Image that gives the patch means and standard deviations of the reconstruction: input or noisy. A
            denoiser with target raw needs none.
        seed: Seed of the noise.
        device: Device to compute on: auto (a GPU where there is one) or a torch device such as cpu or cuda:0.
        precision: Precision of the denoiser: fp32, tf32, bf16, or auto for bf16 where a GPU has it, else fp32. The
            picture says which, unless it is fp32.
    """
    import torch
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from denim.kernels import Domain, draw_seeds
    from denim.nim import Autoencoder, add_noise, reconstruct
    from denim.nim.data import EvalView, sample_rng
    from denim.nim.data.decode import read_image
    from denim.nim.files import atomic_write
    from denim.nim.precision import precise, resolve_precision
    from denim.nim.settings import pick_device
    from denim.nim.sigma import MAX_SIGMA, is_level, warn_of_unit_sigma
    from denim.nim.text import printable
    from denim.nim.tiles import denoise_tiles

    if not sigma or not all(map(is_level, sigma)):
        raise ValueError(
            f"sigma takes finite noise levels of 0-255 pixel levels, 0 or more, at most {MAX_SIGMA:g}, got {sigma}"
        )
    for level in sigma:
        warn_of_unit_sigma(level)
    where = pick_device(device)
    resolve_precision(precision, where)
    model = Autoencoder.from_pretrained(denoiser).to(where)
    if model.config.channels not in (1, 3):
        raise ValueError(f"photos have 1 or 3 channels, this denoiser takes {model.config.channels}")
    image = read_image(photo, model.config.channels)
    own = model.config.img_size[0]
    if side is None:
        side = own if model.config.target == "norm" else max(own, min(SIDE, *image.size))
    if side < own or (side > own and model.config.target == "norm"):
        least = "exactly" if model.config.target == "norm" else "at least"
        raise ValueError(f"--side must be {least} {own}, the size of the denoiser's images, got {side}")
    pixels = EvalView(side)(image, sample_rng(seed, 0, 0))
    images = torch.tensor(pixels)[None].to(where)
    levels = torch.tensor(sigma, device=where)[:, None]
    seeds = draw_seeds(seed, Domain.DEFENSE, torch.zeros(1, dtype=torch.int64, device=where), 1)[0]
    with torch.no_grad(), precise(precision, where) as computed:
        noisy = add_noise(images, levels, seeds)[:, 0]
        if side == own:
            rebuilt = reconstruct(model, images, levels, seeds, statistics=statistics)[:, 0]
        else:
            rebuilt = torch.stack([denoise_tiles(model, picture) for picture in noisy])
        noisy = noisy.clamp(0, 1)

    figure = Figure(figsize=(2.2 * (1 + len(sigma)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1 + len(sigma), squeeze=False)
    clean = images[0].permute(2, 0, 1).float() / 255
    pictures = [[clean, *noisy], [None, *rebuilt]]
    denoised = "denoised" if computed == "fp32" else f"denoised ({computed})"
    titles = [["clean", *(f"sigma {level:g}" for level in sigma)], ["", *(denoised for _ in sigma)]]
    for row in range(2):
        for axis, picture, title in zip(axes[row], pictures[row], titles[row], strict=True):
            axis.set_axis_off()
            axis.set_title(title, fontsize=10)
            if picture is not None:
                axis.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(force=True), cmap="gray", vmin=0, vmax=1)
    target = out or Path(f"{photo.stem}-denoised.png")
    with atomic_write(target) as staged:
        figure.savefig(staged, format="png", dpi=150)
    print(printable(target))
