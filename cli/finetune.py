"""`denim finetune`."""

from __future__ import annotations

from typing import Annotated

import tyro

from denim.nim import FinetuneConfig, LinearProbeConfig

SETTINGS = FinetuneConfig  # what `--resume RUN` takes from the run
RECIPES = {"--linear-probe": LinearProbeConfig}  # options that choose other settings, with other defaults


def main(config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]) -> None:
    """Fine-tune a classifier. The defaults are the published recipe for ViT-B."""
    from denim.nim.files import read_json
    from denim.nim.finetuning import finetune
    from denim.nim.progress import measured_texts
    from denim.nim.ranks import is_first_process
    from denim.nim.run import RESULT_FILE
    from denim.nim.text import printable

    finetune(config)
    if not is_first_process():
        return
    file = config.out / RESULT_FILE
    if file.exists():
        result = read_json(file, {"source": str, "images": int, "accuracy": float})
        name, images = printable(result["source"]), result["images"]
        print(f"accuracy on clean images of {name}, undefended: {100 * result['accuracy']:.2f} % of {images}")
        defended = {level: text for level, text in measured_texts(result).items() if level != "accuracy"}
        if defended:
            worth = ", ".join(f"{text} at {level}" for level, text in defended.items())
            print(f"defended: {worth}, of {result['eval_images']} of them")
    else:
        print("no accuracy is stated: all images were trained on")
    print(f"the classifier is in {printable(config.out / 'model')}")
