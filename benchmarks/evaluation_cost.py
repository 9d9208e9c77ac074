"""What an evaluation costs: processor time, images through the classifier, and how wide its intervals are.

    python benchmarks/evaluation_cost.py DENOISER CLASSIFIER ATTACK [--images N] [--score-draws R] [--sigmas S S]

It measures the `denim` that is imported, so that the same file measures an earlier one beside this one: everything it
calls has been there since the first. Models are folders that `denim pretrain` and `denim finetune` have written; the
images are digits. Take one thread (`OMP_NUM_THREADS=1`), since processor time is counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from denim.defense import De3, EvaluationSettings, evaluate
from denim.nim import Autoencoder, Classifier
from denim.nim.data import EvalView, Subset, TorchLoader, open_source


def _counted(classifier: Classifier) -> dict[str, int]:
    """Images and passes through a classifier from now on, with and without gradients of the pixels."""
    seen = {f"{what} {kind}": 0 for kind in ("with gradients", "without") for what in ("images", "passes")}

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        kind = "with gradients" if given[0].requires_grad else "without"
        seen[f"images {kind}"] += len(given[0])
        seen[f"passes {kind}"] += 1

    classifier.blocks[0].register_forward_pre_hook(count)
    return seen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run an evaluation in a folder that is removed, and print its cost as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("denoiser", type=Path)
    parser.add_argument("classifier", type=Path)
    parser.add_argument("attacks", nargs="+")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--score-draws", default="20")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.0, 35.0, 70.0, 105.0, 140.0])
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    denoiser = Autoencoder.from_pretrained(given.denoiser).requires_grad_(False)
    classifier = Classifier.from_pretrained(given.classifier).requires_grad_(False)
    rows = {"off": De3(None, classifier, None)}
    rows |= {f"sigma {sigma:g}": De3(denoiser, classifier, sigma) for sigma in given.sigmas}
    source = Subset(open_source("digits", "test"), given.images)
    loader = TorchLoader(source, EvalView(classifier.config.img_size[0]), len(source), shuffle=False)
    draws: Any = int(given.score_draws) if given.score_draws.isdigit() else given.score_draws
    settings = EvaluationSettings(tuple(given.attacks), score_draws=draws, examples=0, health_images=0)
    seen = _counted(classifier)
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        done = evaluate(rows, loader, settings, Path(folder), console=Console(quiet=True))
        seconds = time.process_time() - started
    cells = {f"{cell.defense} | {cell.attack}": cell.scores for cell in done.cells}
    report = {
        "images": len(source),
        "threads": torch.get_num_threads(),
        "score draws": next(iter(cells.values())).score_draws,
        "seconds": round(seconds, 2),
        **seen,
        "mean": {name: round(scores.mean.value, 4) for name, scores in cells.items()},
        "half-width": {name: round((s.mean.high - s.mean.low) / 2, 4) for name, s in cells.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
