"""What can be evaluated: defenses that draw by given seeds, and any module from pixels to logits, by object or name."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from denim.defense.de3 import De3
from denim.defense.generators import keyed_generators
from denim.defense.probe import probe_randomness
from denim.kernels import Domain, draw_seeds
from denim.nim.autoencoder import Autoencoder
from denim.nim.classifier import Classifier
from denim.nim.exchange import read_state_dict

__all__ = [
    "ModuleTarget",
    "Target",
    "as_target",
    "import_object",
    "input_size",
    "normalisation_hint",
    "open_target",
    "own_models",
]

OBJECT = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*(?:\.\w+)*)")
TIMM = "timm:"
# Two calls differ if a logit moves by more than this share of the largest one: kernels of a GPU that add in any order
# move the last digits.
ROUNDING = 1e-4


class Target(Protocol):
    """What an evaluation attacks and scores: a classifier of pixels in [0, 1] whose draws are functions of seeds.

    Every `De3` is one, and `ModuleTarget` makes one of any module. A target that has an attribute `draws` takes that
    many rows of seeds for each answer, one that has none takes one.
    """

    @property
    def is_random(self) -> bool:
        """Whether two draws for one image may differ. Of a target that does not draw, one answer is kept."""
        ...

    def seeds(
        self, run_seed: int | Tensor, domain: Domain, ids: Tensor, draws: int = 1, step: int | Tensor = 0
    ) -> Tensor:
        """Seeds of draws, int64 (draws * n, B), n rows for each answer; see `denim.kernels.draw_seeds`."""
        ...

    def draw_logits(self, pixels: Tensor, seeds: Tensor, *, surrogate: bool = False) -> Tensor:
        """Logits (draws, B, K) of pixels (B, C, H, W) for such seeds, differentiable in the pixels.

        With `surrogate`, what an attack should raise in their place where they have no useful gradient.
        """
        ...


class ModuleTarget(nn.Module):
    """A target of any module from pixels to logits, such as a classifier of timm, or a defense of somebody else's.

    A module that draws by itself (dropout that stays on, random resizing, diffusion) draws from the global generators
    of torch, NumPy and Python. Here each draw seeds them from the seeds of the call, and they are afterwards as before.
    So an answer is repeatable for the same images in one batch; in other batches the draws are others, as good as
    these. A module that has a generator of its own is not repeatable.

    Args:
        model: from pixels (B, C, H, W), in [0, 1] unless `preprocessing` is given, to logits (B, K), or to an output
            with such `logits`, as those of transformers.
        preprocessing: per-channel mean and standard deviation in [0, 1] units, for a model of normalised images.
        is_random: whether the model draws by itself; None finds out, by `probe`.

    Raises:
        ValueError: `preprocessing` is not of that form.
    """

    not_in_fingerprint = ("_found",)
    draws = 1
    sigma = None
    is_frozen = False
    case = "model"
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        preprocessing: tuple[Sequence[float], Sequence[float]] | None = None,
        is_random: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        mean, std = ((0.0,), (1.0,)) if preprocessing is None else preprocessing
        if len(mean) != len(std) or not all(0 < value < float("inf") for value in std):
            raise ValueError(
                f"preprocessing must be (mean, std) with a positive std for each channel, got {preprocessing}"
            )
        where = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=where).view(-1, 1, 1), persistent=False)
        self.is_preprocessed = preprocessing is not None
        self._said, self._found = is_random, is_random

    @property
    def is_random(self) -> bool:
        """Whether the model draws by itself.

        Raises:
            RuntimeError: nobody has said so, and `probe` has not been called.
        """
        if self._found is None:
            raise RuntimeError("whether this model draws by itself is not known: call probe(pixels), or give is_random")
        return self._found

    @is_random.setter
    def is_random(self, value: bool) -> None:
        self._found = value

    @property
    def is_known(self) -> bool:
        """Whether it is known if the model draws by itself."""
        return self._found is not None

    def probe(self, pixels: Tensor) -> bool:
        """Find out whether the model draws by itself, by `probe_randomness`, and remember it.

        A module that draws rarely can be missed.

        Args:
            pixels: (B, C, H, W) in [0, 1], a few.
        """
        self._found = False  # the module is asked, and not what is known of it
        found = probe_randomness(self, pixels)
        self._found = bool(found.declared) or found.largest > ROUNDING * found.scale
        return self._found

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of one call of the model.

        Args:
            pixels: (B, C, H, W) in [0, 1].

        Raises:
            ValueError: the model returns something else.
        """
        given = (pixels - self.mean) / self.std if self.is_preprocessed else pixels
        out = self.model(given)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(pixels):
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(out).__name__
            raise ValueError(
                f"{type(self.model).__name__} must return logits (B, K) for pixels {tuple(pixels.shape)}, got {found}"
            )
        return logits

    def seeds(
        self, run_seed: int | Tensor, domain: Domain, ids: Tensor, draws: int = 1, step: int | Tensor = 0
    ) -> Tensor:
        """Seeds of draws, int64 (draws, B); see `De3.seeds`."""
        return draw_seeds(run_seed, domain, ids, draws, step)

    def draw_logits(self, pixels: Tensor, seeds: Tensor, *, surrogate: bool = False) -> Tensor:
        """Logits of several draws.

        Args:
            pixels: (B, C, H, W) in [0, 1].
            seeds: int64 (R, B); one call of the model for each row, or one in all if it does not draw.
            surrogate: without effect: the logits are what an attack raises.

        Returns:
            (R, B, K), at least float32. Differentiable in pixels.
        """
        if not self.is_random or not len(pixels):
            return _single(self(pixels)).expand(len(seeds), -1, -1)
        drawn = []
        for seed in seeds[:, 0].tolist():
            with keyed_generators(seed, pixels.device):
                drawn.append(_single(self(pixels)))
        return torch.stack(drawn)


