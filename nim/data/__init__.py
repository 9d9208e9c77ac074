"""Data as the trainers see it: sources of images, keyed views of them, and loaders that own the order."""

from denim.nim.data.loader import Batch, Loader, TorchLoader
from denim.nim.data.sources import Digits, ImageFolder, Source, Subset, open_source
from denim.nim.data.views import EvalView, TrainView, View, keyed_globals, sample_rng

__all__ = [
    "Batch",
    "Digits",
    "EvalView",
    "ImageFolder",
    "Loader",
    "Source",
    "Subset",
    "TorchLoader",
    "TrainView",
    "View",
    "keyed_globals",
    "open_source",
    "sample_rng",
]
