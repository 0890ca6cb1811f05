"""Softmax attention as layers: MSSA of CRATE, and standard multi-head attention as the baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.scripted import ScriptedSoftmaxAttention
from cbsa_torch.nn.tokens import Heads
from cbsa_torch.ops import counting


class _SoftmaxAttention(TokenMixer):
    """What both do between their projections."""

    compares_tokens = True

    def mix(self, heads: Heads) -> Tensor:
        """Apply :func:`cbsa_torch.ops.softmax_attention`."""
        return ops.softmax_attention(
            heads.queries,
            heads.keys,
            heads.values,
            key_mask=heads.source.token_mask,
            attn_mask=heads.source.attn_mask,
            dropout=self.attn_drop if self.training else 0.0,
        )

    def scripted_operator(self) -> nn.Module:
        """PyTorch's fused attention."""
        return ScriptedSoftmaxAttention(self.attn_drop)

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count both products with the N x N matrix."""
        n = heads.queries.shape[2]
        return counting.softmax_attention(n, num_heads=self.num_heads, head_dim=self.head_dim)


class MSSA(_SoftmaxAttention):
    """Multi-head Subspace Self-Attention of CRATE (Eq. 9): softmax attention with one shared projection.

    CBSA with all tokens as representatives; O(N^2). Use it as ``x + MSSA(norm(x))``. Its operator is
    :func:`cbsa_torch.ops.mssa`.

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`.

    Examples:
        >>> from cbsa_torch import MSSA
        >>> MSSA(384, num_heads=6)(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        super().__init__(dim, num_heads, qkv="shared", **options)


class MHSA(_SoftmaxAttention):
    """Standard multi-head self-attention (Vaswani et al., 2017), the black-box baseline; O(N^2).

    Queries, keys and values have projections of their own, so there are no bases to tie or keep orthogonal.

    Args:
        dim: channels of input and output.
        num_heads: number of heads H.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`; ``tied`` and ``orthogonal`` raise.

    Examples:
        >>> from cbsa_torch import MHSA
        >>> MHSA(384, num_heads=6, qkv_bias=True)(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        super().__init__(dim, num_heads, qkv="separate", **options)
