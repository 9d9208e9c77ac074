"""`denim finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from denim.nim import FinetuneConfig

SETTINGS = FinetuneConfig  # what `--resume RUN` takes from the run


def main(config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune a classifier. The defaults are the published recipe for ViT-B."""
    from denim.nim.data import open_source
    from denim.nim.data.sources import splits
    from denim.nim.finetuning import accuracy, finetune
    from denim.nim.run import training_source
    from denim.nim.text import printable

    folder = Path(config.data).expanduser()
    found = splits(folder) if folder.is_dir() else []
    split = next((name for name in ("test", "val", "validation", "valid") if name in found), "test")
    # Opened before the training too: test images whose classes are not those of the training must not cost a run.
    classes = training_source(config, None, labelled=True).classes
    open_source(config.data, split, classes=classes, max_bad=config.max_bad)
    model = finetune(config)
    source = open_source(config.data, split, len(model.config.mean), classes=classes, max_bad=config.max_bad)
    share = accuracy(model, source, backend=config.loader, workers=config.workers, max_bad=config.max_bad)
    name = printable(source.name)
    print(f"accuracy on clean images of {name}, undefended: {100 * share:.2f} % of {len(source)}")
    print(f"the classifier is in {printable(config.out / 'model')}")
