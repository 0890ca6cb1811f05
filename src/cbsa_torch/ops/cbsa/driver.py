"""CBSA with a shared broadcast in memory linear in N: nothing of size M x N is kept, forward or backward.

Forward, one pass over the tokens extracts, a second computes the attention again and broadcasts. Backward, one
pass collects A dO and, after the derivative of the contraction, one does the rest. Passes are ``Tiles`` (plain
PyTorch) or ``TritonPasses``, two classes with the same methods; the work between them, here, is of size M x P
per head. Saved for the backward pass are the inputs, the picked tokens R and the normaliser of the softmax.

A certified step gives the tokens B^T K with K = -kappa C and B = Pi + eta A. Here kappa is found, from sums
that the first pass takes, and eta A^T K is broadcast; K is returned, too, for Pi^T K to be added outside. A Pi
that is a matrix is an input, M x N for an item, all heads together.

Inputs of low precision are computed in float32, except for products over tokens: the Triton kernels multiply in
the dtype of the keys, and a product with an output projection is bfloat16 for bfloat16 keys.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.types import CellPooling, Cells, GridPooling
from cbsa_torch.ops.cbsa.certified import RunningGram
from cbsa_torch.ops.cbsa.contraction import contract, linearized
from cbsa_torch.ops.cbsa.tiles import Tiles
from cbsa_torch.ops.masking import zero_rows
from cbsa_torch.ops.token_weights import TokenWeights, columns
from cbsa_torch.ops.token_weights import gram as gram_of_weights

if TYPE_CHECKING:
    from cbsa_torch.ops.cbsa.triton.passes import TritonPasses


class Problem(NamedTuple):
    """What is to be computed, in arguments that an operator of ``torch.library`` can take."""

    representatives: Tensor
    """``(B, H, M, P)``."""
    keys: Tensor
    """``(B, H, N, P)``."""
    values: Tensor | None
    """``(B, H, N, P)``, or None if they are the keys."""
    step_representatives: Tensor
    """eta ``(H,)``."""
    step_tokens: Tensor
    """kappa ``(H,)``, or in parts of its limit if the step is certified."""
    key_mask: Tensor | None
    """``(B, N)`` bool."""
    representative_mask: Tensor | None
    """``(B, M)`` bool."""
    out_weight: Tensor | None
    """``(C, H * P)`` projects out: the output is ``(B, N, C)``, not ``(B, H, N, P)``. For ``"tiled"`` only."""
    out_bias: Tensor | None
    """``(C,)``."""
    token_weights: Tensor | None
    """Pi of a certified step as a matrix, ``(1 or B, M, N)``."""
    cell_index: Tensor | None
    """Pi of a certified step as means over cells: ``Cells``, ``(B, n)``."""
    cell_counts: Tensor | None
    """``(B, M)``."""
    cell_order: Tensor | None
    """``(B, n)``."""
    contraction: str
    scale: float
    """Factor on the logits."""
    eps: float
    """Of the exact contraction."""
    impl: str
    """Whose passes: ``"tiled"`` or ``"triton"``."""
    certified: bool = False
    """Whether the step is certified. For ``"tiled"`` and the exact contraction only."""
    grid_size: Sequence[int] = ()
    """Pi of a certified step as a pooling of a grid, fields of ``GridPooling``; empty if it is none."""
    cells: Sequence[int] = ()
    first: int = 0
    """Tokens before those that are pooled, over a grid or cells."""


class Results(NamedTuple):
    """What the forward pass returns."""

    output: Tensor
    """``(B, H, N, P)``, or ``(B, N, C)`` with ``out_weight``."""
    picked: Tensor
    """R = A V, ``(B, H, M, P)``."""
    normalizer: Tensor
    """``(B, H, M, S)`` what turns the logits into A in the next passes; its meaning is the passes' own."""
    step: Tensor
    """K = -kappa C of a certified step, ``(B, H, M, P)``; empty if it is free."""
    limit: Tensor
    """The longest certified step, ``(B, H)``; empty if it is free."""


class Gradients(NamedTuple):
    """What the backward pass returns, shaped like the inputs; empty for those that are None."""

    representatives: Tensor
    keys: Tensor
    values: Tensor
    step_representatives: Tensor
    step_tokens: Tensor
    out_weight: Tensor
    out_bias: Tensor


