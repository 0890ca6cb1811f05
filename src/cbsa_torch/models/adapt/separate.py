"""Our mixers with projections of another layer, in parts or joint: heads by theirs, mixing by ours."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from cbsa_torch.nn import Heads, MixerInput, TokenMixer


class SeparateHeads(TokenMixer):
    """Makes queries, keys and values as the layer does that it was made of, and has its parts by their names.

    As it stands, as timm's ``AttentionRope`` and ``EvaAttention`` do, of which other layers need a part.
    """

    taken: tuple[str, ...] = (
        "qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "norm", "proj", "proj_drop",
    )  # fmt: skip
    """Submodules of the original layer that become the mixer's own, by the same names."""

    def inherit_projections(self, source: nn.Module) -> None:
        """Take over the layers of ``source``, and how it uses them."""
        self.qkv = None  # type: ignore[assignment]
        for name in self.taken:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        self.q_bias, self.v_bias = getattr(source, "q_bias", None), getattr(source, "v_bias", None)
        self.register_buffer("k_bias", getattr(source, "k_bias", None), persistent=False)
        self.num_kv_heads: int = getattr(source, "num_kv_heads", self.num_heads)
        self.rotate_half: bool = getattr(source, "rotate_half", False)
        self.num_unrotated: int = getattr(source, "num_prefix_tokens", 0)
        """Prefix tokens, which have no position."""

    def project(self, source: MixerInput) -> Heads:
        """Into the subspaces."""
        queries, keys, values = self._queries_keys_values(source.x)
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        if source.rope is not None:
            queries, keys = self._rotated(queries, source.rope), self._rotated(keys, source.rope)
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
        return Heads(source, queries, keys, values)

    def _queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, H, N, P)`` each, keys and values with as many heads as they have."""
        (b, n, _), own = x.shape, cast(Any, self)
        separate = self._separate_projections()
        if separate is not None:
            projected = tuple(projection(x) for projection in separate)
        else:
            joint = own.qkv(x)
            if own.q_bias is not None:
                joint = joint + torch.cat((own.q_bias, own.k_bias, own.v_bias)).to(joint.dtype)
            projected = joint.chunk(3, -1)
        queries, keys, values = (t.view(b, n, -1, self.head_dim).transpose(1, 2) for t in projected)
        return queries, keys, values

    def _separate_projections(self) -> tuple[nn.Module, nn.Module, nn.Module] | None:
        """Those of queries, keys and values; None if there is a joint one."""
        own = cast(Any, self)
        return None if own.q_proj is None else (own.q_proj, own.k_proj, own.v_proj)

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, grid = x[:, :, : self.num_unrotated], x[:, :, self.num_unrotated :]
        return torch.cat([prefix, apply_rot_embed_cat(grid, rope, half=self.rotate_half)], dim=2)
