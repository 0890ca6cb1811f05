"""CBSA with a shared broadcast in memory linear in N: nothing of size M x N is kept, forward or backward.

Forward, one pass over the tokens extracts, a second computes the attention again and broadcasts. Backward, one
pass collects A dO and, after the derivative of the contraction, one does the rest. Passes are
:class:`~cbsa_torch.ops.cbsa.tiles.Tiles` (plain PyTorch) or Triton kernels; the work between them, here, is of
size M x P per head. Saved for the backward pass are the inputs, the picked tokens R and the normaliser of the
softmax.

Inputs of low precision are computed in float32, except for products over tokens: the Triton kernels multiply in
the dtype of the keys, and a product with an output projection is bfloat16 for bfloat16 keys.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch.ops.cbsa.contraction import contract, contract_backward
from cbsa_torch.ops.cbsa.tiles import Tiles
from cbsa_torch.ops.masking import zero_rows


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
    """kappa ``(H,)``."""
    key_mask: Tensor | None
    """``(B, N)`` bool."""
    representative_mask: Tensor | None
    """``(B, M)`` bool."""
    out_weight: Tensor | None
    """``(C, H * P)`` projects out: the output is ``(B, N, C)``, not ``(B, H, N, P)``. For ``"tiled"`` only."""
    out_bias: Tensor | None
    """``(C,)``."""
    contraction: str
    scale: float
    """Factor on the logits."""
    eps: float
    """Of the exact contraction."""
    impl: str
    """Whose passes: ``"tiled"`` or ``"triton"``."""


class Results(NamedTuple):
    """What the forward pass returns."""

    output: Tensor
    """``(B, H, N, P)``, or ``(B, N, C)`` with ``out_weight``."""
    picked: Tensor
    """R = A V, ``(B, H, M, P)``."""
    normalizer: Tensor
    """``(B, H, M, S)`` what turns the logits into A in the next passes; its meaning is the passes' own."""


class Gradients(NamedTuple):
    """What the backward pass returns, shaped like the inputs; empty for those that are None."""

    representatives: Tensor
    keys: Tensor
    values: Tensor
    step_representatives: Tensor
    step_tokens: Tensor
    out_weight: Tensor
    out_bias: Tensor


