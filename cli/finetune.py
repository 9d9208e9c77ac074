"""`denim finetune`."""

from __future__ import annotations

from typing import Annotated

import tyro

from denim.nim import FinetuneConfig


def main(config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune a classifier. The defaults are the published recipe for ViT-B."""
    from denim.nim.data import open_source
    from denim.nim.finetuning import accuracy, finetune

    model = finetune(config)
    source = open_source(config.data, "test", len(model.config.mean), max_bad=config.max_bad)
    share = accuracy(model, source, backend=config.loader, workers=config.workers, max_bad=config.max_bad)
    print(f"accuracy on clean test images, undefended: {100 * share:.2f} % of {len(source)}")
    print(f"the classifier is in {config.out / 'model'}")
