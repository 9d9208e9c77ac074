"""Noisy image modeling: autoencoder, objectives, noise levels, data, pretraining, fine-tuning, checkpoints."""

from denim.nim.autoencoder import PRESETS, Autoencoder, AutoencoderConfig, Mask, preset
from denim.nim.checkpoint import CheckpointError
from denim.nim.classifier import Classifier, ClassifierConfig
from denim.nim.finetuning import finetune
from denim.nim.objectives import Objective
from denim.nim.pretraining import pretrain
from denim.nim.reconstruction import add_noise, reconstruct
from denim.nim.settings import FinetuneConfig, PretrainConfig
from denim.nim.sigma import Sigma

__all__ = [
    "PRESETS",
    "Autoencoder",
    "AutoencoderConfig",
    "CheckpointError",
    "Classifier",
    "ClassifierConfig",
    "FinetuneConfig",
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