def passes_of(impl: str) -> type[Tiles] | type[TritonPasses]:
    """The passes of an implementation. Triton is imported only here, since it is optional."""
    if impl == "tiled":
        return Tiles
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "impl='triton' needs 'triton', which is not installed; PyTorch for CUDA brings it on Linux, "
            "elsewhere install it with: pip install triton"
        )
    from cbsa_torch.ops.cbsa.triton.passes import TritonPasses

    return TritonPasses


def like_tokens(tokens: Tensor) -> Tensor:
    """Empty ``(B, H, N, P)``, laid out so that joining the heads is no copy."""
    b, h, n, p = tokens.shape
    return tokens.new_empty(b, n, h, p).transpose(1, 2)


def empty_results(problem: Problem) -> Results:
    """Tensors for what the forward pass returns."""
    b, _, n, _ = problem.keys.shape
    if problem.out_weight is None:
        output = like_tokens(problem.keys)
    else:
        output = problem.keys.new_empty(b, n, problem.out_weight.shape[0])
    sizes, dtype = problem.representatives.shape, compute_dtype(problem.keys.dtype)
    picked = problem.keys.new_empty(sizes, dtype=dtype)
    normalizer = problem.keys.new_zeros(*sizes[:3], passes_of(problem.impl).normalizer_size(n), dtype=dtype)
    step, limit = torch.empty_like(picked), picked.new_empty(sizes[:2])
    if not problem.certified:
        step, limit = picked.new_empty(0), picked.new_empty(0)
    return Results(output, picked, normalizer, step, limit)


def forward(problem: Problem) -> Results:
    """Extract, contract, broadcast."""
    with no_autocast(problem.keys):
        representatives, eta, kappa, weight = _operands(problem)
        bias = None if problem.out_bias is None else problem.out_bias.to(problem.keys.dtype)
        results = empty_results(problem)
        for group, part, exists in _parts(problem, representatives):
            gram = None
            if problem.certified:
                assert isinstance(part, Tiles), "other passes are refused before"
                gram = _gram_of(problem, group)
                picked, normalizer = part.extract(gram)
            else:
                picked, normalizer = part.extract()
            results.picked[group], results.normalizer[group, ..., : normalizer.shape[-1]] = picked, normalizer
            rep = zero_rows(representatives[group] + eta * picked, exists)
            c = contract(rep, problem.contraction, problem.scale, problem.eps, exists)
            if gram is None:
                carried = kappa * c
            else:
                results.limit[group] = _limit(gram, eta, problem, group)
                results.step[group] = _certified(kappa, results.limit[group]) * c
                carried = eta * results.step[group]
            if weight is not None:
                carried = carried @ weight  # kappa C U_out
            part.broadcast(carried, bias, results.output[group])
        return results


def backward(
    gradient: Tensor,
    picked: Tensor,
    normalizer: Tensor,
    d_step: Tensor | None,
    longest: Tensor,
    problem: Problem,
) -> Gradients:
    """Gradients from those of the output and of a certified ``step`` (None: 0)."""
    with no_autocast(problem.keys):
        representatives, eta, kappa, weight = _operands(problem)
        d_representatives = torch.empty_like(representatives, memory_format=torch.contiguous_format)
        d_keys = like_tokens(problem.keys)
        d_values = None if problem.values is None else like_tokens(problem.keys)
        d_eta, d_kappa = (representatives.new_zeros(problem.keys.shape[1]) for _ in range(2))
        d_weight = torch.zeros_like(representatives.new_empty(0) if weight is None else weight)
        for group, part, exists in _parts(problem, representatives, normalizer):
            rep = zero_rows(representatives[group] + eta * picked[group], exists)
            c, derivative = linearized(rep, problem.contraction, problem.scale, problem.eps, exists)
            length = _certified(kappa, longest[group]) if problem.certified else kappa
            given = eta * length * c if problem.certified else length * c
            carried = given if weight is None else given @ weight
            d_given = collected = part.collect(gradient[group])
            if weight is not None:
                d_given = collected @ weight.mT
                d_weight += (given.mT @ collected).sum(0)
            if problem.certified:
                d_eta += (d_given * length * c).sum((0, 2, 3))
                d_given = eta * d_given if d_step is None else eta * d_given + d_step[group]
                d_kappa -= ((d_given * c).sum((2, 3)) * longest[group]).sum(0)
            else:
                d_kappa += (d_given * c).sum((0, 2, 3))
            d_rep = derivative(length * d_given)
            d_eta += (d_rep * picked[group]).sum((0, 2, 3))
            d_representatives[group] = d_rep + part.differentiate(
                gradient[group],
                carried=carried,
                collected=collected,
                d_picked=eta * d_rep,
                picked=picked[group],
                d_keys=d_keys[group],
                d_values=_of(d_values, group),
            )
        d_representatives = zero_rows(d_representatives, problem.representative_mask)
        d_out_weight = d_out_bias = None
        if problem.out_weight is not None:
            d_out_weight = d_weight.flatten(0, 1).t().to(problem.out_weight).contiguous()
        if problem.out_bias is not None:
            d_out_bias = gradient.sum((0, 1), dtype=representatives.dtype).to(problem.out_bias)
        found = (
            d_representatives.to(problem.representatives.dtype).contiguous(),
            d_keys,
            d_values,
            d_eta.to(problem.step_representatives.dtype),
            d_kappa.to(problem.step_tokens.dtype),
            d_out_weight,
            d_out_bias,
        )
        return Gradients(*(problem.keys.new_empty(0) if d is None else d for d in found))


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """In the dtype to compute in: representatives, both steps ``(H, 1, 1)``, projection ``(H, P, C)``."""
    dtype = compute_dtype(problem.keys.dtype)
    representatives = zero_rows(problem.representatives.to(dtype), problem.representative_mask)
    eta, kappa = (step.to(dtype)[:, None, None] for step in (problem.step_representatives, problem.step_tokens))
    weight = problem.out_weight
    if weight is not None:
        weight = weight.t().unflatten(0, (problem.keys.shape[1], problem.keys.shape[3])).to(dtype)
    return representatives, eta, kappa, weight


