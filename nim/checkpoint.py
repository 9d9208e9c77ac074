"""Checkpoints of models: folders with model.safetensors and config.json, as on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from denim.nim.files import DamagedFileError, atomic_write, check_path, read_json
from denim.nim.models import shipped_models

__all__ = [
    "CheckpointError",
    "Pretrained",
    "as_numbers",
    "check_archive",
    "check_entries",
    "find_folder",
    "first_words",
    "not_finite",
    "read_safetensors",
    "with_todays_names",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
DEFENSE_FILE = "de3.json"  # of a De3, whose models lie beside it
MODEL_CARD = """---
{{ card_data }}
---

# {{ kind }} of Denim

{% if entries.objective %}A vision transformer that rebuilds degraded images: pretrained with the objective \
{{ entries.objective }}, target {{ entries.target }}.{% else %}A vision transformer that classifies images; it was \
fine-tuned on images of the kind "{{ entries.trained_on }}".{% endif %}

Noise levels of the training, in 0-255 pixel levels: {{ sigma or "not recorded here" }}.
{% if training %}
## Training

{{ training.data }}; {{ training.course }}.

```
{{ training.command }}
```
{% endif %}
## Architecture

| entry of config.json | value |
|---|---|
{% for name, value in entries.items() %}| {{ name }} | {{ value }} |
{% endfor %}
## Use

```python
from denim.nim import {{ kind }}

model = {{ kind }}.from_pretrained("owner/name")  # or a folder, or the name of a model that ships with Denim
```

Pixels are given in [0, 1]. Method: {{ paper_url }}
"""
# Names of entries that earlier versions wrote into config.json and run.json: today's names.
OLD_NAMES = {
    "image_size": "img_size",
    "width": "embed_dim",
    "heads": "num_heads",
    "decoder_width": "decoder_embed_dim",
    "decoder_heads": "decoder_num_heads",
    "pool": "global_pool",
    "norm_pix": "target",
    "images": "trained_on",
}


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, of another format or of another architecture."""


