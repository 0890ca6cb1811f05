"""Counting: FLOPs and pairwise similarities of each mechanism (Table 1, Table 4, Fig. 2 and 9).

FLOPs are those of matrix products, two per multiply-add, as ``torch.utils.flop_counter`` counts them, plus
those of factorisations, which it does not see. Softmax, norms, pooling and other work per element are left
out, by torch as well. The paper's Table 1 counts multiply-adds.

Similarities are the inner products that decide who attends to whom, as we read the paper's Table 4: per
head N M between tokens and M representatives, M (M + 1) / 2 more for a softmax contraction among them, N^2
for softmax attention (although it is symmetric in MSSA), N P between tokens and P directions. Read so, the
table is reproduced for CBSA, TSSA and MSSA.

Examples:
    >>> from cbsa_torch.ops import counting
    >>> step = counting.cbsa(196, 64, num_heads=6, head_dim=64)
    >>> full = counting.softmax_attention(196, num_heads=6, head_dim=64)
    >>> step.flops / full.flops, step.similarities, full.similarities
    (0.5964181591003749, 87744, 230496)
"""

from __future__ import annotations

from typing import NamedTuple

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.types import CONTRACTIONS, LINEAR_SOLVERS, Contraction, LinearSolver


class Counts(NamedTuple):
    """What one evaluation on one item costs.

    Examples:
        >>> from cbsa_torch.ops.counting import Counts, linear
        >>> linear(196, 384, 384) + 2 * Counts(products=10)
        Counts(products=57802772, factorizations=0, similarities=0)
    """

    products: int = 0
    """FLOPs of matrix products, two per multiply-add."""
    factorizations: int = 0
    """FLOPs of Cholesky factors, solves and eigendecompositions: the leading term of the textbook count."""
    similarities: int = 0
    """Inner products that decide who attends to whom (see above)."""

    @property
    def flops(self) -> int:
        """All FLOPs that are counted."""
        return self.products + self.factorizations

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        """Field by field."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, number: int) -> Counts:  # type: ignore[override]
        """The same ``number`` times over."""
        return Counts(*(number * count for count in self))

    def __rmul__(self, number: int) -> Counts:  # type: ignore[override]
        """The same; a tuple would repeat its fields."""
        return self * number


def linear(num_tokens: int, in_features: int, out_features: int) -> Counts:
    """A linear layer over ``num_tokens`` tokens.

    Examples:
        >>> from cbsa_torch.ops.counting import linear
        >>> linear(196, 384, 1536).flops
        231211008
    """
    return Counts(products=2 * num_tokens * in_features * out_features)


def ista(num_tokens: int, dim: int, *, fused: bool = False) -> Counts:
    """ISTA with a square dictionary as published: D^T (x - D x), two products (the official code takes three).

    ``fused``: by its matrix, which was made once: one product, see ``ISTA.fuse``.

    Examples:
        >>> from cbsa_torch.ops.counting import ista
        >>> ista(196, 384).flops / ista(196, 384, fused=True).flops
        2.0
    """
    return Counts(products=(2 if fused else 4) * num_tokens * dim**2)


def cbsa(
    num_tokens: int,
    num_representatives: int,
    *,
    num_heads: int,
    head_dim: int,
    contraction: Contraction = "softmax",
    extracted: bool = True,
    grams: int = 0,
) -> Counts:
    """CBSA inside the heads: extraction, contraction and broadcast.

    ``extracted=False``: the representatives come with their attention, so that nothing is extracted, and
    what that attention costs is not counted here. ``grams``: M x M products of weights over the tokens, which
    a certified step takes, two if its initial guesses are made of tokens, else one.

    Examples:
        >>> from cbsa_torch.ops.counting import cbsa
        >>> cbsa(196, 64, num_heads=6, head_dim=64)
        Counts(products=35192832, factorizations=0, similarities=87744)
    """
    check_choice("contraction", contraction, CONTRACTIONS)
    n, m, p = num_tokens, num_representatives, head_dim
    products = 2 * n * m * p + (4 * n * m * p if extracted else 0) + 2 * grams * n * m**2
    similarities = n * m if extracted else 0
    factorizations = 0
    if contraction == "softmax":
        products += 4 * m**2 * p
        similarities += m * (m + 1) // 2
    elif contraction == "exact":
        side = min(m, p)
        products += 2 * m * p * side
        factorizations = side**3 // 3 + 2 * side**2 * max(m, p)
    return Counts(num_heads * products, num_heads * factorizations, num_heads * similarities)


def softmax_attention(num_tokens: int, *, num_heads: int, head_dim: int) -> Counts:
    """Softmax attention among N tokens, MSSA included (9).

    Examples:
        >>> from cbsa_torch.ops.counting import softmax_attention
        >>> softmax_attention(196, num_heads=6, head_dim=64)
        Counts(products=59006976, factorizations=0, similarities=230496)
    """
    n = num_tokens
    return Counts(4 * num_heads * n**2 * head_dim, 0, num_heads * n**2)


def agent_attention(
    num_tokens: int, num_agents: int, *, num_heads: int, head_dim: int, separate: bool = False
) -> Counts:
    """Agent attention: two softmax attentions between N tokens and M agents.

    With one projection for queries and keys the similarities of both are the same numbers; ``separate``
    counts them twice.

    Examples:
        >>> from cbsa_torch.ops.counting import agent_attention
        >>> agent_attention(196, 64, num_heads=6, head_dim=64)
        Counts(products=38535168, factorizations=0, similarities=75264)
    """
    pairs = num_heads * num_tokens * num_agents
    return Counts(8 * pairs * head_dim, 0, pairs * (2 if separate else 1))


def linear_cbsa(num_tokens: int, *, num_heads: int, head_dim: int, solver: LinearSolver = "cholesky") -> Counts:
    """Linear attention (12): the Gram matrix, its filter, and the filter applied.

    Examples:
        >>> from cbsa_torch.ops.counting import linear_cbsa
        >>> linear_cbsa(196, num_heads=6, head_dim=64)
        Counts(products=19267584, factorizations=3670014, similarities=75264)
    """
    check_choice("solver", solver, LINEAR_SOLVERS)
    n, p = num_tokens, head_dim
    products = 4 * n * p**2
    if solver == "eigh":
        products, factorizations = products + 2 * p**3, 9 * p**3
    else:
        factorizations = p**3 // 3 + 2 * p**3
    return Counts(num_heads * products, num_heads * factorizations, num_heads * n * p)


def linear_attention(num_tokens: int, *, num_heads: int, head_dim: int) -> Counts:
    """Linear attention with 2 P features: values gathered by them, given back, and the normaliser.

    Examples:
        >>> from cbsa_torch.ops.counting import linear_attention
        >>> linear_attention(196, num_heads=6, head_dim=64)
        Counts(products=38836224, factorizations=0, similarities=150528)
    """
    n, p = num_tokens, head_dim
    return Counts(num_heads * (8 * n * p**2 + 4 * n * p), 0, 2 * num_heads * n * p)


def principal_directions(num_tokens: int, *, num_heads: int, head_dim: int) -> Counts:
    """Principal directions: the Gram matrix, its eigenvectors, and how far every token reaches along them.

    Examples:
        >>> from cbsa_torch.ops.counting import principal_directions
        >>> principal_directions(196, num_heads=6, head_dim=64)
        Counts(products=19267584, factorizations=14155776, similarities=75264)
    """
    n, p = num_tokens, head_dim
    return Counts(4 * num_heads * n * p**2, 9 * num_heads * p**3, num_heads * n * p)


def basis_directions(num_tokens: int, *, num_heads: int, head_dim: int) -> Counts:
    """How far every token reaches along a fixed basis.

    Examples:
        >>> from cbsa_torch.ops.counting import basis_directions
        >>> basis_directions(196, num_heads=6, head_dim=64)
        Counts(products=9633792, factorizations=0, similarities=75264)
    """
    similarities = num_heads * num_tokens * head_dim
    return Counts(2 * similarities * head_dim, 0, similarities)


def channel_attention(num_tokens: int, *, num_heads: int, head_dim: int, weighted: bool = False) -> Counts:
    """Channel attention (13) along the standard basis; ``weighted``: TSSA's mean weighted by membership.

    Examples:
        >>> from cbsa_torch.ops.counting import channel_attention
        >>> channel_attention(196, num_heads=6, head_dim=64, weighted=True)
        Counts(products=150528, factorizations=0, similarities=75264)
    """
    similarities = num_heads * num_tokens * head_dim
    return Counts(2 * similarities if weighted else 0, 0, similarities)