def _certified(fraction: Tensor, limit: Tensor) -> Tensor:
    """-kappa ``(B, H, 1, 1)`` from the parts ``(H, 1, 1)`` of the limits ``(B, H)``."""
    return -fraction * limit[..., None, None]


def _token_weights(problem: Problem, group: slice) -> TokenWeights | None:
    if problem.cell_index is not None:
        parts = (_of(t, group) for t in (problem.cell_index, problem.cell_counts, problem.cell_order))
        return CellPooling(Cells(*parts), problem.first)  # type: ignore[arg-type]
    if problem.cells:
        return GridPooling(tuple(problem.grid_size), tuple(problem.cells), problem.first)
    weights = problem.token_weights
    return weights if weights is None or weights.shape[0] == 1 else weights[group]


def _gram_of(problem: Problem, group: slice) -> RunningGram:
    """What sums up G = B B^T of these items as their tokens are extracted from."""
    weights = _token_weights(problem, group)
    if weights is None:
        return RunningGram(None)
    like = problem.keys.new_empty(0, dtype=compute_dtype(problem.keys.dtype))
    return RunningGram(lambda place: columns(weights, place, like))


def _limit(gram: RunningGram, eta: Tensor, problem: Problem, group: slice) -> Tensor:
    """The longest certified step ``(B, H)`` from the sums over all tokens."""
    assert gram.own is not None, "of the tiles"
    real = _of(problem.representative_mask, group)
    if problem.key_mask is not None:
        some = problem.key_mask[group].any(-1, keepdim=True)  # (B, 1)
        real = some.expand(-1, gram.own.shape[2]) if real is None else real & some
    if real is not None:
        gram.own = zero_rows(zero_rows(gram.own, real).mT, real)
        gram.cross = None if gram.cross is None else zero_rows(gram.cross, real)
    weights = _token_weights(problem, group)
    return gram.limit(eta, None if weights is None else gram_of_weights(weights, gram.own))


def _parts(
    problem: Problem, representatives: Tensor, normalizer: Tensor | None = None
) -> Iterator[tuple[slice, Tiles | TritonPasses, Tensor | None]]:
    """The items group by group: which they are, the passes over their tokens, their mask of representatives."""
    passes = passes_of(problem.impl)
    for group in passes.groups(problem.keys.shape[0], problem.keys.shape[2]):
        values, mask, exists, saved = (
            _of(t, group) for t in (problem.values, problem.key_mask, problem.representative_mask, normalizer)
        )
        part = passes(representatives[group], problem.keys[group], values, mask, problem.scale, saved)
        yield group, part, exists


def _of(rows: Tensor | None, group: slice) -> Tensor | None:
    return None if rows is None else rows[group]
