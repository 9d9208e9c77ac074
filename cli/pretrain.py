"""`denim pretrain`."""

from __future__ import annotations

from typing import Annotated

import tyro

from denim.nim import PretrainConfig

SETTINGS = PretrainConfig  # what `--resume RUN` takes from the run


def main(config: Annotated[PretrainConfig, tyro.conf.arg(name="")]) -> None:
    """Pretrain a denoiser. The defaults are the published recipe for ViT-B."""
    from denim.nim import pretrain
    from denim.nim.ranks import is_first_process
    from denim.nim.text import printable

    pretrain(config)
    if is_first_process():
        print(f"the denoiser is in {printable(config.out / 'model')}")