class Passes(Protocol):
    """The passes over the tokens of a few items.

    Args:
        queries: ``(B, H, M, P)``, in the dtype to compute in.
        keys: ``(B, H, N, P)``, any strides and dtype.
        values: like ``keys``, or None if they are the keys.
        mask: ``(B, N)`` bool; rows of masked tokens are read as zeros, whatever they hold.
        scale: factor on the logits.
        normalizer: of an earlier :meth:`extract`; None before it.
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        scale: float,
        normalizer: Tensor | None = None,
    ) -> None: ...

    @staticmethod
    def groups(b: int, n: int) -> Iterator[slice]:
        """The items that are handled together."""
        ...

    @staticmethod
    def normalizer_size(n: int) -> int:
        """A bound on S for N tokens, by arithmetic alone: N may be a symbol."""
        ...

    def extract(self) -> tuple[Tensor, Tensor]:
        """R = A V ``(B, H, M, P)`` and the normalizer ``(B, H, M, S)``; zeros for items without real tokens."""
        ...

    def broadcast(self, carried: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """Write A^T ``carried`` into ``output``."""
        ...

    def collect(self, gradient: Tensor) -> Tensor:
        """A dO, ``(B, H, M, P)`` or ``(B, H, M, C)``, from a gradient shaped like the output."""
        ...

    def differentiate(
        self,
        gradient: Tensor,
        *,
        carried: Tensor,
        collected: Tensor,
        d_picked: Tensor,
        picked: Tensor,
        d_keys: Tensor,
        d_values: Tensor | None,
    ) -> Tensor:
        """Write dK and dV (dK + dV without ``d_values``); return the gradient of Q through A.

        ``collected`` is A dO, ``d_picked`` the gradient of R. D_i = sum_n A_in dA_in needs no pass of its own:
        it is made of tensors of size M x P.
        """
        ...


def passes_of(impl: str) -> type[Passes]:
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


def empty_results(o: Problem) -> Results:
    """Tensors for what the forward pass returns."""
    b, _, n, _ = o.keys.shape
    output = like_tokens(o.keys) if o.out_weight is None else o.keys.new_empty(b, n, o.out_weight.shape[0])
    sizes, dtype = o.representatives.shape, compute_dtype(o.keys.dtype)
    picked = o.keys.new_empty(sizes, dtype=dtype)
    normalizer = o.keys.new_zeros(*sizes[:3], passes_of(o.impl).normalizer_size(n), dtype=dtype)
    return Results(output, picked, normalizer)


def forward(o: Problem) -> Results:
    """Extract, contract, broadcast."""
    passes = passes_of(o.impl)
    with no_autocast(o.keys):
        queries, eta, kappa, weight = _operands(o)
        bias = None if o.out_bias is None else o.out_bias.to(o.keys.dtype)
        results = empty_results(o)
        for group in passes.groups(o.keys.shape[0], o.keys.shape[2]):
            keys, values, mask, exists = _items(group, o.keys, o.values, o.key_mask, o.representative_mask)
            part = passes(queries[group], keys, values, mask, o.scale)
            picked, normalizer = part.extract()
            results.picked[group], results.normalizer[group, ..., : normalizer.shape[-1]] = picked, normalizer
            rep = zero_rows(queries[group] + eta * picked, exists)
            carried = kappa * contract(rep, o.contraction, o.scale, o.eps, exists)
            if weight is not None:
                carried = carried @ weight
            part.broadcast(carried, bias, results.output[group])
        return results


def backward(gradient: Tensor, picked: Tensor, normalizer: Tensor, o: Problem) -> Gradients:
    """Gradients from that of the output; ``picked`` and ``normalizer`` are of the forward pass."""
    passes = passes_of(o.impl)
    with no_autocast(o.keys):
        queries, eta, kappa, weight = _operands(o)
        d_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        d_keys = like_tokens(o.keys)
        d_values = None if o.values is None else like_tokens(o.keys)
        d_eta, d_kappa = (queries.new_zeros(o.keys.shape[1]) for _ in range(2))
        d_weight = torch.zeros_like(queries.new_empty(0) if weight is None else weight)
        for group in passes.groups(o.keys.shape[0], o.keys.shape[2]):
            keys, values, mask, exists = _items(group, o.keys, o.values, o.key_mask, o.representative_mask)
            part = passes(queries[group], keys, values, mask, o.scale, normalizer[group])
            rep = zero_rows(queries[group] + eta * picked[group], exists)
            c = contract(rep, o.contraction, o.scale, o.eps, exists)
            carried = kappa * c if weight is None else (kappa * c) @ weight
            d_carried = collected = part.collect(gradient[group])
            if weight is not None:
                d_carried = collected @ weight.mT
                d_weight += ((kappa * c).mT @ collected).sum(0)
            d_kappa += (d_carried * c).sum((0, 2, 3))
            d_rep = contract_backward(kappa * d_carried, rep, o.contraction, o.scale, o.eps, exists)
            d_eta += (d_rep * picked[group]).sum((0, 2, 3))
            d_queries[group] = d_rep + part.differentiate(
                gradient[group],
                carried=carried,
                collected=collected,
                d_picked=eta * d_rep,
                picked=picked[group],
                d_keys=d_keys[group],
                d_values=None if d_values is None else d_values[group],
            )
        new_empty = o.keys.new_empty
        return Gradients(
            zero_rows(d_queries, o.representative_mask).to(o.representatives.dtype).contiguous(),
            d_keys,
            new_empty(0) if d_values is None else d_values,
            d_eta.to(o.step_representatives.dtype),
            d_kappa.to(o.step_tokens.dtype),
            o.keys.new_empty(0)
            if o.out_weight is None
            else d_weight.flatten(0, 1).t().to(o.out_weight).contiguous(),
            o.keys.new_empty(0)
            if o.out_bias is None
            else gradient.sum((0, 1), dtype=queries.dtype).to(o.out_bias),
        )


def _operands(o: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """In the dtype to compute in: queries, both steps ``(H, 1, 1)``, projection ``(H, P, C)``."""
    dtype = compute_dtype(o.keys.dtype)
    queries = zero_rows(o.representatives.to(dtype), o.representative_mask)
    eta, kappa = (step.to(dtype)[:, None, None] for step in (o.step_representatives, o.step_tokens))
    if o.out_weight is None:
        return queries, eta, kappa, None
    return queries, eta, kappa, o.out_weight.t().unflatten(0, (o.keys.shape[1], o.keys.shape[3])).to(dtype)


def _items(group: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[group] for tensor in tensors]
