"""The blocks of Denim's models: timm's, with lean linear layers (`denim.nim.lean`)."""

from __future__ import annotations

from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from denim.nim.attention import Attention
from denim.nim.lean import apply_gelu_linear, apply_norm_linear, is_plain

__all__ = ["Block", "Mlp", "set_lean"]


class Mlp(TimmMlp):
    """timm's MLP, which timm's blocks take as `mlp_layer`.

    Attributes:
        lean: see `set_lean`.
    """

    lean: bool = True

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Tokens (..., in_features) to tokens (..., out_features).

        Args:
            x: (..., in_features).
            norm: a norm of x before the first layer, which is computed together with it.
        """
        if not self.lean:
            out: Tensor = super().forward(x if norm is None else norm(x))
            return out
        hidden = self.fc1(x) if norm is None else apply_norm_linear(norm, self.fc1, x)
        if is_plain(self.norm, nn.Identity) and not (self.training and self.drop1.p):
            hidden = apply_gelu_linear(self.act, self.fc2, hidden)
        else:
            hidden = self.fc2(self.norm(self.drop1(self.act(hidden))))
        dropped: Tensor = self.drop2(hidden)
        return dropped


class Block(TimmBlock):
    """timm's transformer block. `Attention` as its `attn_layer` and `Mlp` as its `mlp_layer` take its norms.

    Attributes:
        lean: see `set_lean`.
    """

    lean: bool = True

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, dim) to tokens (B, N, dim). For the arguments see timm's block."""
        out: Tensor
        if not self.lean:
            out = super().forward(x, attn_mask, is_causal)
            return out
        options = {"attn_mask": attn_mask, "is_causal": is_causal}
        # A hook of a layer, and a layer of another kind, gets normalised tokens.
        if is_plain(self.attn, Attention):
            attended = self.attn(x, norm=self.norm1, **options)
        else:
            attended = self.attn(self.norm1(x), **options)
        x = x + self.drop_path1(self.ls1(attended))
        del attended  # before the larger tensors of the MLP
        mixed = self.mlp(x, norm=self.norm2) if is_plain(self.mlp, Mlp) else self.mlp(self.norm2(x))
        out = x + self.drop_path2(self.ls2(mixed))
        return out


def set_lean(model: nn.Module, on: bool) -> None:
    """Choose whether the blocks of a model in training compute cheap inputs again in the backward pass.

    They do from the start. The inputs of linear layers that are layer norms and GELUs are computed twice, and a block
    keeps about 0.6 times as much for its backward pass. On the CPU result and gradients have the same bits. Nothing
    changes in evaluation mode, without gradients, and with frozen weights. Double backward, forward-mode derivatives
    and `torch.func` on a model in training mode need `set_lean(model, False)`; torch's counter of operations
    (`FlopCounterMode`) does too, for it does not see into operators.

    Args:
        model: holds `Block` modules, as every `Autoencoder` and `Classifier` does.
        on: whether to compute them again.

    Raises:
        ValueError: a model without such modules.
    """
    layers = [module for module in model.modules() if isinstance(module, (Block, Mlp))]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no blocks that can be lean; build timm's VisionTransformer with "
            "block_fn=denim.nim.block.Block, mlp_layer=denim.nim.block.Mlp and attn_layer=denim.nim.attention.Attention"
        )
    for layer in layers:
        layer.lean = on
