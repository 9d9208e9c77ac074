"""`denim evaluate`."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import Any, Literal


def main(
    classifier: str | None = None,
    denoiser: str | None = None,
    model: tuple[str, ...] = (),
    weights: tuple[Path, ...] = (),
    out: Path = Path("runs/evaluation"),
    data: str = "digits",
    split: str = "test",
    val_split: float | None = None,
    val_seed: int = 0,
    num_images: int = 512,
    sigmas: tuple[float, ...] = (0.0, 35.0, 70.0, 105.0, 140.0),
    frozen: float | None = 70.0,
    jpeg: tuple[int, ...] = (),
    noise_only: tuple[float, ...] = (),
    mask_ratios: tuple[float, ...] = (),
    degrade: str = "noise",
    statistics: str = "input",
    clean_classifier: str | None = None,
    attacks: tuple[str, ...] = (),
    score_draws: int | Literal["auto"] = 20,
    max_batch: int = 256,
    examples: int = 6,
    health_images: int = 16,
    loader: str = "auto",
    workers: int | None = None,
    max_bad: float = 0.01,
    img_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool | None = None,
    keep_attacked: bool = False,
) -> None:
    """Attack and score a defense at many noise levels, or any models, and write a table, a curve and a gallery.

    The same command goes on where an earlier one stopped; other options compute what is new, and keep the rest.

    Args:
        classifier: The fine-tuned classifier: folder of a model or a run, name of a model that ships with Denim, or
            owner/name on the Hugging Face hub.
        denoiser: The denoiser, likewise; without it, the defense is noise alone. Without --classifier, it stands before
            each --model.
        model: Further models, each a row: package.module:factory, a function or class that is called without arguments
            and gives a module from pixels in [0, 1] to logits; or timm:NAME. NAME=package.module:factory names the row.
        weights: A .pt or .safetensors file for each --model, in their order.
        out: Folder that gets the evaluation.
        data: Images to evaluate on: digits, cifar10, cifar100 or a folder.
        split: Split of the data, such as train or test.
        val_split: Share of the split train, such as 0.1: take the images that a training with the same --val-split has
            held out, in place of a split.
        val_seed: Seed of that training.
        num_images: Number of images, a random choice that depends on the seed alone; 0 takes all.
        sigmas: Noise levels of the defense, standard deviations in 0-255 pixel levels.
        frozen: Noise level, in 0-255 pixel levels, that is also evaluated with noise that is fixed and known to the
            attacker; None leaves that row out.
        jpeg: Qualities of JPEG, from 1 to 100, each a row with compression before the clean classifier, or else before
            the classifier or each --model. Attacks take its derivative for that of the identity (BPDA).
        noise_only: Noise levels, in 0-255 pixel levels, each a row with noise and no denoiser, before the classifier or
            else before each --model.
        mask_ratios: Shares of hidden patches that are evaluated in place of sigmas with --degrade mask.
        degrade: How images are degraded before the denoiser: noise, mask or both.
        statistics: Image that gives the patch means and standard deviations of a reconstruction: input or noisy. A
            denoiser with target raw needs none.
        clean_classifier: A classifier that was trained on clean images, likewise, for a reference row without defense.
        attacks: Attacks, such as fgsm:4/255 or pgd:4/255,steps=20,eot=20,restarts=1,gray, or package.module:Class for
            one of your own. Without it, fgsm:4/255 and pgd:4/255,steps=20,eot=20, and this also gray where every row
            is of the classifier.
        score_draws: Fresh draws of noise per image for the score; auto takes as few as the width of the intervals
            allows.
        max_batch: Images per forward pass; a smaller number takes less memory.
        examples: Images in the gallery.
        health_images: Images on which the attacks are checked: with any image allowed, more steps, more draws, without
            gradients, and more (see docs/method.md, health checks); 0 leaves the checks out.
        loader: Loader of the images: dali, torch, or auto for the first of these that can serve.
        workers: Processes (torch) or threads (DALI) that decode images. Without it, as many as help: at most the
            processors, and none for small data.
        max_bad: Largest share of images that may be unreadable; they are not counted, and above it the command stops.
        img_size: Side of the images that the models get; by default that of the classifier, or of timm's model.
        seed: Seed of the evaluation.
        device: Device to compute on: auto (a GPU where there is one) or a torch device such as cpu or cuda:0.
        precision: Precision of the networks, in attacks and scores: fp32, tf32, bf16, or auto for bf16 where a GPU has
            it, else fp32.
        compile: Compile each transformer block of Denim's models; by default on a GPU.
        keep_attacked: Keep all attacked images, in OUT/attacked.
    """
    from torch import nn

    from denim.cli.images import open_batches, open_images
    from denim.defense import De3, EvaluationSettings, HealthWarning, Jpeg, evaluate, print_table, write_report
    from denim.defense.targets import input_size, open_target
    from denim.nim import Autoencoder, Classifier
    from denim.nim.data import Subset
    from denim.nim.ranks import joined
    from denim.nim.settings import pick_device
    from denim.nim.text import open_console, printable

    if num_images < 0:
        raise ValueError(f"num_images must not be negative, and 0 takes all, got {num_images}")
    if classifier is None and not model:
        raise ValueError("nothing to evaluate: give --classifier, or --model package.module:factory or timm:NAME")
    if classifier is None and clean_classifier is not None:
        raise ValueError("--clean-classifier needs --classifier, which it is compared with")
    if weights and len(weights) != len(model):
        raise ValueError(f"--weights needs a file for each --model, got {len(weights)} for {len(model)}")
    if not attacks:
        attacks = ("fgsm:4/255", "pgd:4/255,steps=20,eot=20", *(() if model else ("pgd:4/255,steps=20,eot=20,gray",)))
    compressions = [Jpeg(quality) for quality in jpeg]
    warnings.simplefilter("ignore", HealthWarning)  # the table prints them
    where = pick_device(device)
    settings = EvaluationSettings(
        attacks, score_draws, seed, max_batch, examples, precision, compile, health_images, keep_attacked
    )
    defenses: dict[str, Any] = {}

    def add(name: str, row: Any) -> None:
        if name in defenses:
            raise ValueError(
                f"two rows have the name {name!r}: give each level and quality once, and a --model another name by "
                "NAME=package.module:factory"
            )
        defenses[name] = row.to(where) if isinstance(row, nn.Module) else row

    def add_defenses(before: str, subject: nn.Module, undefended: nn.Module) -> None:
        """The rows with something before a model, whose names begin with `before`."""
        if degrade == "mask" and rebuild is not None:
            for ratio in mask_ratios or (0.75,):
                masked = De3(rebuild, subject, 0.0, degrade="mask", mask_ratio=ratio, statistics=statistics, seed=seed)
                add(f"{before}mask {ratio:g}", masked)
        elif classifier is not None or rebuild is not None:
            for sigma in sigmas:
                defended = De3(rebuild, subject, sigma, degrade=degrade, statistics=statistics, seed=seed)
                add(f"{before}sigma {sigma:g}", defended)
            if frozen is not None:
                fixed = De3(rebuild, subject, frozen, degrade=degrade, statistics=statistics, seed=seed)
                add(f"{before}sigma {frozen:g} frozen", fixed.frozen(seed))
        for sigma in noise_only:
            add(f"{before}noise alone, sigma {sigma:g}", De3(None, subject, sigma, seed=seed))
        for compression in compressions:
            add(f"{before}JPEG {compression.quality}", nn.Sequential(compression, undefended).eval())

    rebuild = None if denoiser is None else Autoencoder.from_pretrained(denoiser).requires_grad_(False)
    own: Classifier | None = None
    if classifier is not None:
        own = Classifier.from_pretrained(classifier)
        undefended = own
        if clean_classifier is not None:
            undefended = Classifier.from_pretrained(clean_classifier)
            found, expected = undefended.config, own.config
            named = found.classes and expected.classes
            if found.num_classes != expected.num_classes or (named and named != found.classes):
                raise ValueError(
                    f"{clean_classifier} and {classifier} do not have the same classes under the same numbers: both "
                    "must be trained on the same class folders"
                )
            add("clean classifier", De3(None, undefended, None))
        add("defense off", De3(rebuild, own, None))
        add_defenses("", own, undefended)
    sizes = []
    for number, text in enumerate(model):
        name, _, spec = text.rpartition("=")
        target = open_target(spec, weights[number] if weights else None)
        add(name or spec, target)
        sizes.append(input_size(target))
        if classifier is None and (rebuild is not None or jpeg or noise_only):
            if not isinstance(target, nn.Module):
                raise ValueError(
                    f"{spec} gives a {type(target).__name__}, which is no module: --denoiser, --jpeg and --noise-only "
                    "stand before modules alone"
                )
            if rebuild is not None and sizes[-1][1] not in (None, rebuild.config.img_size[0]):
                raise ValueError(
                    f"{denoiser} takes images of side {rebuild.config.img_size[0]}, and {spec} of {sizes[-1][1]}: give "
                    "a package.module:factory whose model resizes what it gets"
                )
            add_defenses(f"{name or spec}, ", target, target)
    first = own or rebuild
    channels, side = (len(first.config.mean), first.config.img_size[0]) if first else sizes[0]
    side = img_size or side
    if side is None:
        raise ValueError(f"{model[0]} does not say what size of images it takes: give --img-size")
    # The end of the slowest process may be hours after that of the first.
    with joined(where, timeout=30 * 86400) as ranks:
        console = open_console(quiet=not ranks.is_first)
        with ranks.in_turn():
            classes = None if own is None else own.config.classes or own.config.num_classes
            source, measured = open_images(data, split, val_split, val_seed, channels, classes, max_bad, console)
        chosen = Subset(source, num_images, seed) if 0 < num_images < len(source) else source
        batches = open_batches(chosen, side, ranks, where, workers=workers, backend=loader, max_bad=max_bad)
        names = source.classes if own is None else own.config.classes
        evaluation = evaluate(defenses, batches, settings, out, classes=names, console=console, ranks=ranks)
        if not ranks.is_first:
            return
        title = "De3" if own else ", ".join(defenses)
        heading = f"{title} on {printable(source.name)}, {len(chosen)} images"
        words = shlex.join(["denim", *sys.argv[1:]])
        report = write_report(evaluation, out, title=heading, command=words, data=measured)
        print_table(evaluation, console)
        console.print(f"precision: {evaluation.settings.precision} on {where}")
        console.print(f"report: {printable(report)}", soft_wrap=True)
