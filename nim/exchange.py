"""Checkpoints of MAE, NIM-AdvDef, timm and transformers as models of this package, and models as plain timm ViTs.

The first three name their weights as this package does; those of transformers are renamed. The architecture is read off
the shapes of the weights, and weights that do not fit it are refused.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, cast

import numpy as np
import torch
from timm.layers import GELU, DropPath, LayerNorm, PatchDropout, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denim.nim.autoencoder import IMAGENET_MEAN, IMAGENET_STD, Autoencoder, AutoencoderConfig
from denim.nim.checkpoint import CheckpointError, as_numbers, check_archive, read_safetensors
from denim.nim.classifier import Classifier, ClassifierConfig
from denim.nim.detection import detect_target
from denim.nim.resampling import resample

__all__ = ["from_timm", "load_foreign", "read_state_dict", "to_timm"]

_EXCHANGEABLE = (
    "Plain ViTs can be exchanged: timm's VisionTransformer with square patches, a class token, learned or fixed "
    "absolute positions, pre-norm blocks of LayerNorm (of one eps), attention with qkv bias and a GELU MLP of ratio 4, "
    'and global_pool="token" (final norm) or "avg" (fc_norm)'
)

# ------------------------------------------------------------------------------------------------- files of other code


def read_state_dict(path: str | Path, part: str | None = None) -> dict[str, Tensor]:
    """The weights in a file that other code wrote, by name, on the CPU. Runs no code from the file.

    Args:
        path: a .safetensors file, or what `torch.save` wrote, in its zip or its old format.
        part: which entry to take where the file holds several state dicts, such as "model", "classifier" or the
            averaged weights in "ema.module". By default the only one of "model", "classifier" and "state_dict", else
            the only one there is, which may be the file itself.

    Returns:
        The state dict, without what trainers put before every name ("module.", "_orig_mod.", "model.", "backbone.",
        "encoder."), and with timm's names where it has those of transformers' ViT and ViTMAE, of versions 4 and 5. Of a
        ViT of transformers the pooler is left out, which its classifiers do not use. timm's eps of LayerNorm is 1e-6,
        that of transformers 1e-12 by default.

    Raises:
        CheckpointError: missing, truncated, not a checkpoint, Python objects that only running code from the file could
            rebuild, no state dict inside, or more than one and no `part`, or tensors that take more memory than the
            file has of them.
    """
    return _read(path, part)[0]


def _read(path: str | Path, part: str | None) -> tuple[dict[str, Tensor], float]:
    """The weights as `read_state_dict` returns them, and the eps of LayerNorm in the code that wrote them."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; `from_pretrained` reads the folders that Denim writes")
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    content = read_safetensors(path) if path.suffix == ".safetensors" else _torch_load(path)
    state = dict(_choose_part(content, part, path))
    state.pop("n_averaged", None)  # a counter of torch's AveragedModel
    for name, tensor in state.items():
        _check_tensor(name, tensor, path)
    while prefix := next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return _from_transformers(state)


