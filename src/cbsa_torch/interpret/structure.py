"""Properties of layers: overlap of the heads' subspaces, rank of A, sparsity of ISTA's codes."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch._core.linear import matrix_of
from cbsa_torch._core.modes import uncompiled
from cbsa_torch.interpret.capture import attention_layers, captured_batches, check_batches, named_modules
from cbsa_torch.nn import CBSA, ISTA
from cbsa_torch.nn.ista import FusedISTA


class AttentionRanks(NamedTuple):
    """Ranks of the attention matrices A of CBSA layers, of certified steps of B; ``[layer][head]``.

    Means over images. B are all weights of the tokens in the representatives.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import attention_ranks
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> ranks = attention_ranks(model, [torch.randn(4, 1, 8, 8)])
        >>> ranks.effective_rank[0][0] <= 16  # of 16 representatives
        True
    """

    layers: list[str]
    rank: list[list[float]]
    """Numerical rank: singular values above ``max(M, N) * eps * largest``, eps of the dtype A came in."""
    effective_rank: list[list[float]]
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli, 2007)."""
    images: int


class Sparsity(NamedTuple):
    """How sparse the codes are; the list runs over ISTA layers.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import ista_sparsity
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> found = ista_sparsity(model, [torch.randn(4, 1, 8, 8)])
        >>> found.layers[0], found.images
        ('blocks.0.ista', 4)
    """

    layers: list[str]
    zeros: list[float]
    """Share of exact zeros among all entries, in [0, 1]."""
    images: int


@torch.no_grad()
def subspace_coherence(model: nn.Module) -> dict[str, Tensor]:
    """How far the heads' subspaces of each layer overlap: 0 is orthogonal, 1 a common direction.

    For heads i and j it is the cosine of the smallest principal angle between the column spaces of U_i and
    U_j (the rows of the matrix of ``layer.qkv``): the largest singular value of Q_i^T Q_j for orthonormal bases
    Q_i of the two. The theory asks for 0 off the diagonal (U_i^T U_j = 0, section 2 of the paper). Random
    subspaces are not orthogonal either: for large P and C with P / C = r <= 1/2 the value is near
    2 sqrt(r (1 - r)), which is 0.75 for 6 heads of 64 in 384 channels.

    Args:
        model: a model with mixers of this library or timm's ``Attention``; nothing is run. With separate
            projections the query's is taken.

    Returns:
        Layer name to a symmetric ``(H, H)`` float64 tensor on the CPU; 1 on the diagonal, and 0 in the row
        of a head whose basis is zero. NaN for a head whose basis is not finite.

    Raises:
        ValueError: a model without such layers.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.interpret import subspace_coherence
        >>> coherence = subspace_coherence(torch.nn.Sequential(CBSA(64, 4, orthogonal=True)))
        >>> coherence["0"].round(decimals=3).abs()
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 1.]], dtype=torch.float64)
    """
    return {name: _coherence(layer) for name, layer in attention_layers(model).items()}


def _coherence(layer: nn.Module) -> Tensor:
    weight, heads = basis_of(layer), int(layer.num_heads)  # type: ignore[arg-type]
    bases = weight.double().cpu().unflatten(0, (heads, -1))  # (H, P, C)
    broken = ~bases.isfinite().all(-1).all(-1)
    # The SVD is a QR that also says which directions a basis of low rank does not have.
    _, values, rows = torch.linalg.svd(bases.masked_fill(broken[:, None, None], 0.0), full_matrices=False)
    # Directions whose singular value is rounding error of the weight's precision do not count.
    smallest = max(bases.shape[1:]) * torch.finfo(weight.dtype).eps * values[:, :1]
    directions = rows * (values > smallest)[..., None]  # (H, min(P, C), C), zero where there is none
    first, second = torch.triu_indices(heads, heads)
    cosines = torch.zeros(heads, heads, dtype=torch.float64)
    cosines[first, second] = torch.linalg.svdvals(directions[first] @ directions[second].mT)[:, 0].clamp(
        max=1.0
    )
    cosines[second, first] = cosines[first, second]
    return cosines.masked_fill(broken[:, None] | broken[None], float("nan"))


def basis_of(layer: nn.Module) -> Tensor:
    """The bases U_k of an attention layer's heads as rows, ``(H * P, C)``; detached.

    They are the matrix of its input projection; if queries, keys and values have projections of their own, of
    that of the queries.
    """
    # A layer adapted from a rotary one may have a module of its own for queries.
    projection: nn.Module = layer.q_proj if layer.qkv is None else layer.qkv  # type: ignore[assignment]
    rows = int(layer.num_heads) * int(layer.head_dim)  # type: ignore[arg-type]
    return matrix_of(projection, _input_like(projection))[:rows].detach()


