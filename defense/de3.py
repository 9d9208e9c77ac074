"""De3: degrade, denoise, then classify, as one ordinary module from pixels to logits."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import huggingface_hub
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denim.defense.probe import declares_random
from denim.defense.replay import member_of_vmap, number_of_call
from denim.kernels import Domain, check_pixels, derive_seeds, draw_seeds
from denim.kernels.patches import unpatchify
from denim.kernels.seeds import check_seed
from denim.nim import Autoencoder, CheckpointError, Classifier, Mask, add_noise, reconstruct
from denim.nim.checkpoint import CARD_FILE, CONFIG_FILE, DEFENSE_FILE, WEIGHTS_FILE, check_entries, find_folder
from denim.nim.classifier import PatchEmbed
from denim.nim.files import DamagedFileError, atomic_folder, read_json
from denim.nim.lean import is_plain
from denim.nim.reconstruction import case_of, check_degradation, same_patches
from denim.nim.sigma import MAX_SIGMA, is_level, warn_of_unit_sigma

__all__ = ["De3"]

CARD = """---
{data}
---

# De3 of Denim

Noise of level sigma, a denoiser, a classifier: a defense against adversarial images.

```python
from denim.defense import De3

defense = De3.from_pretrained("owner/name", sigma={sigma})  # or a folder; pixels in [0, 1] -> logits
```

