"""Data as the trainers see it: manifests, sources of images, keyed views of them, and loaders that own the order."""

from denim.nim.data.backends import loader_backends, open_loader
from denim.nim.data.listing import Listing
from denim.nim.data.loader import BadSamplesError, Batch, Loader, PlannedLoader, TorchLoader, to_device
from denim.nim.data.manifest import Manifest, ManifestError
from denim.nim.data.order import Order
from denim.nim.data.sources import (
    Cifar,
    Digits,
    EncodedSource,
    ImageFolder,
    ManifestSource,
    Source,
    Subset,
    hold_out,
    match_classes,
    open_manifest,
    open_source,
)
from denim.nim.data.views import EvalView, TrainView, View, Window, keyed_globals, sample_rng

__all__ = [
    "BadSamplesError",
    "Batch",
    "Cifar",
    "Digits",
    "EncodedSource",
    "EvalView",
    "ImageFolder",
    "Listing",
    "Loader",
    "Manifest",
    "ManifestError",
    "ManifestSource",
    "Order",
    "PlannedLoader",
    "Source",
    "Subset",
    "TorchLoader",
    "TrainView",
    "View",
    "Window",
    "hold_out",
    "keyed_globals",
    "loader_backends",
    "match_classes",
    "open_loader",
    "open_manifest",
    "open_source",
    "sample_rng",
    "to_device",
]