# What DistributedDataParallel, torch.compile, Lightning and others put before the names of all weights.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
# What trainers keep beside the weights: command lines, metrics that are numbers of numpy, and paths. Rebuilding these
# neither runs code nor touches the file system. Some have other names in files of other versions of NumPy and Python.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    *(
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for kind, names in (
            (PurePosixPath, "PosixPath PurePosixPath"),
            (PureWindowsPath, "WindowsPath PureWindowsPath"),
        )
        for name in names.split()
    ),
]


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """Refuse a tensor whose numbers are not all in the file: a few bytes could stand for any shape."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise CheckpointError(f"{path} has {name} as no plain tensor: {tensor.layout}, device {tensor.device}")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        size = tensor.untyped_storage().nbytes()
        raise CheckpointError(f"{path} has {size} bytes for {name} of {tuple(tensor.shape)}: it is an expanded view")


def _torch_load(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise errors of any type
        refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"{path} holds Python objects ({refused[1]}), and rebuilding them would run code from the file; "
                "save the state_dict of that model instead, and load that"
            ) from error
        with path.open("rb") as file:
            start = file.read(2)
        if start in (b"PK", b"\x80\x02"):  # a zip archive, or a pickle of the protocol that torch.save uses
            reason = [type(error).__name__, *str(error).split("WeightsUnpickler error:")[-1].split("\n")]
            raise CheckpointError(
                f"{path} is truncated, damaged or not written by torch.save ({': '.join(filter(None, reason[:2]))})"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint: neither a .safetensors file nor written by torch.save (starts with {start!r})"
        ) from error


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
    )


def _choose_part(content: Any, part: str | None, path: Path) -> Mapping[str, Tensor]:
    if _is_state_dict(content) and part is None:
        return cast(Mapping[str, Tensor], content)
    found = dict(_parts(content))
    parts = list(found)
    if part is not None:
        within = [name for name in parts if name == part or name.startswith(f"{part}.")]
        if len(within) == 1 or part in parts:
            return found[part if part in parts else within[0]]
        raise CheckpointError(f"{path} has no part {part!r}; state dicts inside: {parts or 'none but the file itself'}")
    usual = [name for name in ("model", "classifier", "state_dict") if name in parts]
    if len(usual) == 1 or len(parts) == 1:
        return found[(usual if len(usual) == 1 else parts)[0]]
    if parts:
        raise CheckpointError(f"{path} holds no or several usual state dicts; choose one of {parts} with `part`")
    inside = f"keys {list(content)[:8]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise CheckpointError(f"{path} holds {inside}, and no state dict under model, classifier or state_dict")


def _parts(content: Any) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """State dicts in a dictionary and in the dictionaries in it, by name, as "ema.module" for those."""
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        if _is_state_dict(value):
            yield str(name), value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", each) for inner, each in value.items() if _is_state_dict(each))


# Names of transformers' ViT and ViTMAE -> timm's and MAE's, applied one after the other. Files of versions 4 and 5
# differ in the blocks of the decoder; the modules of version 5 have other names than its files.
_RENAMED = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def _from_transformers(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The same weights with timm's names, where they have transformers', else as they are; and the eps of LayerNorm."""
    if not any("embeddings.patch_embeddings.projection." in name for name in state):
        return state, 1e-6
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, ours in _RENAMED:
            name = re.sub(pattern, ours, name)
        if not name.startswith("pooler."):
            renamed[name] = tensor
    # Query, key and value are three layers there, and one here.
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed for part in parts):
            joined = name.replace(".query.", ".qkv.")
            renamed[joined] = torch.cat([renamed.pop(part) for part in parts])
    return renamed, 1e-12


# Weights do not tell the number of heads. Here it is by embed_dim, as published: ViT-Ti, S, B, L, H, and MAE's decoder.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {512: 16}