class Pretrained(
    nn.Module,
    huggingface_hub.PyTorchModelHubMixin,
    library_name="denim",
    tags=["denim"],
    paper_url="https://arxiv.org/abs/2302.01056",
    model_card_template=MODEL_CARD,
):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for a model that is built from one config dataclass.

    `push_to_hub` is that of the mixin of huggingface_hub. The other two write each file in one step and read strictly.

    Attributes:
        config_class: of the configuration.
        part: what the model is in a defense; its folder in that of a De3 has this name.
        config: the configuration.
        card: text of the model card in the folder that the model was loaded from; None where there is none.
    """

    config_class: ClassVar[type[Any]]
    part: ClassVar[str] = ""
    config: Any
    card: str | None = None

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | Path,
        weights: Mapping[str, Tensor] | None = None,
        *,
        config: None = None,
        model_card_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Write model.safetensors, config.json and a model card, README.md. Each file is replaced in one step.

        Args:
            folder: made where absent; files of an earlier model in it are replaced, but for a README.md, which may have
                been edited. A model that was loaded with a card takes it along.
            weights: what is written in place of the model's own, by the same names: of a model that FSDP has sharded,
                the whole weights.
            config: for the mixin, which gives None: the configuration of a model is its own.
            model_card_kwargs: see `generate_model_card`.

        Raises:
            FloatingPointError: a weight is not finite; nothing is written then.
            ValueError: another `config`; or see `generate_model_card`.
        """
        if config is not None:
            raise ValueError(f"the configuration of a model is its own, got config={config!r}")
        folder = Path(folder)
        about = {name: value for name, value in (model_card_kwargs or {}).items() if value is not None}
        card = self.card if self.card is not None and not about else str(self.generate_model_card(**about))
        weights = self.state_dict() if weights is None else weights
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        self.check_weights(tensors)
        content = json.dumps({"model": self._kind().__name__, **dataclasses.asdict(self.config)}, indent=2)
        with atomic_write(folder / WEIGHTS_FILE) as staged:
            save_file(tensors, staged, metadata={"format": "pt"})
        with atomic_write(folder / CONFIG_FILE) as staged:
            staged.write_text(content + "\n")
        if not (folder / CARD_FILE).exists():
            with atomic_write(folder / CARD_FILE) as staged:
                staged.write_text(card, encoding="utf-8")

    def generate_model_card(
        self, *, license: str | None = None, sigma: str | None = None, training: Mapping[str, str] | None = None
    ) -> huggingface_hub.ModelCard:
        """The page of the model on the hub: what it is, how it was trained, and how it is loaded.

        A model that was loaded with a card keeps that card, unless `sigma` or `training` is given.

        Args:
            license: of the weights, by the hub's names such as "mit"; without it, the card states none.
            sigma: noise levels of its training, in 0-255 pixel levels, such as "gamma:25,3".
            training: "data" and "course" of the training in words, and the "command" that made the model.

        Raises:
            ValueError: the card that the model was loaded with is damaged.
        """
        if self.card is not None and sigma is None and training is None:
            try:
                kept = huggingface_hub.ModelCard(self.card, ignore_metadata_errors=True)
            except Exception as error:  # of its YAML, from a library that is not ours
                raise ValueError(f"the {CARD_FILE} of this model has a damaged head: {error}") from error
            if license is not None:
                kept.data["license"] = license
            return kept
        kind, entries = self._kind().__name__, dataclasses.asdict(self.config)
        data = huggingface_hub.ModelCardData(**{**self._hub_mixin_info.model_card_data.to_dict(), "license": license})
        card: huggingface_hub.ModelCard = huggingface_hub.ModelCard.from_template(
            card_data=data,
            template_str=MODEL_CARD,
            paper_url=self._hub_mixin_info.paper_url,
            kind=kind,
            entries={name: value for name, value in entries.items() if name != "classes"},
            sigma=sigma,
            training=training,
        )
        return card

    @classmethod
    def _kind(cls) -> type[Any]:
        """The model's own class: FSDP gives a model another one, made of it."""
        return next(base for base in cls.__mro__ if "config_class" in vars(base))

    @staticmethod
    def check_weights(weights: Mapping[str, Tensor]) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            FloatingPointError: some are not; the message has their names.
        """
        if broken := not_finite(weights):
            raise FloatingPointError(f"weights are not finite and are not saved: {first_words(broken)}")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> Self:
        """A model from a local folder, of those that ship with Denim, or of a repository on the Hugging Face hub.

        A folder may also be that of a finished run, or of a De3: its model of this kind is taken.

        Args:
            source: see `find_folder`.
            revision: branch, tag or commit on the hub.
            token: for private repositories.

        Returns:
            The model, on the CPU, in evaluation mode.

        Raises:
            CheckpointError: nothing there, truncated files, another kind of model or another architecture, or weights
                that are not finite numbers.
        """
        files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
        files += [f"{cls.part}/{file}" for file in files] if cls.part else []
        found = find_folder(source, files, revision, token)
        folders = (found, found / "model", found / cls.part)
        folder = next((each for each in folders if (each / CONFIG_FILE).is_file()), found)
        config = cls._read_config(folder)
        file, complaint = folder / WEIGHTS_FILE, f"is of another architecture than its {CONFIG_FILE}"
        model = cls.build(config, _read_shapes(file), file, complaint)
        model.load_weights(read_safetensors(file), file, complaint)
        if (card := folder / CARD_FILE).is_file():
            model.card = card.read_text(encoding="utf-8", errors="replace")
        return model.eval()

    @classmethod
    def build(cls, config: Any, shapes: Mapping[str, Sequence[int]], source: str | Path, complaint: str) -> Self:
        """A model for weights, once its config is known to be theirs: a config alone could ask for any memory.

        Args:
            config: of the model.
            shapes: of the weights, by name.
            source: see `load_weights`.
            complaint: likewise.

        Returns:
            The model, on the CPU, with initial weights.

        Raises:
            CheckpointError: the weights of such a model have other names or shapes.
        """
        # Before anything is built: a block takes memory even where its weights take none.
        blocks = sum(getattr(config, name, 0) for name in ("depth", "decoder_depth"))
        if blocks > len(shapes):
            raise CheckpointError(f"{source} {complaint}: {len(shapes)} weights cannot be those of {blocks} blocks")
        with torch.random.fork_rng(devices=[]):  # the initial weights are thrown away
            try:
                with torch.device("meta"):
                    own = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
            except (RuntimeError, TypeError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{source} {complaint}: no such model can be built ({error})") from error
            _compare(shapes, own, source, complaint)
            return cls(config)

    @classmethod
    def _read_config(cls, folder: Path) -> Any:
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise CheckpointError(f"{folder} holds no {CONFIG_FILE}: {_what_else(folder)}")
        try:
            content = read_json(file)
        except DamagedFileError as error:
            raise CheckpointError(str(error)) from error
        kind = content.pop("model", None)
        if kind != cls.__name__:
            raise CheckpointError(f"{file} describes a {kind or 'model of another library'}, expected {cls.__name__}")
        known = {field.name for field in dataclasses.fields(cls.config_class)}
        try:
            content = with_todays_names(content, known)
            unknown = sorted(content.keys() - known)
            if unknown:
                raise CheckpointError(f"{file} has unknown entries {unknown}; known are {sorted(known)}")
            return cls.config_class(**content)
        except CheckpointError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{file} does not describe a {cls.__name__}: {error}") from error

    def load_weights(self, state: Mapping[str, Tensor], source: str | Path, complaint: str) -> None:
        """Take all weights by name, every one of them and no other.

        Args:
            state: the weights.
            source: what they come from, for messages.
            complaint: what is wrong with the source if they do not fit.

        Raises:
            CheckpointError: names or shapes differ, or weights are no floating-point numbers or not finite. Nothing
                has been changed then.
        """
        own = self.state_dict()
        shapes, expected = ({name: tensor.shape for name, tensor in each.items()} for each in (state, own))
        _compare(shapes, expected, source, complaint)
        self.load_state_dict(as_numbers(state, own, source))


def _compare(
    shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], source: str | Path, complaint: str
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} is unknown" for name in shapes if name not in expected]
    problems += [
        f"{name} is {tuple(shapes[name])}, expected {tuple(expected[name])}"
        for name in expected
        if name in shapes and tuple(shapes[name]) != tuple(expected[name])
    ]
    if problems:
        raise CheckpointError(f"{source} {complaint}: {first_words(problems, '; ')}")


def check_entries(config: Any) -> None:
    """Check that the entries of a configuration have the types of its dataclass; a list may stand for a tuple.

    Raises:
        ValueError: another type: a float for an integer, a text for a number, a number for a text.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _is_of(kinds[field.name], value):
            raise ValueError(f"{field.name} must be of type {field.type}, got {value!r}")


