"""Linear attention as a layer: separate queries, keys and values, as in a ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.tokens import Heads
from cbsa_torch.ops import counting


class LinearAttention(TokenMixer):
    """Linear attention that a pretrained ViT can become (:func:`cbsa_torch.ops.linear_attention`); O(N), no
    grid.

    The baseline beside CBSA in the adaptation of pretrained ViTs. :class:`cbsa_torch.LinearCBSA` is the paper's
    linear attention (12), with one projection for all three. Use it as ``x + LinearAttention(norm(x))``.

    Args:
        dim: channels of input and output.
        num_heads: number of heads H.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`; ``tied`` and ``orthogonal`` raise.

    Attributes:
        temperature: ``(H,)``, learned, 1 at first: how sharply heads attend.

    Examples:
        >>> from cbsa_torch.nn import LinearAttention
        >>> LinearAttention(384, num_heads=6)(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    def __init__(self, dim: int, num_heads: int = 8, **options: Any) -> None:
        super().__init__(dim, num_heads, qkv="separate", **options)
        self.temperature = self._per_head()
        self._reset_steps()

    def _reset_steps(self) -> None:
        nn.init.ones_(self.temperature)

    def mix(self, heads: Heads) -> Tensor:
        """Apply :func:`cbsa_torch.ops.linear_attention`."""
        return ops.linear_attention(
            heads.queries,
            heads.keys,
            heads.values,
            temperature=self.temperature,
            key_mask=heads.source.token_mask,
        )

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count the products with the features."""
        n = heads.queries.shape[2]
        return counting.linear_attention(n, num_heads=self.num_heads, head_dim=self.head_dim)