def load_foreign(
    path: str | Path,
    *,
    part: str | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    norm_eps: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    target: str | None = None,
    objective: str = "nim",
    trained_on: str = "clean",
) -> Autoencoder | Classifier:
    """A model from a checkpoint of MAE, NIM-AdvDef, timm or transformers; its architecture is read off the weights.

    Args:
        path: see `read_state_dict`.
        part: see `read_state_dict`.
        num_heads: attention heads of the encoder; by default those of the published ViT of this embed_dim.
        decoder_num_heads: of the decoder; by default the published number.
        img_size: in pixels, of the model: for another size than that of the file, positions are resampled as timm
            does it. Needed where the images of the file are not square, and then theirs.
        patch_size: side of a patch of the model; for another one than that of the file, the patch embedding and the
            positions are resampled as timm does it. A decoder predicts patches of its own size alone.
        norm_eps: eps of LayerNorm; by default 1e-12 for files of transformers, which is its own default, else 1e-6.
        mean: per-channel mean in [0, 1] units; by default ImageNet's, needed unless there are three channels. Many of
            timm's own ViTs were trained with mean 0.5 and std 0.5, which the weights do not show.
        std: per-channel standard deviation in [0, 1] units; as for `mean`.
        target: for an autoencoder, "norm" where its target was normalised per patch, else "raw". By default it is
            told from what the model predicts of two photos, and a warning says what was found (see `detect_target`).
            Of MAE's files, mae_visualize_* have a raw target where no "full" is in the name.
        objective: for an autoencoder, what it was pretrained for: nim, mae or dmae.
        trained_on: for a classifier, what it was fine-tuned on (see `ClassifierConfig`).

    Returns:
        An `Autoencoder` where there is a decoder, a `Classifier` where there is a head; on the CPU, in evaluation mode.

    Raises:
        CheckpointError: see `read_state_dict`; an encoder alone; weights that are no plain ViT's.
        ValueError: an option is missing that cannot be read off the weights, or one contradicts them, or the
            predictions do not tell the target.
    """
    state, eps = _read(path, part)
    decoder, head = "decoder_pred.weight" in state, "head.weight" in state
    if not decoder and not head:
        if "patch_embed.proj.weight" in state:
            raise CheckpointError(
                f"{path} holds an encoder alone, neither decoder nor head: "
                "give it to a classifier with Classifier.load_encoder(read_state_dict(path))"
            )
        raise CheckpointError(f"{path} holds no ViT: neither decoder_pred nor head, first weights {list(state)[:4]}")

    embed_dim, channels, own_patch, across = _shape(state, "patch_embed.proj.weight", 4, path)
    if own_patch != across:
        raise CheckpointError(f"{path} has patches of {own_patch} x {across}. {_EXCHANGEABLE}.")
    patch_size = own_patch if patch_size is None else patch_size
    if decoder and patch_size != own_patch:
        raise ValueError(f"{path} has a decoder of patches of {own_patch} pixels, which cannot become {patch_size}")
    _shape(state, "cls_token", 3, path)
    length = _shape(state, "pos_embed", 3, path)[1] - 1
    own_grid = _grid(img_size, length, own_patch, path)
    if img_size is None:
        img_size = own_grid[0] * own_patch, own_grid[1] * own_patch
    if (mean is None or std is None) and channels != 3:
        raise ValueError(f"{path} takes images of {channels} channels: mean and std are needed, one value per channel")
    body: dict[str, Any] = {
        "img_size": (img_size, img_size) if isinstance(img_size, int) else img_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": _depth(state, "blocks"),
        "num_heads": _heads("num_heads", num_heads, embed_dim, _HEADS),
        "mean": tuple(IMAGENET_MEAN if mean is None else mean),
        "std": tuple(IMAGENET_STD if std is None else std),
        "norm_eps": eps if norm_eps is None else norm_eps,
    }
    if len(body["mean"]) != channels:
        raise ValueError(f"{path} takes images of {channels} channels, got mean {body['mean']}")
    config: Any
    if decoder:
        decoder_embed_dim = _shape(state, "decoder_pred.weight", 2, path)[1]
        config = AutoencoderConfig(
            **body,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=_depth(state, "decoder_blocks"),
            decoder_num_heads=_heads("decoder_num_heads", decoder_num_heads, decoder_embed_dim, _DECODER_HEADS),
            target=target or "norm",
            objective=objective,
        )
    else:
        pool: Any = "avg" if "fc_norm.weight" in state else "token"
        classes = _shape(state, "head.weight", 2, path)[0]
        config = ClassifierConfig(**body, num_classes=classes, global_pool=pool, trained_on=trained_on)
    grid = tuple(side // patch_size for side in config.img_size)
    state = resample(state, own_grid, (grid[0], grid[1]), patch_size)
    complaint = f"holds no plain ViT. {_EXCHANGEABLE}. Differences"
    kind: type[Autoencoder | Classifier] = Autoencoder if decoder else Classifier
    model = kind.build(config, {name: tensor.shape for name, tensor in state.items()}, path, complaint)
    model.load_weights(state, path, complaint)
    if isinstance(model, Autoencoder) and target is None:
        found, why = detect_target(model)
        if found is None:
            raise ValueError(f"{path} does not show whether its target was normalised per patch ({why}): give target")
        warnings.warn(f"{path}: the target is taken to be {found!r} ({why}); `target` decides otherwise", stacklevel=2)
        model.config = replace(model.config, target=found)
    return model.eval()


def _shape(state: Mapping[str, Tensor], name: str, rank: int, path: str | Path) -> torch.Size:
    if name not in state or state[name].dim() != rank:
        found = f"has {rank} dimensions, here {tuple(state[name].shape)}" if name in state else "is missing"
        raise CheckpointError(f"{path} holds no plain ViT: {name} {found}. {_EXCHANGEABLE}.")
    return state[name].shape


def _depth(state: Mapping[str, Tensor], blocks: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def _heads(option: str, given: int | None, embed_dim: int, published: Mapping[int, int]) -> int:
    if given is None and embed_dim not in published:
        raise ValueError(
            f"{option} is needed: the weights do not tell how many attention heads share an embed_dim of {embed_dim} "
            f"(known: {', '.join(f'{size}: {count}' for size, count in published.items())})"
        )
    return published[embed_dim] if given is None else given


def _grid(img_size: int | tuple[int, int] | None, length: int, patch_size: int, path: str | Path) -> tuple[int, int]:
    """Rows and columns of the patches of a file: those of an image of `img_size` if as many, else of a square one."""
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if (height // patch_size) * (width // patch_size) == length:
            return height // patch_size, width // patch_size
    return square_grid(length, path)


def square_grid(length: int, path: str | Path) -> tuple[int, int]:
    """Rows and columns of the patches of a square image.

    Args:
        length: number of patches.
        path: of the file that has them, for the message.

    Raises:
        ValueError: no square image has so many.
    """
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(
            f"{path} has {length} patches, no square: `load_foreign` with img_size=(H, W) of its images is needed"
        )
    return side, side


# --------------------------------------------------------------------------------------------------------- timm's ViTs


def to_timm(model: Autoencoder | Classifier) -> VisionTransformer:
    """A plain timm ViT with copies of a model's weights; it takes *normalised* images, as all ViTs of timm do.

    A classifier becomes one with the same logits. Of an autoencoder the encoder is kept, with its final norm, class
    token pooling and no head (timm's `reset_classifier` makes one). Drop rates are settings of training and stay zero.

    Returns:
        The ViT, on the device and in the dtype of the model, in evaluation mode.
    """
    config, classifies = model.config, isinstance(model, Classifier)
    with torch.random.fork_rng(devices=[]):
        vit = VisionTransformer(
            img_size=config.img_size,
            patch_size=config.patch_size,
            in_chans=len(config.mean),
            num_classes=config.num_classes if classifies else 0,
            global_pool=config.global_pool if classifies else "token",
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        )
    state = model.state_dict()
    vit.load_state_dict({name: state[name] for name in vit.state_dict()})
    return vit.to(model.cls_token).eval()


def from_timm(
    vit: nn.Module, *, mean: Sequence[float], std: Sequence[float], classes: Sequence[str] = ()
) -> Classifier:
    """A classifier with copies of a plain timm ViT's weights and the same logits.

    Args:
        vit: timm's `VisionTransformer`, with a head.
        mean: per-channel mean, in [0, 1] units, of the images that it was trained on (timm keeps it in
            `vit.pretrained_cfg`); the classifier takes pixels in [0, 1] and normalises inside.
        std: per-channel standard deviation; as for `mean`.
        classes: names of the classes, may be empty.

    Returns:
        The classifier, on the device and in the dtype of the ViT, in evaluation mode. Drop rates are settings of
        training and are left at zero.

    Raises:
        ValueError: the ViT is a variant that cannot be exchanged; the message lists the differences.
    """
    if type(vit) is not VisionTransformer:
        raise _refusal([f"it is a {type(vit).__name__}, not timm's VisionTransformer itself"])
    if type(vit.patch_embed) is not PatchEmbed:
        raise _refusal([f"patch_embed is {type(vit.patch_embed).__name__}, a plain ViT has PatchEmbed"])
    heads = getattr(getattr(vit.blocks[0], "attn", None), "num_heads", 1)
    eps = getattr(getattr(vit.blocks[0], "norm1", None), "eps", 1e-6)
    obstacles = _unusual_settings(vit) + _unusual_modules(vit, heads, eps)
    if obstacles:
        raise _refusal(obstacles)
    config = ClassifierConfig(
        num_classes=vit.num_classes,
        img_size=vit.patch_embed.img_size,
        patch_size=vit.patch_embed.patch_size[0],
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=heads,
        mean=tuple(mean),
        std=tuple(std),
        global_pool="avg" if vit.global_pool == "avg" else "token",
        classes=tuple(classes),
        norm_eps=eps,
    )
    if len(config.mean) != vit.patch_embed.proj.in_channels:
        raise ValueError(f"the ViT takes {vit.patch_embed.proj.in_channels} channels, got mean {config.mean}")
    with torch.random.fork_rng(devices=[]):
        classifier = Classifier(config)
    classifier.load_state_dict(as_numbers(vit.state_dict(), classifier.state_dict(), "the ViT"))
    return classifier.to(vit.cls_token).eval()


def _refusal(obstacles: list[str]) -> ValueError:
    return ValueError(f"this ViT cannot be exchanged: {'; '.join(obstacles)}. {_EXCHANGEABLE}.")


def _unusual_settings(vit: Any) -> list[str]:
    """The settings of a ViT that a plain one does not have, in words."""
    embed = vit.patch_embed
    square = embed.patch_size[0] == embed.patch_size[1]
    settings = {
        f"{vit.num_reg_tokens} register tokens": vit.num_reg_tokens > 0,
        "no class token": not vit.has_class_token,
        "no absolute positions": vit.pos_embed is None,
        "no position of the class token (no_embed_class)": vit.no_embed_class,
        f"global_pool={vit.global_pool!r}": vit.global_pool not in ("token", "avg"),
        "pooling includes the class token (pool_include_prefix)": vit.pool_include_prefix,
        "dynamic image size": vit.dynamic_img_size or embed.dynamic_img_pad or not embed.strict_img_size,
        f"patches of {embed.patch_size}": not square,
        f"image size {embed.img_size}, no multiple of the patch size": square
        and any(side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)),
        "no head (num_classes=0)": vit.num_classes < 1,
    }
    return [words for words, present in settings.items() if present]


_TERMS = {
    "ls1": "layer scale",
    "ls2": "layer scale",
    "q_norm": "qk-norm",
    "k_norm": "qk-norm",
    "norm_pre": "a norm before the blocks",
    "fc_norm": "another place of the final norm",
}
# Modules that compute the same in evaluation mode, in which dropout does nothing.
_KINDS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.Identity, nn.Dropout, DropPath, PatchDropout), "Identity"),
    **dict.fromkeys((nn.LayerNorm, LayerNorm), "LayerNorm"),
    **dict.fromkeys((nn.GELU, GELU), "GELU"),
}
_SETTINGS = ("eps", "approximate", "num_heads", "scale", "stride", "padding", "dilation", "groups")