def _is_of(kind: Any, value: Any) -> bool:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is types.UnionType:
        return any(_is_of(each, value) for each in arguments)
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(kinds) == len(value) and all(map(_is_of, kinds, value))
    # In Python True is an int, and an int serves as a float.
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def first_words(words: Sequence[str], between: str = ", ", count: int = 4) -> str:
    """The first of many words, and how many more there are."""
    more = [f"and {len(words) - count} more"] if len(words) > count else []
    return between.join([*words[:count], *more])


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in state.items() if not tensor.isfinite().all()]


def as_numbers(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Weights in the dtypes of those that they replace.

    Args:
        state: the weights.
        own: what they replace, by the same names.
        source: what they come from, for messages.

    Raises:
        CheckpointError: integers in place of floating-point numbers, NaN, infinity, or a number that is infinite in
            its new dtype.
    """
    kinds = [name for name in state if own[name].is_floating_point() and not state[name].is_floating_point()]
    if kinds:
        words = [f"{name} ({state[name].dtype})" for name in kinds]
        raise CheckpointError(f"{source} holds weights that are no floating-point numbers: {first_words(words)}")
    converted = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    if broken := not_finite(converted):
        raise CheckpointError(
            f"{source} holds weights that are not finite ({first_words(broken)}): the training that wrote them has "
            "diverged; take an earlier checkpoint"
        )
    return converted


def with_todays_names(entries: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The entries of a config.json or run.json with today's names, whatever version wrote the file.

    Args:
        entries: by name, as read.
        known: today's names. An old name is replaced only if today's is among them and it is not itself.

    Raises:
        ValueError: an old entry whose value has no meaning today.
    """
    current: dict[str, Any] = {}
    for name, value in entries.items():
        today = OLD_NAMES.get(name, name)
        if name in known or today not in known:
            current[name] = value
        elif today not in entries:  # an entry with today's name takes precedence
            if name == "norm_pix":
                if not isinstance(value, bool):
                    raise ValueError(f"norm_pix must be true or false, got {value!r}")
                value = "norm" if value else "raw"
            current[today] = value
    return current


def _read_shapes(file: Path) -> dict[str, Sequence[int]]:
    """Shapes of the tensors in a .safetensors file, by name, from its header alone; raises as `read_safetensors`."""
    with _safetensors_errors(file), safe_open(file, framework="pt") as content:
        return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118 (no mapping)


def check_archive(file: Path) -> None:
    """Refuse a file of torch.save that unpacks to more than its size: torch.save compresses nothing.

    Raises:
        CheckpointError: see above.
        OSError, zipfile.BadZipFile: it cannot be read, or is no zip archive.
    """
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > file.stat().st_size:
        raise CheckpointError(
            f"{file} of {file.stat().st_size} bytes unpacks to {unpacked}: torch.save did not write it"
        )


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, on the CPU.

    Raises:
        CheckpointError: missing, truncated or of another format.
    """
    with _safetensors_errors(file):
        return load_file(file)


@contextlib.contextmanager
def _safetensors_errors(file: Path) -> Iterator[None]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    check_path(file)
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error


def _what_else(folder: Path) -> str:
    """What a folder is that is no checkpoint, and what to do."""
    if (folder / DEFENSE_FILE).is_file():
        return "it is a defense, and has no such model"
    if (folder / "run.json").is_file():
        return "it is a run that has not finished: resume it first, or give one of its checkpoints"
    return "not a checkpoint folder of Denim"


def find_folder(
    source: str | Path, files: Sequence[str], revision: str | None = None, token: str | None = None
) -> Path:
    """The folder that a name stands for.

    Args:
        source: a local folder, which comes first; the name of a model that ships with Denim (`shipped_models`); or
            "owner/name" on the Hugging Face hub. A `Path` is a folder alone.
        files: what is downloaded from the hub.
        revision: branch, tag or commit on the hub.
        token: for private repositories.

    Raises:
        CheckpointError: it is none of these; the message lists the models that ship with Denim.
    """
    folder, shipped = Path(source), shipped_models()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{source} is a file; a checkpoint of Denim is a folder (foreign files: `load_foreign`)")
    if source in shipped:
        return shipped[str(source)]
    names = f"with Denim ship {', '.join(shipped)}" if shipped else "no models ship with this version of Denim"
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"no folder {source}, and it does not have the form owner/name of a repository on the hub; {names}"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, token=token, allow_patterns=list(files))
        )
    except (OSError, HFValidationError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise CheckpointError(
            f"no folder {source}, and no repository of that name could be fetched from the hub: {error}; {names}"
        ) from error
