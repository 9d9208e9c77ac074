"""Noisy image modeling: autoencoder, objectives, noise levels, data, pretraining, fine-tuning, checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# A name is imported with its module when it is first used (PEP 562): importing this package loads nothing.
_MODULES = {
    "PRESETS": "autoencoder",
    "Autoencoder": "autoencoder",
    "AutoencoderConfig": "autoencoder",
    "Mask": "autoencoder",
    "preset": "autoencoder",
    "CheckpointError": "checkpoint",
    "Classifier": "classifier",
    "ClassifierConfig": "classifier",
    "finetune": "finetuning",
    "Objective": "objectives",
    "pretrain": "pretraining",
    "add_noise": "reconstruction",
    "reconstruct": "reconstruction",
    "FinetuneConfig": "settings",
    "LinearProbeConfig": "settings",
    "PretrainConfig": "settings",
    "Sigma": "sigma",
}
__all__ = [
    "PRESETS",
    "Autoencoder",
    "AutoencoderConfig",
    "CheckpointError",
    "Classifier",
    "ClassifierConfig",
    "FinetuneConfig",
    "LinearProbeConfig",
    "Mask",
    "Objective",
    "PretrainConfig",
    "Sigma",
    "add_noise",
    "finetune",
    "preset",
    "pretrain",
    "reconstruct",
]

if TYPE_CHECKING:
    from denim.nim.autoencoder import PRESETS, Autoencoder, AutoencoderConfig, Mask, preset
    from denim.nim.checkpoint import CheckpointError
    from denim.nim.classifier import Classifier, ClassifierConfig
    from denim.nim.finetuning import finetune
    from denim.nim.objectives import Objective
    from denim.nim.pretraining import pretrain
    from denim.nim.reconstruction import add_noise, reconstruct
    from denim.nim.settings import FinetuneConfig, LinearProbeConfig, PretrainConfig
    from denim.nim.sigma import Sigma

else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