def _input_like(projection: nn.Module) -> Tensor:
    """An empty tensor with the channels, dtype and device of a linear layer's inputs."""
    tensors = (*projection.parameters(), *projection.buffers())
    like = next((t for t in tensors if t.is_floating_point() and not t.is_meta), torch.empty(0))
    return torch.empty(0, projection.in_features, dtype=like.dtype, device=like.device)  # type: ignore[call-overload]


def attention_ranks(model: nn.Module, batches: Iterable[Tensor]) -> AttentionRanks:
    """Measure the rank of every head's A: how many representatives differ from one another (Appendix A).

    Pooled representatives should give full rank, M; learned ones collapse to few directions. An image whose
    tokens are all masked has rank 0. Of a certified step it is the rank of B, all weights of the tokens in the
    representatives.

    Args:
        model: a model with CBSA layers, run as it is; layers of other kinds are left out.
        batches: inputs of the model.

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, or a model without CBSA layers.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import attention_ranks
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> ranks = attention_ranks(model, [torch.randn(4, 1, 8, 8)])
        >>> len(ranks.rank), ranks.images
        (1, 4)
    """
    if not any(isinstance(module, CBSA) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no CBSA layer, whose attention to take the rank of")
    found: dict[str, list[Tensor]] = {}  # (2, B, H) of each batch
    for records in captured_batches(model, batches):
        for name, record in records.items():
            if (weights := record.token_weights) is not None:
                found.setdefault(name, []).append(_ranks(weights))
    ranks = [torch.cat(parts, 1) for parts in found.values()]
    return AttentionRanks(
        layers=list(found),
        rank=[rank.mean(0).tolist() for rank, _ in ranks],
        effective_rank=[effective.mean(0).tolist() for _, effective in ranks],
        images=ranks[0].shape[1] if ranks else 0,
    )


@torch.no_grad()
def _ranks(attention: Tensor) -> Tensor:
    """Rank and effective rank, ``(2, B, H)``, of ``(B, H, M, N)`` matrices; NaN where they are not finite."""
    matrix = attention.double().cpu()  # svdvals has no batched kernel on some devices, and mps no float64
    broken = ~matrix.isfinite().all(-1).all(-1)
    values = torch.linalg.svdvals(matrix.masked_fill(broken[..., None, None], 0.0))
    smallest = max(matrix.shape[-2:]) * torch.finfo(attention.dtype).eps * values[..., :1]
    rank = (values > smallest).sum(-1).double()
    total = values.sum(-1, keepdim=True)
    share = values / total.where(total > 0, 1.0)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    effective = entropy.exp().where(total[..., 0] > 0, 0.0)
    return torch.stack([rank, effective]).masked_fill(broken, float("nan"))


def ista_sparsity(model: nn.Module, batches: Iterable[Tensor]) -> Sparsity:
    """Measure the share of exact zeros after every :class:`cbsa_torch.nn.ISTA`, fused or not.

    Every token counts, padding too: ISTA does not know of masks. A layer that is called more than once
    counts all its calls.

    Args:
        model: a model with ISTA layers, run as it is; a compiled one runs uncompiled meanwhile.
        batches: inputs of the model.

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, or a model without ISTA layers.

    Examples:
        >>> from cbsa_torch import ISTA
        >>> from cbsa_torch.interpret import ista_sparsity
        >>> ista_sparsity(torch.nn.Sequential(ISTA(64)), [torch.zeros(2, 10, 64)]).zeros
        [1.0]
    """
    found = {name: module for name, module in named_modules(model) if isinstance(module, (ISTA, FusedISTA))}
    if not found:
        raise ValueError(f"{type(model).__name__} has no ISTA layer")
    counts: dict[str, list[int]] = {}
    images = 0

    def count(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        seen = counts.setdefault(name, [0, 0])
        seen[0] += output.numel() - int(output.count_nonzero())
        seen[1] += output.numel()

    with ExitStack() as hooks, torch.no_grad(), uncompiled():
        for name, module in found.items():
            hooks.enter_context(module.register_forward_hook(functools.partial(count, name)))
        for batch in check_batches(batches):
            model(batch)
            images += len(batch)
    return Sparsity(list(counts), [zeros / total for zeros, total in counts.values()], images)
