"""`denim pretrain`."""

from __future__ import annotations

from typing import Annotated

import tyro

from denim.nim import PretrainConfig

SETTINGS = PretrainConfig  # what `--resume RUN` takes from the run


def main(config: Annotated[PretrainConfig, tyro.conf.arg(name="")]) -> None:
    """Pretrain a denoiser. The defaults are the published recipe for ViT-B."""
    from denim.nim import pretrain
    from denim.nim.files import read_json
    from denim.nim.progress import measured_texts
    from denim.nim.ranks import is_first_process
    from denim.nim.run import RESULT_FILE
    from denim.nim.text import printable

    pretrain(config)
    if is_first_process():
        if (file := config.out / RESULT_FILE).exists():
            result = read_json(file, {"source": str, "eval_images": int})
            worth = ", ".join(f"{text} at {name}" for name, text in measured_texts(result).items())
            print(f"PSNR of {result['eval_images']} denoised images of {printable(result['source'])}: {worth}")
        print(f"the denoiser is in {printable(config.out / 'model')}")
