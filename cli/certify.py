"""`denim certify`."""

from __future__ import annotations

from pathlib import Path


def main(
    classifier: str | None = None,
    denoiser: str | None = None,
    model: str | None = None,
    weights: Path | None = None,
    out: Path = Path("runs/certification"),
    data: str = "digits",
    split: str = "test",
    val_split: float | None = None,
    val_seed: int = 0,
    num_images: int = 500,
    sigmas: tuple[float, ...] = (63.75, 127.5),
    draws: int = 10_000,
    selection_draws: int = 100,
    alpha: float = 0.001,
    radii: tuple[float, ...] = (),
    tolerance: float | None = None,
    degrade: str = "noise",
    mask_ratio: float = 0.75,
    statistics: str = "input",
    max_batch: int = 256,
    loader: str = "auto",
    workers: int | None = None,
    max_bad: float = 0.01,
    img_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool | None = None,
) -> None:
    """Certify a defense by randomized smoothing: no change within an L2 radius changes the vote over its noise.

    The same command goes on where an earlier one stopped; other options compute what is new, and keep the rest.

    Args:
        classifier: The classifier: folder of a model or a run, name of a model that ships with Denim, or owner/name on
            the Hugging Face hub.
        denoiser: The denoiser, likewise; without it, the classifier gets the noisy images.
        model: A classifier that is not Denim's, in place of --classifier: package.module:factory, a function or class
            that is called without arguments and gives a module from pixels in [0, 1] to logits; or timm:NAME.
        weights: A .pt or .safetensors file for --model.
        out: Folder that gets the certification.
        data: Images to certify: digits, cifar10, cifar100 or a folder.
        split: Split of the data, such as train or test.
        val_split: Share of the split train, such as 0.1: take the images that a training with the same --val-split has
            held out, in place of a split.
        val_seed: Seed of that training.
        num_images: Number of images, a random choice that depends on the seed alone; 0 takes all.
        sigmas: Noise levels, standard deviations in 0-255 pixel levels; 63.75 and 127.5 are 0.25 and 0.5 of the
            literature.
        draws: Draws of noise that estimate the probability of the top class, at most.
        selection_draws: Draws of noise before them, which choose the top class.
        alpha: Chance that a certificate is false.
        radii: L2 radii in [0, 1] units; each image is drawn until it is certified or given up at each of them.
        tolerance: Draw each image until its radius would grow by at most this, in [0, 1] units. Without radii and
            tolerance each image has all draws.
        degrade: How images are degraded before the denoiser: noise or both, which also hides patches.
        mask_ratio: Share of hidden patches with --degrade both.
        statistics: Image that gives the patch means and standard deviations of a reconstruction. A denoiser with target
            norm can be certified with noisy alone; one with target raw needs none.
        max_batch: Images per forward pass; a smaller number takes less memory.
        loader: Loader of the images: dali, torch, or auto for the first of these that can serve.
        workers: Processes (torch) or threads (DALI) that decode images. Without it, as many as help: at most the
            processors, and none for small data.
        max_bad: Largest share of images that may be unreadable; they are not counted, and above it the command stops.
        img_size: Side of the images that the models get; by default that of the classifier, or of timm's model.
        seed: Seed of the certification.
        device: Device to compute on: auto (a GPU where there is one) or a torch device such as cpu or cuda:0.
        precision: Precision of the networks: fp32, tf32, bf16, or auto for bf16 where a GPU has it, else fp32.
        compile: Compile each transformer block of Denim's models; by default on a GPU.
    """
    from torch import nn

    from denim.cli.images import open_batches, open_images
    from denim.cli.memory import keep_freed_memory
    from denim.defense import CertificationSettings, De3, certify, print_certification, write_certification
    from denim.defense.certificates import check_certifiable
    from denim.defense.targets import input_size, open_target
    from denim.nim import Autoencoder, Classifier
    from denim.nim.data import Subset
    from denim.nim.ranks import joined
    from denim.nim.settings import pick_device
    from denim.nim.text import open_console, printable

    if num_images < 0:
        raise ValueError(f"num_images must not be negative, and 0 takes all, got {num_images}")
    if (classifier is None) == (model is None):
        raise ValueError("give either --classifier, or --model package.module:factory or timm:NAME")
    if weights is not None and model is None:
        raise ValueError("--weights are those of a --model")
    settings = CertificationSettings(
        sigmas, draws, selection_draws, alpha, radii, tolerance, seed, max_batch, precision, compile
    )
    where = pick_device(device)
    if where.type == "cpu":
        keep_freed_memory()
    smoothed: nn.Module = open_target(model, weights) if model else Classifier.from_pretrained(str(classifier))
    rebuild = None if denoiser is None else Autoencoder.from_pretrained(denoiser).requires_grad_(False)
    defense = De3(
        rebuild,
        smoothed,
        sigmas[0],
        degrade=degrade,
        mask_ratio=mask_ratio,
        statistics=statistics,
        seed=seed,
    ).to(where)
    check_certifiable(defense)
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] | int | None = None
    channels, side = input_size(smoothed)
    if isinstance(smoothed, Classifier):
        channels, side, names = len(smoothed.config.mean), smoothed.config.img_size[0], smoothed.config.classes
        classes = names or smoothed.config.num_classes
    side = img_size or side or (None if rebuild is None else rebuild.config.img_size[0])
    if side is None:
        raise ValueError(f"{model} does not say what size of images it takes: give --img-size")
    # The end of the slowest process may be hours after that of the first.
    with joined(where, timeout=30 * 86400) as ranks:
        console = open_console(quiet=not ranks.is_first)
        with ranks.in_turn():
            source, _ = open_images(data, split, val_split, val_seed, channels, classes, max_bad, console)
        chosen = Subset(source, num_images, seed) if 0 < num_images < len(source) else source
        batches = open_batches(chosen, side, ranks, where, workers=workers, backend=loader, max_bad=max_bad)
        certification = certify(defense, batches, settings, out, classes=names, console=console, ranks=ranks)
        if not ranks.is_first:
            return
        picture = write_certification(certification, out)
        print_certification(certification, console)
        console.print(f"precision: {certification.settings.precision} on {where}")
        console.print(f"curve: {printable(picture)}", soft_wrap=True)