The models are in denoiser/ and classifier/, each with a card of its own; the settings are in {file}. Method:
https://arxiv.org/abs/2302.01056
"""


@dataclass(frozen=True)
class _Settings:
    """The entries of de3.json: the arguments of a `De3`, and its `case`."""

    case: str
    sigma: float | None
    draws: int
    aggregate: str
    degrade: str
    mask_ratio: float
    statistics: str

    def __post_init__(self) -> None:
        check_entries(self)


def _entropy() -> int:
    return int.from_bytes(os.urandom(8), "little", signed=True)


def _single_dtype(like: Tensor) -> torch.dtype:
    """float32 where a tensor is half precision, in which a noise level would be rounded to 8 bits."""
    return torch.promote_types(like.dtype, torch.float32)


def _single(logits: Tensor) -> Tensor:
    """Logits in float32 where they are half precision, in which classes would tie and means would round."""
    return logits.to(_single_dtype(logits))


class De3(nn.Module):
    """Degrade (noise of level sigma), denoise, classify (You et al. 2023, arXiv 2302.01056, section 4).

    An ordinary module from pixels (B, C, H, W) in [0, 1] to logits (B, K), differentiable end to end. Its noise comes
    from its own stream: the global torch generator is neither read nor seeded, every call draws afresh, and copies of
    the module and ranks of a job draw differently. `frozen` gives a deterministic function of the image instead.

    It starts in training mode if every module in it is in training mode, and in evaluation mode if one is not.

    A `Classifier` of the denoiser's image and patch size gets patches, with the same logits: pixels are not assembled
    between the two networks. It gets pixels if calling it would run more than `Classifier.forward`: that of a subclass
    or a wrapper, hooks or a replaced `forward`, in the classifier or in its patch embedding.

    Args:
        denoiser: an `Autoencoder`, or None for noise alone (a classifier fine-tuned on noise; not clipped).
        classifier: any module from pixels in [0, 1] to logits. Normalisation lives inside it.
        sigma: noise level in 0-255 pixel levels, the dial between accuracy and robustness; None turns the defense off.
        draws: draws of the noise per call, whose logits are aggregated.
        aggregate: "logits" (their mean over the draws) or "vote" (majority vote: the logs of the shares of votes, ties
            broken by the mean probability; its gradient is that of the log of the mean probability).
        degrade: "noise" (NIM), "mask" (MAE; give sigma=0) or "both" (DMAE).
        mask_ratio: share of hidden patches, the dial of "mask".
        statistics: where a denoiser of the normalised target gets each patch's mean and variance: "input" (as
            published; two noise-free numbers per patch of the attacked image reach the classifier) or "noisy" (a
            diagnostic). Without effect for a raw target, which needs none.
        seed: int64; None takes one from the operating system.

    Raises:
        ValueError: an unknown option (the valid ones are listed), or options that do not fit together.
        TypeError: a path in place of a model.

    Warns:
        UserWarning: the classifier records that it was trained on images of another kind; or sigma lies between 0 and
            1, as if in [0, 1] units.
    """

    _key: Tensor
    _calls: Tensor

    def __init__(
        self,
        denoiser: Autoencoder | None,
        classifier: nn.Module,
        sigma: float | None,
        *,
        draws: int = 1,
        aggregate: str = "logits",
        degrade: str = "noise",
        mask_ratio: float = 0.75,
        statistics: str = "input",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, model, kind in (("denoiser", denoiser, "Autoencoder"), ("classifier", classifier, "Classifier")):
            if isinstance(model, str | os.PathLike):
                raise TypeError(f"{name} must be a model, got the path {str(model)!r}: {kind}.from_pretrained loads it")
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        if aggregate not in ("logits", "vote"):
            raise ValueError(f'aggregate must be "logits" or "vote", got {aggregate!r}')
        check_degradation(denoiser, degrade, statistics)
        if denoiser is None and degrade != "noise":
            raise ValueError(f"degrade={degrade!r} needs a denoiser")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {mask_ratio}")
        self.denoiser, self.classifier = denoiser, classifier
        # A client that notes this, evaluates, and calls `train` with what it noted leaves every module as it was, or in
        # evaluation mode.
        self.training = all(part.training for part in self.modules() if part is not self)
        self.draws, self.aggregate = draws, aggregate
        self.degrade, self.mask_ratio, self.statistics = degrade, mask_ratio, statistics
        self.seed = seed
        self._is_frozen = False
        self._copies = self._replica = 0
        self._replica_dtype: torch.dtype | None = None
        key = _entropy() if seed is None else seed
        check_seed(key)
        # Tensors, so that seeds are derived on the device and a compiled or captured call still draws afresh. Those
        # that inference mode makes cannot be changed outside of it.
        with torch.inference_mode(False):
            self.register_buffer("_key", torch.tensor(key, dtype=torch.int64), persistent=False)
            self.register_buffer("_calls", torch.tensor(0, dtype=torch.int64), persistent=False)
        self.sigma = sigma
        trained_on = getattr(getattr(classifier, "config", None), "trained_on", None)
        if sigma is not None and trained_on is not None and trained_on != self.case:
            warnings.warn(
                f"the classifier was trained on images of the kind {trained_on!r} and is used on {self.case!r}",
                stacklevel=2,
            )

    @property
    def sigma(self) -> float | None:
        """Noise level in 0-255 pixel levels; None is off. May be set at any time."""
        return self._sigma

    @sigma.setter
    def sigma(self, value: float | None) -> None:
        if value is not None:
            self._check_sigma(value)
            warn_of_unit_sigma(value)
        self._sigma = None if value is None else float(value)

    @property
    def case(self) -> str:
        """What images the classifier gets, in words: "noise, raw target", "noise, input statistics", "noisy", ..."""
        return case_of(self.denoiser, self.degrade, self.statistics)

    @property
    def is_frozen(self) -> bool:
        """Whether this is a deterministic function of the image with fixed noise (see `frozen`)."""
        return self._is_frozen

    @property
    def is_random(self) -> bool:
        """Whether two calls on one image may differ: by the noise, or as a module inside says of itself."""
        inside = (part for part in self.modules() if part is not self)
        return self._draws or any(declares_random(part) for part in inside)

    @property
    def _draws(self) -> bool:
        """Whether the noise or the mask differs between calls."""
        degrades = self.degrade != "noise" or self.sigma != 0
        return self.sigma is not None and degrades and not self._is_frozen

    def extra_repr(self) -> str:
        """Settings, for print."""
        ratio = "" if self.degrade == "noise" else f", mask_ratio={self.mask_ratio}"
        return (
            f"sigma={self.sigma}, draws={self.draws}, aggregate={self.aggregate!r}, degrade={self.degrade!r}{ratio}, "
            f"case={self.case!r}, frozen={f'seed {self.seed}' if self._is_frozen else False}"
        )

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:
        """Write the defense: its models in denoiser/ and classifier/, its settings in de3.json, and a card, README.md.

        The folder appears in one step. `from_pretrained` takes it, and so do those of `Autoencoder` and `Classifier`.
        A seed is not written: with one, all that load the defense would draw the same noise.

        Args:
            folder: made by this call; it may exist if it is empty.
            license: of all weights, by the hub's names such as "mit", for the cards.

        Raises:
            TypeError: the classifier is no `Classifier`.
            ValueError: the defense is frozen, whose noise is not written; or the folder is not empty.
            FloatingPointError: a weight is not finite; nothing is written then.
            WriteError: the folder cannot be written.
        """
        folder = Path(folder)
        if not isinstance(self.classifier, Classifier):
            raise TypeError(
                f"a {type(self.classifier).__name__} cannot be written: only a Classifier of Denim can; save your own "
                "modules as their library does"
            )
        if self._is_frozen:
            raise ValueError("the noise of a frozen defense is not written: save the defense that it was made of")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} holds something already; choose a new folder, or remove it first")
        settings = {field.name: getattr(self, field.name) for field in fields(_Settings)}
        content = json.dumps({"model": "De3", **asdict(_Settings(**settings))}, indent=2)
        with atomic_folder(folder) as staged:
            if self.denoiser is not None:
                self.denoiser.save_pretrained(staged / self.denoiser.part, model_card_kwargs={"license": license})
            self.classifier.save_pretrained(staged / self.classifier.part, model_card_kwargs={"license": license})
            (staged / DEFENSE_FILE).write_text(content + "\n")
            data = huggingface_hub.ModelCardData(library_name="denim", tags=["denim"], license=license).to_yaml()
            card = CARD.format(data=data, sigma=self.sigma, file=DEFENSE_FILE)
            (staged / CARD_FILE).write_text(card, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None, **settings: Any
    ) -> Self:
        """A defense from a folder, of those that ship with Denim, or of a repository on the Hugging Face hub.

        Args:
            source: what `save_pretrained` wrote: a folder, the name of a defense that ships with Denim, or "owner/name"
                on the hub (see `find_folder`).
            revision: branch, tag or commit on the hub.
            token: for private repositories.
            settings: sigma and other arguments of `De3`, in place of those that were saved.

        Returns:
            The defense, on the CPU, in evaluation mode.

        Raises:
            CheckpointError: nothing there, damaged files, models of another kind, or settings that do not fit.
        """
        parts = [kind.part for kind in (Autoencoder, Classifier)]
        files = [DEFENSE_FILE, *(f"{part}/{file}" for part in parts for file in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE))]
        folder = find_folder(source, files, revision, token)
        file = folder / DEFENSE_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds no {DEFENSE_FILE}, so it is no defense: De3(denoiser, classifier, sigma) makes one of "
                "two models"
            )
        try:
            content = read_json(file)
            if (kind := content.pop("model", None)) != "De3":
                raise CheckpointError(f"{file} describes a {kind or 'model of another library'}, expected De3")
            known = {field.name for field in fields(_Settings)}
            if different := sorted(known ^ content.keys()):
                raise CheckpointError(f"{file} must have the entries {sorted(known)}; missing or unknown: {different}")
            saved = _Settings(**content)
        except (DamagedFileError, ValueError) as error:
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{file}: {error}") from error
        place = folder / Autoencoder.part
        denoiser = Autoencoder.from_pretrained(place) if place.exists() else None
        if (case := case_of(denoiser, saved.degrade, saved.statistics)) != saved.case:
            raise CheckpointError(
                f"{file} was written for images of the kind {saved.case!r}, and {place} makes {case!r}: files of two "
                "defenses, or some are missing"
            )
        classifier = Classifier.from_pretrained(folder / Classifier.part)
        arguments = {name: value for name, value in asdict(saved).items() if name != "case"}
        try:
            return cls(denoiser, classifier, **{**arguments, **settings}).eval()
        except ValueError as error:
            raise CheckpointError(f"no defense can be made of {source}: {error}") from error

    def frozen(self, seed: int = 0) -> De3:
        """The same defense with noise that is fixed and known to an attacker.

        The noise is a function of `seed` alone, the same for every image, so the result is a deterministic function
        of the image, whatever the batch. The modules are shared, not copied.
        """
        twin = De3(
            self.denoiser,
            self.classifier,
            None,
            draws=self.draws,
            aggregate=self.aggregate,
            degrade=self.degrade,
            mask_ratio=self.mask_ratio,
            statistics=self.statistics,
            seed=seed,
        ).to(self._key.device)
        twin.sigma = self.sigma
        twin._is_frozen = True
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Copying and pickling both call this. The copy gets a number, from which its stream of noise is derived.
        self._copies += 1
        # A shallow copy needs a dictionary of its own: in a shared one, its new key would replace the original's.
        return {**self.__dict__, "_buffers": dict(self._buffers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._is_frozen:
            return
        with torch.no_grad():
            if self.seed is None:
                self._key = torch.full_like(self._key, _entropy())
            else:
                self._key = derive_seeds(self._key, Domain.COPY, torch.full_like(self._key, self._copies))
            self._copies, self._calls = 0, torch.zeros_like(self._calls)

    def _replicate_for_data_parallel(self) -> Any:
        # DataParallel makes new replicas at every call and drops them after it, so a counter of theirs would stay at 0.
        self._copies += 1
        replica = super()._replicate_for_data_parallel()
        replica._replica = self._copies
        replica._replica_dtype = self._pixel_dtype()  # a replica's weights are no parameters
        return replica

    def seeds(
        self, run_seed: int | Tensor, domain: Domain, ids: Tensor, draws: int = 1, step: int | Tensor = 0
    ) -> Tensor:
        """Seeds for draws of this defense.

        Args:
            run_seed: int64, of the evaluation, or of the defense's own stream.
            domain: what the draws are for; draws of two domains are independent.
            ids: int64 (B,), sample ids.
            draws: aggregated answers, each of `self.draws` draws.
            step: of an attack.

        Returns:
            int64 (draws * self.draws, B). A frozen defense returns its fixed seeds, which are the same for all images.
        """
        count = draws * self.draws
        if self._is_frozen:
            return draw_seeds(self._key, Domain.FROZEN, torch.zeros_like(ids), self.draws).repeat(draws, 1)
        return draw_seeds(run_seed, domain, ids, count, step)

    def _next_seeds(self, pixels: Tensor) -> Tensor:
        """Seeds (self.draws, B) of a call on these pixels, on their device."""
        batch, first = pixels.shape[0], self._replica << 48
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            first += torch.distributed.get_rank() << 32
        ids = torch.arange(first, first + batch, dtype=torch.int64, device=self._key.device)
        if not self._draws:
            return self.seeds(self._key, Domain.DEFENSE, ids).to(pixels.device)
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            ids = ids + member_of_vmap(pixels.detach()).to(ids.device) * batch
        number, is_new = number_of_call(self._calls)
        seeds = self.seeds(self._key, Domain.DEFENSE, ids, 1, number).to(pixels.device)
        if is_new:
            self._count_call()
        return seeds

    def _count_call(self) -> None:
        if torch.compiler.is_compiling():
            with torch.no_grad():
                # An attribute is set, which dynamo refuses in a checkpointed region: such a region then runs eagerly.
                # Compiled, its recomputation would read the counter after it has been changed (torch 2.14).
                self._calls += 1
            return
        # The transformations of torch.func refuse changes in place of what they do not know, such as this counter, and
        # torch those of a tensor that inference mode has made (a copy or a move of this module in that mode).
        outside = torch._C._DisableFuncTorch()
        with torch.no_grad():
            if self._calls.is_inference() and not torch.is_inference_mode_enabled():
                self._calls = self._calls.clone()
            self._calls += 1
        del outside

    def _check_sigma(self, sigma: float) -> None:
        if not is_level(sigma):
            raise ValueError(
                f"sigma must be a finite number of 0-255 pixel levels, 0 or more, at most {MAX_SIGMA:g}, got {sigma}; "
                "None turns the defense off"
            )
        if self.degrade == "mask" and sigma != 0:
            raise ValueError(f'degrade="mask" adds no noise: give sigma=0, or degrade="both"; got sigma={sigma}')

    def _check(self, pixels: Tensor) -> None:
        if pixels.dim() != 4:
            raise ValueError(f"pixels must have shape (B, C, H, W), got {tuple(pixels.shape)}")
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return  # no values can be read
        if not (pixels.is_cuda and torch.cuda.is_current_stream_capturing()):
            check_pixels(pixels)

    def _rebuild(self, pixels: Tensor, sigma: Tensor, seeds: Tensor, classifier: Classifier | None = None) -> Tensor:
        """sigma (B,) or (S, B), seeds (R, B) -> (S, R, B, C, H, W) or (R, B, C, H, W); a classifier's patches alike."""
        if self.denoiser is None:
            return add_noise(pixels, sigma, seeds)
        rebuilt = reconstruct(
            self.denoiser,
            pixels,
            None if self.degrade == "mask" else sigma,
            seeds,
            degrade=self.degrade,
            mask_ratio=self.mask_ratio,
            statistics=self.statistics,
            classifier=classifier,
        )
        # Masking does not depend on sigma, so the images are the same at every level.
        return rebuilt.expand(*sigma.shape[:-1], *rebuilt.shape) if self.degrade == "mask" else rebuilt

    def _classify(self, images: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., K)."""
        dtype = self._replica_dtype or self._pixel_dtype()
        if dtype is not None and not torch.is_autocast_enabled(images.device.type):
            images = images.to(dtype)
        logits: Tensor = self.classifier(images.reshape(-1, *images.shape[-3:]))
        return logits.reshape(*images.shape[:-3], logits.shape[-1])

    def _defended(self, pixels: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
        """sigma (B,) or (S, B), seeds (R, B) -> logits (S, R, B, K) or (R, B, K)."""
        model = self._takes_patches()
        if model is None:
            return self._classify(self._rebuild(pixels, sigma, seeds))
        patches = self._rebuild(pixels, sigma, seeds, model)
        logits = model.forward_patches(patches.reshape(-1, *patches.shape[-2:]))
        return logits.reshape(*patches.shape[:-2], logits.shape[-1])

    def _pixel_dtype(self) -> torch.dtype | None:
        """The dtype of a foreign classifier's first weight; None for a `Classifier`, which takes pixels of any."""
        if isinstance(self.classifier, Classifier):
            return None
        return next((weight.dtype for weight in self.classifier.parameters() if weight.is_floating_point()), None)

    def _takes_patches(self) -> Classifier | None:
        """The classifier, if it can take the denoiser's patches and none of its code expects pixels; else None."""
        model = self.classifier
        if self.denoiser is None or not isinstance(model, Classifier) or not is_plain(model, Classifier):
            return None
        embedding = model.patch_embed
        if not is_plain(embedding, PatchEmbed) or not is_plain(embedding.proj, nn.Conv2d):
            return None
        return model if same_patches(self.denoiser, model) else None

    def _aggregate(self, logits: Tensor, surrogate: bool) -> Tensor:
        """(..., draws * self.draws, B, K) -> (..., draws, B, K)."""
        grouped: Tensor = _single(logits).unflatten(-3, (-1, self.draws))
        if self.aggregate == "logits":
            return grouped.mean(dim=-3)
        mean_log = grouped.log_softmax(dim=-1).logsumexp(dim=-3) - math.log(self.draws)
        if surrogate:
            return mean_log
        votes = F.one_hot(grouped.argmax(dim=-1), grouped.shape[-1]).to(logits.dtype).mean(dim=-3)
        # The mean probability adds less than half a vote in all: it orders ties and classes without votes, and changes
        # nothing else. The sum of logarithms stays finite for a class without votes and of tiny probability.
        shares = torch.logaddexp(votes.log(), mean_log - math.log(4 * self.draws))
        return shares.detach() + (mean_log - mean_log.detach())

    def draw_logits(
        self, pixels: Tensor, seeds: Tensor, *, surrogate: bool = False, sigma: Tensor | None = None
    ) -> Tensor:
        """Logits of several draws, for given seeds.

        Args:
            pixels: (B, C, H, W) in [0, 1].
            seeds: int64 (draws * self.draws, B), see `seeds`.
            surrogate: for "vote", return the log of the mean probability instead of the votes, for an attack to raise.
            sigma: float (B,), noise levels of the images in 0-255 pixel levels; None takes the defense's own. Without
                effect for "mask".

        Returns:
            (draws, B, K), aggregated over self.draws, at least float32 (also under autocast). Differentiable in pixels.
            Values are not checked.

        Raises:
            ValueError: levels for a defense that is off.
        """
        if sigma is not None and self.sigma is None:
            raise ValueError("this defense is off, so it takes no noise levels: give it a sigma")
        if self.sigma is None and self.is_random:  # by what is inside: every draw is a call of its own
            repeated = pixels.expand(seeds.shape[0], *pixels.shape)
            return self._aggregate(self._classify(repeated), surrogate)
        if self.sigma is None:
            return _single(self._classify(pixels)).expand(seeds.shape[0] // self.draws, -1, -1)
        levels = sigma
        if levels is None:
            levels = torch.full((pixels.shape[0],), self.sigma, dtype=_single_dtype(pixels), device=pixels.device)
        return self._aggregate(self._defended(pixels, levels, seeds), surrogate)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) for pixels (B, C, H, W) in [0, 1]; B may be 0.

        Raises:
            TypeError, ValueError: pixels of another dtype, rank, size or range.
        """
        self._check(pixels)
        if self.sigma is None:
            return self._classify(pixels)
        return self.draw_logits(pixels, self._next_seeds(pixels))[0]

    def degraded(self, pixels: Tensor, seeds: Tensor) -> Tensor:
        """The degraded images that `denoise` rebuilds, for display: noisy pixels, hidden patches grey; not clipped.

        Args:
            pixels: (B, C, H, W) in [0, 1].
            seeds: int64 (B,).
        """
        images = pixels
        if self.sigma:
            images = add_noise(images, torch.full_like(seeds, self.sigma, dtype=_single_dtype(pixels)), seeds)
        if self.sigma is None or self.degrade == "noise" or self.denoiser is None:
            return images
        config = self.denoiser.config
        hidden = Mask.random(seeds, config.num_patches, self.mask_ratio).hidden.unsqueeze(-1)
        squares = unpatchify(hidden.expand(-1, -1, config.patch_size**2), config.img_size, config.patch_size)
        return torch.where(squares.movedim(-1, -3), images.new_tensor(0.5), images)

    def denoise(self, pixels: Tensor, sigma: float | None = None, *, seeds: Tensor | None = None) -> Tensor:
        """The images that the classifier would get: degraded and rebuilt pixels.

        Args:
            pixels: (B, C, H, W) in [0, 1].
            sigma: noise level in 0-255 pixel levels; by default the defense's own.
            seeds: int64 (B,); by default the next of the defense's stream.

        Returns:
            (B, C, H, W), in [0, 1] with a denoiser, not clipped without; the pixels themselves where both are None.
        """
        self._check(pixels)
        level = self.sigma if sigma is None else sigma
        if level is None:
            return pixels
        self._check_sigma(level)
        chosen = self._next_seeds(pixels)[0] if seeds is None else seeds
        levels = torch.full((pixels.shape[0],), level, dtype=_single_dtype(pixels), device=pixels.device)
        return self._rebuild(pixels, levels, chosen.to(pixels.device).unsqueeze(0))[0]

    @torch.no_grad()
    def sweep(
        self,
        pixels: Tensor,
        sigmas: Sequence[float],
        draws: int,
        *,
        seeds: Tensor | None = None,
        max_batch: int = 256,
    ) -> Tensor:
        """Logits at many noise levels and draws, in batched passes of bounded memory, without gradients.

        Levels share their draws, so differences along the curve are paired.

        Args:
            pixels: (B, C, H, W) in [0, 1].
            sigmas: S noise levels in 0-255 pixel levels.
            draws: draws per level.
            seeds: int64 (draws * self.draws, B), see `seeds`; by default fresh ones of the defense's stream.
            max_batch: images that go through the networks in one pass; memory grows with it, the result does not
                depend on it.

        Returns:
            (S, draws, B, K).

        Raises:
            ValueError: no image, no level, a bad level, draws or max_batch below 1, seeds of another shape.
        """
        self._check(pixels)
        batch = pixels.shape[0]
        if not batch or not len(sigmas) or draws < 1 or max_batch < 1:
            raise ValueError(
                "sweep needs images, levels, draws and max_batch of at least 1, "
                f"got {batch} images, {sigmas}, {draws}, {max_batch}"
            )
        for level in sigmas:
            self._check_sigma(level)
        if seeds is not None and seeds.shape != (draws * self.draws, batch):
            raise ValueError(f"seeds must have shape {(draws * self.draws, batch)}, got {tuple(seeds.shape)}")
        if seeds is None:
            seeds = torch.cat([self._next_seeds(pixels) for _ in range(draws)])
        seeds = seeds.to(pixels.device)
        levels = torch.tensor(list(sigmas), dtype=_single_dtype(pixels), device=pixels.device)
        logits: Tensor | None = None
        # The largest blocks of (images, draws, levels) that fit. Levels come first: they share the noise of a draw.
        level_block = min(len(levels), max_batch)
        draw_block = min(len(seeds), max(1, max_batch // level_block))
        image_block = min(batch, max(1, max_batch // (level_block * draw_block)))
        for image in range(0, batch, image_block):
            images = slice(image, image + image_block)
            for draw in range(0, len(seeds), draw_block):
                rows = slice(draw, draw + draw_block)
                for first in range(0, len(levels), level_block):
                    columns = slice(first, first + level_block)
                    chosen = pixels[images]
                    sigma = levels[columns, None].expand(-1, chosen.shape[0])
                    part = self._defended(chosen, sigma, seeds[rows, images])
                    if logits is None:
                        logits = part.new_empty((len(levels), len(seeds), batch, part.shape[-1]))
                    logits[columns, rows, images] = part
        assert logits is not None
        return self._aggregate(logits, surrogate=False)