def _unusual_modules(vit: Any, heads: int, eps: float) -> list[str]:
    """The modules and weights of a ViT that a plain one does not have, in words, once for all blocks.

    All of them are compared with those of a plain ViT, so that variants that timm adds later are refused too.
    """
    with torch.random.fork_rng(devices=[]):
        plain = VisionTransformer(  # one block: those of the ViT are all compared with it
            img_size=vit.patch_embed.img_size,
            patch_size=vit.patch_embed.patch_size,
            in_chans=vit.patch_embed.proj.in_channels,
            num_classes=vit.num_classes,
            global_pool="avg" if vit.global_pool == "avg" else "token",
            embed_dim=vit.embed_dim,
            depth=1,
            num_heads=heads,
            norm_layer=partial(nn.LayerNorm, eps=eps),
        )
    found: dict[str, None] = {}  # in order, without repetitions
    skipped: tuple[str, ...] = ()

    def report(name: str, words: str) -> None:
        term, place = _TERMS.get(name.rpartition(".")[2]), re.sub(r"^blocks\.\d+", "blocks.*", name)
        found[f"{term} ({place} {words})" if term else f"{place} {words}"] = None

    def pairs(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            if name and not name.startswith(skipped):
                yield name, theirs.get(name), ours.get(re.sub(r"^blocks\.\d+", "blocks.0", name))

    for name, module, usual in pairs(dict(vit.named_modules()), dict(plain.named_modules())):
        kind, usual_kind = (
            "nothing" if each is None else _KINDS.get(type(each), type(each).__name__) for each in (module, usual)
        )
        if kind != usual_kind:
            report(name, f"is {kind}, a plain ViT has {usual_kind}")
            skipped += (f"{name}.",)
            continue
        for setting in _SETTINGS:
            value, usual_value = getattr(module, setting, None), getattr(usual, setting, None)
            if value != usual_value and None not in (value, usual_value):
                report(name, f"has {setting} {value}, a plain ViT {usual_value}")
    for name, weight, usual in pairs(vit.state_dict(), plain.state_dict()):
        if weight is None or usual is None:
            report(name, "is missing" if weight is None else "is unknown")
        elif weight.shape != usual.shape:
            report(name, f"is {tuple(weight.shape)}, a plain ViT has {tuple(usual.shape)}")
    return list(found)
