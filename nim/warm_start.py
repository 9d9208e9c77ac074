"""Weights of another model as the start of a pretraining: a folder of Denim, a model on the hub, or a foreign file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from denim.nim.autoencoder import Autoencoder, AutoencoderConfig
from denim.nim.checkpoint import CheckpointError, as_numbers, first_words
from denim.nim.exchange import read_state_dict, square_grid
from denim.nim.resampling import resample

__all__ = ["warm_start"]


def warm_start(model: Autoencoder, source: str) -> str:
    """Let an autoencoder start from the encoder of another model, and from its decoder where it has one that fits.

    Positions and patch embedding of another image or patch size are resampled (see `resample`). The decoder is taken
    whole or not at all; it fits if its blocks, and the patches that it predicts, have the sizes of the model's.

    Args:
        model: takes the weights; in place, and not at all where an error is raised.
        source: an autoencoder of Denim (see `find_folder`), or a file that `read_state_dict` reads. Of a file the
            image size is taken to be square, and the heads and pixel statistics to be the model's, since weights do
            not tell them.

    Returns:
        What was taken, what was resampled and what was not, in one line.

    Raises:
        CheckpointError: the source cannot be read, or its encoder is of another architecture.
    """
    config = model.config
    file, obstacles, target = Path(source).expanduser(), [], config.target
    if file.is_file():
        state = read_state_dict(file)
        for name, rank in (("patch_embed.proj.weight", 4), ("pos_embed", 3)):
            if name not in state or state[name].dim() != rank:
                raise CheckpointError(
                    f"{source} holds no ViT: no {name} of {rank} dimensions, first weights {list(state)[:4]}"
                )
        grid = square_grid(state["pos_embed"].shape[1] - 1, source)
    else:
        other = Autoencoder.from_pretrained(file if file.is_dir() else source)
        state, grid = other.state_dict(), other.config.grid_size
        _check_settings(other.config, config, source)
        target = other.config.target
        if other.config.decoder_num_heads != config.decoder_num_heads:
            obstacles = [f"decoder_num_heads is {other.config.decoder_num_heads}, expected {config.decoder_num_heads}"]
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    own = model.state_dict()
    encoder = [name for name in own if not _is_of_decoder(name)]
    resampled = resample(state, grid, config.grid_size, config.patch_size)
    unknown = [f"{name} is unknown" for name in state if name.startswith("blocks.") and name not in own]
    if problems := _differences(resampled, own, encoder) + unknown:
        raise CheckpointError(f"{source} has an encoder of another architecture: {first_words(problems, '; ')}")
    taken, decoder = encoder, [name for name in own if _is_of_decoder(name)]
    unknown = [f"{name} is unknown" for name in state if name.startswith("decoder_blocks.") and name not in own]
    differences = obstacles + _differences(resampled, own, decoder) + unknown
    if not any(name.startswith("decoder_") for name in state):
        words = "the encoder; the decoder is new, for there is none"
    elif differences:
        words = f"the encoder; the decoder is new, for the other one does not fit ({first_words(differences, '; ', 2)})"
    else:
        words, taken = "encoder and decoder", encoder + decoder
        if target != config.target:
            words += f" (of target {target}, which is {config.target} here)"
    model.load_state_dict(as_numbers({name: resampled[name] for name in taken}, own, source), strict=False)
    if patch_size != config.patch_size:
        words += f"; patches resampled from {patch_size} to {config.patch_size} pixels"
    if grid != config.grid_size:
        words += "; positions resampled from {} x {} to {} x {} patches".format(*grid, *config.grid_size)
    return f"weights of {source}: {words}"


def _is_of_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"


def _check_settings(theirs: AutoencoderConfig, ours: AutoencoderConfig, source: str) -> None:
    """Refuse an encoder whose weights fit and compute something else here."""
    for name in ("num_heads", "mean", "std"):
        if getattr(theirs, name) != getattr(ours, name):
            raise CheckpointError(
                f"{source} has {name} {getattr(theirs, name)}, this model {getattr(ours, name)}: its encoder would "
                "compute something else"
            )


def _differences(state: dict[str, Tensor], own: dict[str, Tensor], names: list[str]) -> list[str]:
    found = [f"{name} is missing" for name in names if name not in state]
    return found + [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in names
        if name in state and state[name].shape != own[name].shape
    ]