def _single(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_target(model: Any) -> Any:
    """A target as it is; of any other module, a `ModuleTarget`.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, (De3, ModuleTarget)) or all(
        callable(getattr(model, name, None)) for name in ("seeds", "draw_logits")
    ):
        return model
    if isinstance(model, nn.Module):
        return ModuleTarget(model)
    raise TypeError(
        "a defense must be a module from pixels in [0, 1] to logits, or an object with is_random, seeds and "
        f"draw_logits (see denim.defense.targets.Target), got {type(model).__name__}"
    )


def normalisation_hint(target: Any) -> str | None:
    """A warning for a model of timm that gets pixels as they are and expects normalised ones; None for all else."""
    model = _on_pixels(target)
    config = getattr(model, "pretrained_cfg", None)
    if model is None or isinstance(model, Classifier) or not isinstance(config, dict):
        return None
    mean, std = config.get("mean"), config.get("std")
    if not mean or not std or (set(mean) == {0.0} and set(std) == {1.0}):
        return None
    return (
        f"{type(model).__name__} is a model of timm, which expects images normalised with mean {tuple(mean)} and std "
        f"{tuple(std)}, and gets pixels in [0, 1]: put it into denim.defense.ModuleTarget(model, "
        "preprocessing=(mean, std)), or say timm:NAME"
    )


def _on_pixels(target: Any) -> nn.Module | None:
    """The module that gets the pixels of a target as they are; None where they are normalised on the way."""
    if isinstance(target, De3):
        return _on_pixels(target.classifier)
    if isinstance(target, ModuleTarget):
        return None if target.is_preprocessed else _on_pixels(target.model)
    return target if isinstance(target, nn.Module) else None


def input_size(target: Any) -> tuple[int | None, int | None]:
    """Channels and side of the images that a target takes, as far as it says: a model of timm, or preprocessing."""
    if not isinstance(target, ModuleTarget):
        return None, None
    config = getattr(target.model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return int(config["input_size"][0]), int(config["input_size"][-1])
    return (len(target.mean) if target.is_preprocessed and len(target.mean) > 1 else None), None


def import_object(text: str) -> Any:
    """The object that `package.module:name` names, from the installed packages or the current folder.

    Raises:
        ValueError: not of that form, no such module, or nothing of that name in it.
    """
    match = OBJECT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected package.module:name, got {text!r}")
    folder = str(Path.cwd())
    if folder not in sys.path:  # for good: what is imported may import more when it is called
        sys.path.append(folder)
    try:
        found = importlib.import_module(match[1])
    except ModuleNotFoundError as error:
        if error.name is None or not f"{match[1]}.".startswith(f"{error.name}."):
            raise  # a module that it imports itself
        raise ValueError(
            f"{text!r} names no module: {match[1]} is neither installed nor in {folder}; install its package, or run "
            "the command in the folder that has it"
        ) from error
    for name in match[2].split("."):
        if not hasattr(found, name):
            raise ValueError(f"{match[1]} has no {match[2]}; it has {', '.join(_public(found)) or 'nothing'}")
        found = getattr(found, name)
    return found


def _public(found: object) -> list[str]:
    return [name for name in dir(found) if name.isidentifier() and not name.startswith("_")][:20]


def open_target(text: str, weights: Path | None = None) -> Any:
    """The target that a user named.

    Args:
        text: `package.module:factory`, where calling the factory without arguments gives a module or a target; or
            `timm:NAME`, a model of timm with the mean and standard deviation of its weights.
        weights: a .pt or .safetensors file for the module (see `read_state_dict`). Without it a factory decides, and a
            model of timm has its published weights.

    Returns:
        A target, in evaluation mode and without gradients for its weights.

    Raises:
        ValueError: no such model, a factory that needs arguments, or weights of another model.
        TypeError: the factory returns something else.
        OSError: weights cannot be read or downloaded.
    """
    model: Any
    if text.startswith(TIMM):
        model = _of_timm(text.removeprefix(TIMM), pretrained=weights is None)
    else:
        factory = import_object(text)
        try:
            model = factory()
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # within the factory
            raise ValueError(
                f"{text} must be a function or class that is called without arguments: {error}. Write one that gives "
                "the model, and name that"
            ) from error
    target = as_target(model)
    if isinstance(target, nn.Module):
        if weights is not None:
            _load(target.model if isinstance(target, ModuleTarget) else target, weights, text)
        target.eval().requires_grad_(False)
    elif weights is not None:
        raise ValueError(f"{text} gives no module, so it takes no weights: {weights}")
    return target


def _of_timm(name: str, pretrained: bool) -> ModuleTarget:
    import timm  # a second

    # For weights such as "resnet18.a1_in1k" the name of the architecture is that before the point.
    if not timm.is_model(name.partition(".")[0]):
        alike = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=5)
        raise ValueError(f"timm has no model {name!r}{'; it has ' + ', '.join(alike) if alike else ''}")
    try:
        model: Any = timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:  # no weights of that name, or none at all
        raise ValueError(f"timm cannot give {name!r}: {error}; name other weights, or give --weights") from error
    config = model.pretrained_cfg
    return ModuleTarget(model, preprocessing=(config["mean"], config["std"]), is_random=False)


def _load(model: nn.Module, weights: Path, text: str) -> None:
    own, state = model.state_dict(), read_state_dict(weights)
    # `read_state_dict` takes away what trainers put before all names; here the module itself may have it.
    if (before := re.match(r"((module|_orig_mod|model|backbone|encoder)\.)+", next(iter(own), ""))) is not None:
        named = {before[0] + name: tensor for name, tensor in state.items()}
        state = named if named.keys() == own.keys() else state
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        raise ValueError(
            f"{weights} has no weights of {text}: {len(missing)} are missing (first {missing[:3]}), {len(unknown)} are "
            f"unknown (first {unknown[:3]}), {len(shapes)} have another shape (first {shapes[:3]})"
        ) from error


def own_models(targets: Iterable[Any]) -> list[nn.Module]:
    """Denim's models in the defenses, each of them once."""
    modules = (part for target in targets if isinstance(target, nn.Module) for part in target.modules())
    return list({id(part): part for part in modules if isinstance(part, (Autoencoder, Classifier))}.values())
