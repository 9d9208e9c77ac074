"""L2 attacks inside certified radii: `python -m denim.benchmarks.certified_attacks --certification RUN ...`.

Each certified image of a `denim certify` is attacked as far as its own radius allows, through the noise, and the vote
is taken again over fresh draws. Certificates say that it has not changed, but for a share of at most alpha. The same
attack with a multiple of the radius shows that it is strong enough to find something.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from denim.defense import Attack, De3
from denim.defense.images import pixels_of
from denim.kernels import Domain
from denim.nim import Autoencoder, Classifier
from denim.nim.data import EvalView, Subset, open_loader, open_source
from denim.nim.precision import precise
from denim.nim.settings import pick_device
from denim.nim.text import open_console

__all__ = ["attacked_votes", "main"]


def attacked_votes(
    defense: De3,
    pixels: Tensor,
    predictions: Sequence[int],
    radii: Sequence[float],
    ids: Sequence[int],
    *,
    steps: int = 20,
    eot: int = 8,
    draws: int = 1000,
    max_batch: int = 256,
) -> npt.NDArray[np.int64]:
    """Votes on attacked images, int64 (N,).

    Args:
        defense: De3 of one draw per call.
        pixels: (N, C, H, W) in [0, 1].
        predictions: N classes, which the attack (PGD in L2) leads away from.
        radii: N L2 radii in [0, 1] units, for each image its own.
        ids: N sample ids, which key the draws.
        steps: of the attack.
        eot: draws of noise behind each of its gradients.
        draws: fresh draws of the vote.
        max_batch: images that go through the networks in one pass.
    """
    assert defense.sigma is not None
    votes = []
    for row, (prediction, radius, sample) in enumerate(zip(predictions, radii, ids, strict=True)):
        image, label = pixels[row : row + 1], torch.tensor([prediction], device=pixels.device)
        number = torch.tensor([sample], device=pixels.device)
        attack = Attack.parse(f"pgd:{radius:.9f},norm=l2,steps={steps},eot={eot},full")
        attacked = attack.run(defense, image, label, number, 0, max_batch=max_batch).pixels
        seeds = defense.seeds(0, Domain.SCORE, number, draws)
        answers = defense.sweep(attacked, [defense.sigma], draws, seeds=seeds, max_batch=max_batch).argmax(dim=-1)
        votes.append(int(answers.flatten().mode().values))
    return np.array(votes, dtype=np.int64)


def main(
    certification: Path,
    classifier: str,
    denoiser: str | None = None,
    data: str = "digits",
    split: str = "test",
    factors: tuple[float, ...] = (1.0, 2.0, 4.0),
    num_images: int = 100,
    degrade: str = "noise",
    mask_ratio: float = 0.75,
    statistics: str = "input",
    steps: int = 20,
    eot: int = 8,
    draws: int = 1000,
    max_batch: int = 256,
    device: str = "auto",
) -> None:
    """Print how many certified votes an attack changes inside multiples of their radii.

    Args:
        certification: folder of a `denim certify` of the same models and data.
        classifier: as of `denim certify`; so are denoiser, data, split, degrade, mask_ratio, statistics and device.
        factors: multiples of the certified radius.
        num_images: images that are attacked at each level, at most.
        steps: of the attack.
        eot: draws of noise behind each gradient.
        draws: fresh draws of the vote.
        max_batch: images per forward pass.
    """
    where, console = pick_device(device), open_console()
    with (certification / "certificates.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    settings = json.loads((certification / "results.json").read_text(encoding="utf-8"))["settings"]
    model = Classifier.from_pretrained(classifier).to(where)
    rebuild = None if denoiser is None else Autoencoder.from_pretrained(denoiser).requires_grad_(False).to(where)
    config = model.config
    source = open_source(data, split, len(config.mean), classes=config.classes or config.num_classes)
    count = len({row["id"] for row in rows})
    chosen = Subset(source, count, settings["seed"]) if count < len(source) else source
    loader = open_loader(chosen, EvalView(config.img_size[0]), count, shuffle=False, last="keep", device=where)
    batch = next(iter(loader.epoch(0)))
    images = dict(zip(batch.ids.tolist(), pixels_of(batch, where), strict=True))
    console.print("| sigma | radius, times the certified one | attacked | votes changed |\n|---|---|---|---|")
    for sigma in dict.fromkeys(row["sigma"] for row in rows):
        certified = [row for row in rows if row["sigma"] == sigma and float(row["radius"]) > 0][:num_images]
        options = {"degrade": degrade, "mask_ratio": mask_ratio, "statistics": statistics}
        defense = De3(rebuild, model, float(sigma), **options).eval().to(where)  # type: ignore[arg-type]
        for factor in factors:
            changed = 0
            for row in track(certified, console=open_console(stderr=True), description=f"sigma {sigma}, {factor:g} x"):
                prediction, sample = int(row["prediction"]), int(row["id"])
                # The theorem is about changes that are smaller than the radius.
                radius = factor * float(row["radius"]) * (1 - 1e-4)
                # What is certified is the vote of the networks in this precision.
                with precise(settings["precision"], where):
                    (vote,) = attacked_votes(
                        defense,
                        images[sample][None],
                        [prediction],
                        [radius],
                        [sample],
                        steps=steps,
                        eot=eot,
                        draws=draws,
                        max_batch=max_batch,
                    )
                changed += int(vote != prediction)
            console.print(f"| {float(sigma):g} | {factor:g} | {len(certified)} | {changed} |")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
