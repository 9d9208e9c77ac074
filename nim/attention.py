"""Attention of the ViT blocks: timm's module and its weights, with the backends of `denim.kernels.attention`."""

from __future__ import annotations

from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

from denim.kernels.attention import attention, check_backend
from denim.nim.lean import apply_norm_linear

__all__ = ["Attention", "set_attention"]


class Attention(TimmAttention):
    """timm's multi-head self-attention, computed by a backend of `denim.kernels.attention`.

    timm's blocks and ViTs take it as `attn_layer`. Arguments, parameters and their names are timm's. Queries, keys and
    values are views of one packed tensor (B, N, 3, heads, head_dim), which xformers takes without a copy.

    Attributes:
        backend: "auto" (the first that serves), "xformers", "sdpa" or "math"; see `set_attention`.
    """

    backend: str = "auto"

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, norm: nn.Module | None = None
    ) -> Tensor:
        """Tokens (B, N, dim) to tokens (B, N, dim_out).

        Args:
            x: (B, N, dim).
            attn_mask: see timm. With a mask, `is_causal`, dropout of the attention weights or a gate, timm's own
                forward runs, which is torch's SDPA.
            is_causal: see timm.
            norm: a norm of x before the projection, which is computed together with it (`denim.nim.lean`).

        Raises:
            ValueError: the chosen backend cannot serve this call; the message has its reasons.
        """
        dropout = self.training and self.attn_drop.p > 0
        if attn_mask is not None or is_causal or dropout or getattr(self, "gate", None) is not None:
            if self.backend not in ("auto", "sdpa"):
                raise ValueError(
                    f"attention backend {self.backend!r} has no masks, attention dropout or gates; choose auto or sdpa"
                )
            own: Tensor = super().forward(x if norm is None else norm(x), attn_mask, is_causal)
            return own
        batch, length, _ = x.shape
        projected = self.qkv(x) if norm is None else apply_norm_linear(norm, self.qkv, x)
        packed = projected.view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        # Under autocast a norm returns float32. SDPA alone would cast it back by itself.
        query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        mixed = attention(query, key, value, backend=self.backend)
        mixed = mixed.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        out: Tensor = self.proj_drop(self.proj(self.norm(mixed)))
        return out


def set_attention(model: nn.Module, backend: str) -> None:
    """Choose the attention backend of a whole model.

    Args:
        model: holds `Attention` modules, as every `Autoencoder`, `Classifier` and `De3` of them does.
        backend: "auto", "xformers", "sdpa" or "math". A choice that cannot serve a call raises at that call, with its
            reasons; `denim.kernels.attention_backends` gives them without a call.

    Raises:
        ValueError: unknown backend, or a model without such modules.
    """
    check_backend(backend)
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no attention whose backend can be chosen; build its blocks with "
            "attn_layer=denim.nim.attention.Attention, as timm's create_model takes it"
        )
    for layer in layers:
        layer.backend = backend
