"""Our mixers in place of ``nn.MultiheadAttention``: torchvision's ViT, OpenCLIP's blocks, DETR's encoder."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.fx import fx_leaf
from cbsa_torch._core.types import GridSize
from cbsa_torch.models.adapt.separate import SeparateHeads
from cbsa_torch.nn import AdaptedCBSA, AgentAttention, Heads, LinearAttention, MixerInput, TokenMixer
from cbsa_torch.ops import counting
from cbsa_torch.ops.counting import Counts


def is_multihead(module: nn.Module | None) -> bool:
    """Whether it is PyTorch's multi-head attention."""
    return isinstance(module, nn.MultiheadAttention)


class _Multihead(SeparateHeads):
    """Called as ``nn.MultiheadAttention``; returns ``(output, None)``: it has no attention weights.

    Queries, keys and values may differ, as in DETR's encoder, where positions are added to the first two. They
    must be of the same tokens.
    """

    taken = ("in_proj_weight", "in_proj_bias", "out_proj")
    _qkv_same_embed_dim = False
    """What keeps ``nn.TransformerEncoderLayer`` from computing softmax attention by itself (its fast path)."""

    def inherit_projections(self, source: nn.Module) -> None:
        """Take over the parameters of ``source``."""
        super().inherit_projections(source)
        del self._modules["proj"]
        self.batch_first = cast(bool, source.batch_first)

    @property
    def proj(self) -> nn.Linear:  # type: ignore[override]
        """The output projection, which has another name there."""
        return cast(nn.Linear, self._modules["out_proj"])

    @fx_leaf
    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        grid_size: GridSize | None = None,
    ) -> tuple[Tensor, None]:
        """Mix ``(B, N, C)`` tokens, or ``(N, B, C)`` without ``batch_first``.

        Raises:
            ValueError: cross-attention (keys of other tokens), or a mask that differs from query to query.
        """
        source, key, value = self._read(
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            grid_size,
        )
        out = self._checkpointed(self._update_of, source, key, value)
        if source.token_mask is not None:
            out = out.masked_fill(~source.token_mask[..., None], 0.0)
        return out if self.batch_first else out.transpose(0, 1), None

    def read(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> MixerInput:  # type: ignore[override]
        """Read the arguments of :meth:`forward`: the record of its queries."""
        return self._read(query, key, value, *args, **kwargs)[0]

    def heads(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Heads:
        """Queries, keys and values, as :meth:`forward` makes them from these arguments."""
        return self._project(*self._read(query, key, value, *args, **kwargs))

    def _read(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        grid_size: GridSize | None = None,
    ) -> tuple[MixerInput, Tensor, Tensor]:
        """The record of the queries, keys and values; batch first."""
        if query.is_nested:
            raise ValueError(
                "query must be a dense tensor, got a nested one: build nn.TransformerEncoder with "
                "enable_nested_tensor=False"
            )
        if key.shape != query.shape or value.shape != query.shape:
            raise ValueError(
                f"key and value must be of the same tokens as query, shape {tuple(query.shape)}, got "
                f"{tuple(key.shape)} and {tuple(value.shape)}: cross-attention stays nn.MultiheadAttention"
            )
        if attn_mask is not None:
            raise ValueError("attn_mask must be None: there is no N x N matrix here; use key_padding_mask")
        if not self.batch_first:
            query, key, value = (t if t.ndim != 3 else t.transpose(0, 1) for t in (query, key, value))
        token_mask, additive = None, None
        if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
            token_mask = ~key_padding_mask
        elif key_padding_mask is not None:
            additive = key_padding_mask[:, None]  # as nn.TransformerEncoderLayer makes it
        source = TokenMixer.read(
            self, query, grid_size, token_mask=token_mask, attn_mask=additive, is_causal=is_causal
        )
        if source.token_mask is not None:
            hidden = ~source.token_mask[..., None]
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        return source, key, value

    def _update_of(self, source: MixerInput, key: Tensor, value: Tensor) -> Tensor:
        return self.mix_and_project(self._project(source, key, value))

    def _project(self, source: MixerInput, key: Tensor, value: Tensor) -> Heads:
        own, (b, n, _) = cast(Any, self), source.x.shape
        weights = own.in_proj_weight.chunk(3)
        biases = (None,) * 3 if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
        queries, keys, values = (
            F.linear(x, weight, bias).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
            for x, weight, bias in zip((source.x, key, value), weights, biases, strict=True)
        )
        return Heads(source, queries, keys, values)

    def counts_in(self, heads: Heads) -> Counts:
        """With the projections, which are no layer that is called."""
        n = heads.source.x.shape[1]
        return super().counts_in(heads) + counting.linear(n, self.dim, 3 * self.dim)


class MultiheadAdaptedCBSA(_Multihead, AdaptedCBSA):
    """:class:`cbsa_torch.nn.AdaptedCBSA` in place of ``nn.MultiheadAttention``."""


class MultiheadAgentAttention(_Multihead, AgentAttention):
    """:class:`cbsa_torch.AgentAttention` in place of ``nn.MultiheadAttention``."""


class MultiheadLinearAttention(_Multihead, LinearAttention):
    """:class:`cbsa_torch.nn.LinearAttention` in place of ``nn.MultiheadAttention``."""


MULTIHEAD_MIXERS: dict[type[TokenMixer], type[SeparateHeads]] = {
    AdaptedCBSA: MultiheadAdaptedCBSA,
    AgentAttention: MultiheadAgentAttention,
    LinearAttention: MultiheadLinearAttention,
}


def why_not_multihead(module: Any) -> str:
    """Why an ``nn.MultiheadAttention`` cannot be adapted; empty if it can."""
    if type(module).forward is not nn.MultiheadAttention.forward:
        return "it has a forward of its own, not that of MultiheadAttention"
    if not module._qkv_same_embed_dim:
        return "its keys or values have other channels than its queries: cross-attention"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys that are no tokens (add_bias_kv, add_zero_attn)"
    return ""
