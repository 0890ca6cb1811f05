"""The public CBSA operator: its arguments, and which implementation computes it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from cbsa_torch._core.autodiff import has_values, is_transformed
from cbsa_torch._core.checks import check_choice, check_floating
from cbsa_torch._core.compiler import called_while_tracing
from cbsa_torch._core.tracing import is_recorded
from cbsa_torch._core.types import (
    DEFAULT_EPS,
    IMPLS,
    Broadcast,
    CellPooling,
    Contraction,
    Impl,
    Representatives,
)
from cbsa_torch.ops.cbsa.inputs import (
    CBSAInputs,
    cbsa_inputs,
    certified_inputs,
    check_projection,
    tokens_per_representative,
)
from cbsa_torch.ops.cbsa.library import cbsa_linear_memory
from cbsa_torch.ops.cbsa.packed import run_packed, run_packed_certified
from cbsa_torch.ops.cbsa.reference import cbsa_stages, project_out
from cbsa_torch.ops.cbsa.slices import cbsa_on_slices
from cbsa_torch.ops.cbsa.triton.limits import refusal
from cbsa_torch.ops.cbsa.two_softmax import two_softmax
from cbsa_torch.ops.parallel import ContextParallel

MANY_WEIGHTS = 2**20
"""Weights B * H * M * N from which ``"auto"`` goes over tiles if the output projection folds into them; four
times as many if not. Below, what tiles save does not pay for their overhead (``cbsa bench layers``)."""
MANY_IN_TRAINING = 2**19
"""Weights from which ``"auto"`` goes over tiles where gradients are recorded: they take about as long, and keep
half as much for the backward pass."""
LONG_ON_CUDA, MANY_ON_CUDA, LONG_IN_FLOAT32 = 2**14, 2**24, 2**18
"""Tokens N or weights from which ``"auto"`` is ``"triton"`` on CUDA, if 16 bits wide; tokens in float32,
which has no tensor cores. Measured by ``benchmarks/gpu_check.py``."""
_NOT_SPREAD = "parallel must be None beside cu_seqlens: spread one sequence over ranks at a time"


def cbsa(
    tokens: Tensor,
    representatives: Tensor,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    step_representatives: Tensor | float = 1.0,
    step_tokens: Tensor | float = 1.0,
    scale: float | None = None,
    contraction: Contraction = "softmax",
    broadcast: Broadcast = "shared",
    eps: float = DEFAULT_EPS,
    token_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    representative_mask: Tensor | None = None,
    impl: Impl = "auto",
    cu_seqlens: Tensor | None = None,
    cu_representatives: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> Tensor:
    """Contract-and-Broadcast Self-Attention (paper, section 3.2) inside each head's subspace.

    Three stages, O(N) in the number of tokens: *extract* representatives by cross-attention (Eq. 5),
    *contract* them (Eq. 7 or 8), and *broadcast* the contractions back with the same attention matrix,
    transposed and not renormalised. The projections into the subspaces and out of them are the caller's
    (:class:`cbsa_torch.CBSA` has both).

    B batch, H heads, N tokens, M representatives, P head dimension.

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z.
        representatives: ``(B, H, M, P)`` the initial guess Q_ini, e.g. pooled tokens; M may exceed N.
        keys: ``(B, H, K, P)`` what representatives are matched against. Default: ``tokens``.
        values: ``(B, H, K, P)`` what they collect. Default: ``keys``.
        step_representatives: eta, the step of the residual extraction: a number or ``(H,)``.
        step_tokens: kappa, the step of the update (6), any sign: a number or ``(H,)``.
        scale: factor on all logits. Default: P^-1/2.
        contraction: ``"softmax"`` (Eq. 8), ``"exact"`` (Eq. 7) or ``"none"`` (with
            ``broadcast="softmax"``, agent attention up to the residual of the extraction).
        broadcast: ``"shared"``, the extraction's attention matrix again, or ``"softmax"``, a fresh softmax
            of tokens over representatives (agent attention; needed if keys are of another length).
        eps: epsilon of the coding rate (1); used by ``contraction="exact"``. Default: 0.1.
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros and zero gradients; so does an item without any real token.
        key_mask: ``(B, K)`` bool for keys and values. Default: ``token_mask``; required beside it if keys
            have another length than tokens.
        representative_mask: ``(B, M)`` bool, True = a representative that exists for this item.
        impl: ``"eager"`` computes equation by equation, in float32 or better, and stores the attention;
            ``"tiled"`` goes over tiles of tokens and keeps nothing of size M x N, forward or backward;
            ``"triton"`` does so in Triton kernels for CUDA, with P at most 128 and M at most 256. ``"auto"`` is
            what is measured to be the fastest: ``"tiled"`` on the CPU from B H M N = 2^22 on (from 2^19 on for
            tokens that require gradients: it keeps half as much then), ``"triton"`` on CUDA from N = 2^14 or
            B H M N = 2^24 on (in float32 from N = 2^18), and ``"eager"`` otherwise: for
            small problems, on other devices, for ``broadcast="softmax"``, under ``torch.func``, and in
            ``torch.export`` and ``torch.jit.trace``.
        cu_seqlens: ``(S + 1,)`` int32 or int64, 0 and where each sequence ends in ``tokens``, ``keys``
            and ``values`` ``(1, H, N, P)``: each is computed as it would be alone, without padding or masks.
        cu_representatives: the same for ``representatives`` ``(1, H, M, P)``; needed beside ``cu_seqlens``.
        parallel: who has the other tokens, if they are spread over processes: ``tokens``, keys, values and
            masks are then those of this rank, the representatives the same on every rank. The output is exactly
            that of all tokens together. See :mod:`cbsa_torch.parallel`; not with ``impl="triton"``.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``; add it to (or subtract it from) the tokens after projecting
        back. An autocast context has no effect inside.

    Raises:
        ValueError: shapes, options or devices that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import cbsa, pool_representatives
        >>> tokens = torch.randn(2, 4, 196, 16)
        >>> guess = pool_representatives(tokens, (14, 14), 64)
        >>> cbsa(tokens, guess.values, contraction="exact").shape
        torch.Size([2, 4, 196, 16])
    """
    if cu_seqlens is not None or cu_representatives is not None:
        if cu_seqlens is None or cu_representatives is None:
            raise ValueError("cu_seqlens and cu_representatives must be given together")
        if token_mask is not None or key_mask is not None or representative_mask is not None:
            raise ValueError("masks must be None beside cu_seqlens, which leaves no padding")
        if parallel is not None:
            raise ValueError(_NOT_SPREAD)
        operator = functools.partial(
            cbsa,
            step_representatives=step_representatives,
            step_tokens=step_tokens,
            scale=scale,
            contraction=contraction,
            broadcast=broadcast,
            eps=eps,
            impl=impl,
        )
        others = {"keys": keys, "values": values}
        return run_packed(operator, tokens, representatives, others, cu_seqlens, cu_representatives)
    inputs = cbsa_inputs(
        tokens,
        representatives,
        keys=keys,
        values=values,
        step_representatives=step_representatives,
        step_tokens=step_tokens,
        scale=scale,
        contraction=contraction,
        broadcast=broadcast,
        eps=eps,
        token_mask=token_mask,
        key_mask=key_mask,
        representative_mask=representative_mask,
        parallel=parallel,
    )
    return run(inputs, impl)


def contract_and_broadcast(
    tokens: Tensor,
    representatives: Tensor,
    attention: Tensor,
    *,
    step_tokens: Tensor | float = 1.0,
    scale: float | None = None,
    contraction: Contraction = "softmax",
    eps: float = DEFAULT_EPS,
    token_mask: Tensor | None = None,
    representative_mask: Tensor | None = None,
) -> Tensor:
    """CBSA without its extraction: representatives that come with their attention (paper, section 3.3).

    With the identity and the tokens themselves this is MSSA (9); with directions (``ops.principal_directions``,
    ``ops.basis_directions``) and the exact contraction, linear (12) or channel attention (13).

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z. Only their shape, dtype and device matter.
        representatives: ``(B, H, M, P)`` U_k^T Q, what is contracted.
        attention: ``(B, H, M, N)`` A^T, in place of the softmax of Eq. 5.
        step_tokens, scale, contraction, eps, token_mask, representative_mask: as for :func:`cbsa`.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``, computed equation by equation.

    Raises:
        ValueError: shapes, options or devices that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import contract_and_broadcast, mssa
        >>> tokens = torch.randn(1, 2, 9, 8)
        >>> output = contract_and_broadcast(tokens, tokens, torch.eye(9).expand(1, 2, 9, 9))
        >>> torch.allclose(output, mssa(tokens), atol=1e-6)  # Eq. 9
        True
    """
    check_floating("attention", attention)  # without it, the rest would be read as the arguments of cbsa
    inputs = cbsa_inputs(
        tokens,
        representatives,
        attention=attention,
        step_tokens=step_tokens,
        scale=scale,
        contraction=contraction,
        eps=eps,
        token_mask=token_mask,
        representative_mask=representative_mask,
    )
    return run(inputs)


def certified_cbsa(
    tokens: Tensor,
    representatives: Representatives | Sequence[Representatives | None],
    *,
    fraction: Tensor | float,
    eps: float | None = None,
    step_representatives: Tensor | float = 1.0,
    scale: float | None = None,
    token_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    impl: Impl = "auto",
    cu_seqlens: Tensor | None = None,
    parallel: ContextParallel | None = None,
) -> Tensor:
    """CBSA as a gradient step that cannot raise the coding rate of the representatives.

    Let W be the tokens of one head and B ``(M, N)`` the weights that make its representatives of them,
    X = B W + constant: B = Pi + eta A for initial guesses Pi W (pooled ones), eta A for those that do not
    depend on the tokens, A where the attention comes with the representatives. The exact contraction C (Eq. 7)
    is 1 / alpha times the gradient of the coding rate (1) of X, R = 1/2 log det(I + alpha X X^T) with
    alpha = P / (M eps^2), so that -kappa B^T C is a step against the gradient with respect to W, B held.

    Theorem: with G = B B^T and any kappa from 0 to 2 / |G|, its largest eigenvalue, the rate of the
    representatives after the step, X - kappa G C, is lower by at least
    alpha kappa (1 - kappa |G| / 2) tr(C^T G C) >= 0, for all tokens, eps and sizes: the Hessian of R is at most
    alpha. Here kappa = (1 - 1e-4) 2 fraction / bound, a little less than the limit for what is rounded, with a
    bound of |G| for every item and head: the largest sum_j |G_ij| (G_jj / G_ii)^(1/2), and at least 0.01 times
    that of A A^T. No step is taken where the bound overflows. Gradients hold the bound constant.
    The theorem says nothing of the rate of all tokens, nor of representatives that are extracted anew.

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z. The projections must be orthonormal bases
            of subspaces orthogonal to each other, and tied, for heads not to disturb each other.
        representatives: initial guesses with the weights of the tokens in them, as ``ops.pool_representatives``
            returns (without weights they count as constant), or representatives with their attention. With
            ``cu_seqlens`` a list, of each sequence those of a batch of one (of an empty one None will do).
        fraction: kappa in parts of its limit, from 0 to 1: a number or ``(H,)``. The guarantee is for no other.
            A number must be less than 1. A tensor may hold 0 and 1, which a sigmoid rounds to; its values are
            not checked in compiled code, under ``torch.func`` and while a CUDA graph is captured.
        eps: epsilon of the coding rate. Default: the root of P.
        step_representatives: eta, as for :func:`cbsa`.
        scale, token_mask: as for :func:`cbsa`.
        num_prefix_tokens: tokens before those that the initial guesses were made of.
        impl: ``"eager"``, ``"tiled"`` or ``"auto"``, as for :func:`cbsa`.
        cu_seqlens: as for :func:`cbsa`; every sequence begins with its own ``num_prefix_tokens``.
        parallel: who has the other tokens, as for :func:`cbsa`; ``representatives`` are then what
            ``ops.pool_representatives`` makes with it. The limit is that of all tokens together.

    Returns:
        ``(B, H, N, P)`` in the dtype of ``tokens``; add it to the tokens after projecting back. Zeros for an
        item without any real token.

    Raises:
        ValueError: shapes, options or devices that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import certified_cbsa, coding_rate, pool_representatives
        >>> tokens = torch.randn(1, 1, 196, 16)
        >>> guess = pool_representatives(tokens, (14, 14), 64)
        >>> moved = tokens + certified_cbsa(tokens, guess, fraction=0.5, step_representatives=0)
        >>> after = pool_representatives(moved, (14, 14), 64)
        >>> bool(coding_rate(after.values, eps=4) < coding_rate(guess.values, eps=4))
        True
    """
    _check_fraction(fraction)
    if cu_seqlens is not None:
        if token_mask is not None:
            raise ValueError("token_mask must be None beside cu_seqlens, which leaves no padding")
        if parallel is not None:
            raise ValueError(_NOT_SPREAD)
        operator = functools.partial(
            certified_cbsa,
            fraction=fraction,
            eps=eps,
            step_representatives=step_representatives,
            scale=scale,
            num_prefix_tokens=num_prefix_tokens,
            impl=impl,
        )
        return run_packed_certified(operator, tokens, representatives, cu_seqlens)
    if not isinstance(representatives, Representatives):
        raise TypeError(
            "representatives must be ops.Representatives, as ops.pool_representatives returns, or with "
            f"cu_seqlens a list of them; got {type(representatives).__name__}"
        )
    _check_cells(representatives, token_mask, num_prefix_tokens)
    inputs = certified_inputs(
        tokens,
        representatives,
        fraction=fraction,
        eps=eps,
        step_representatives=step_representatives,
        scale=scale,
        token_mask=token_mask,
        num_prefix_tokens=num_prefix_tokens,
        parallel=parallel,
    )
    return run(inputs, impl)


def _check_fraction(fraction: Tensor | float) -> None:
    """Raise unless a tensor of fractions holds values from 0 to 1. (A number is checked with the inputs.)"""
    if not isinstance(fraction, Tensor) or not fraction.is_floating_point():
        return
    if not has_values(fraction.detach()):
        return
    if fraction.is_cuda and torch.cuda.is_current_stream_capturing():  # allows no look at values
        return
    wrong = ~((fraction >= 0) & (fraction <= 1))
    if wrong.any():
        raise ValueError(f"fraction must hold values from 0 to 1, got {fraction[wrong][0].item()}")


def _check_cells(representatives: Representatives, token_mask: Tensor | None, first: int) -> None:
    """Raise where tokens are masked that were averaged over cells: their weights would count."""
    weights = getattr(representatives, "token_weights", None)
    if token_mask is None or not isinstance(weights, CellPooling) or not has_values(token_mask):
        return
    cells, first = weights.cells, weights.first + first
    own = token_mask[:, first : first + cells.cell.shape[1]]
    if own.shape == cells.cell.shape and ((cells.cell < cells.counts.shape[1]) & ~own).any():
        raise ValueError("token_mask must be the one that the cells of the representatives were found with")


def run(inputs: CBSAInputs, impl: Impl = "auto") -> Tensor:
    """CBSA of checked inputs by ``impl`` (see :func:`cbsa`): ``(B, H, N, P)`` in the dtype of the tokens."""
    return _heads(inputs, _choose(inputs, impl, None))


def run_and_project(
    inputs: CBSAInputs, out_weight: Tensor, out_bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """:func:`run`, then the heads joined and projected by a linear layer.

    Tiles fold the projection into the contractions, A (C U_out), where that takes fewer operations (about
    N >= C): it saves time and memory. ``"auto"`` is then ``"tiled"`` from B H M N = 2^20 on without gradients.

    Args:
        inputs: checked inputs.
        out_weight: ``(C, H * P)``, used in the dtype of the tokens.
        out_bias: ``(C,)`` or None.
        impl: as for :func:`cbsa`.

    Returns:
        ``(B, N, C)`` in the dtype of the tokens.

    Raises:
        ValueError: shapes, options or devices that do not fit. TypeError: wrong dtypes.
    """
    check_projection(inputs, out_weight, out_bias)
    chosen = _choose(inputs, impl, out_weight)
    tiles = chosen == "tiled" and inputs.parallel is None and not inputs.relative
    if tiles and inputs.broadcast == "shared" and folds(inputs, out_weight):
        return cbsa_linear_memory(inputs, "tiled", out_weight, out_bias)
    return project_out(_heads(inputs, chosen), out_weight, out_bias)


def _heads(inputs: CBSAInputs, impl: Impl) -> Tensor:
    dtype = inputs.tokens.dtype
    if inputs.parallel is not None:
        return cbsa_on_slices(inputs, tiled=impl == "tiled").to(dtype)
    if impl == "eager":
        return cbsa_stages(inputs).output.to(dtype)
    output = two_softmax(inputs) if inputs.broadcast == "softmax" else cbsa_linear_memory(inputs, impl)
    output = output.to(dtype)
    return output * tokens_per_representative(inputs).to(dtype) if inputs.relative else output


def _choose(inputs: CBSAInputs, impl: Impl, out_weight: Tensor | None) -> Impl:
    """What ``"auto"`` is; an implementation that was asked for, if it can compute this."""
    check_choice("impl", impl, IMPLS)
    if impl == "auto":
        return fastest(inputs, out_weight)
    if impl == "eager":
        return impl
    if is_transformed():
        raise ValueError(
            f"impl={impl!r} is not for torch.func or forward-mode differentiation; use impl='eager' or 'auto'"
        )
    if inputs.attention is not None:
        raise ValueError(
            f"impl={impl!r} computes the attention itself; representatives that bring theirs need impl='eager'"
        )
    if impl == "triton" and inputs.parallel is not None:
        raise ValueError(
            "impl='triton' has no place for what ranks exchange; use 'tiled' or 'eager' with parallel"
        )
    if impl == "triton" and inputs.fraction is not None:
        raise ValueError("impl='triton' does not know the limit of a certified step; use 'tiled' or 'eager'")
    if impl == "triton" and inputs.broadcast == "softmax":
        raise ValueError("impl='triton' broadcasts with the attention it extracted; use 'tiled' or 'eager'")
    return impl


def fastest(inputs: CBSAInputs, out_weight: Tensor | None) -> Impl:
    """What ``"auto"`` is: tiles on the CPU, kernels on CUDA where the attention is large, else the equations.

    Other devices were not measured. Exported and traced programs should have no operator of ours, and
    ``torch.func`` and forward-mode differentiation know the equations only.
    """
    given_or_fresh = inputs.attention is not None or inputs.broadcast == "softmax"
    if given_or_fresh or is_recorded() or is_transformed():
        return "eager"
    (b, h, m, _), n = inputs.representatives.shape, inputs.keys.shape[2]
    weights = b * h * m * n
    if inputs.parallel is not None:
        return "tiled" if weights >= MANY_IN_TRAINING else "eager"
    if inputs.tokens.device.type == "cpu":
        if torch.is_grad_enabled() and inputs.keys.requires_grad:
            return "tiled" if weights >= MANY_IN_TRAINING else "eager"
        folded = out_weight is not None and folds(inputs, out_weight)
        return "tiled" if weights >= (MANY_WEIGHTS if folded else 4 * MANY_WEIGHTS) else "eager"
    if inputs.tokens.device.type == "cuda" and _has_triton() and refusal(inputs.keys, m) is None:
        if inputs.keys.dtype == torch.float32:
            return "triton" if n >= LONG_IN_FLOAT32 else "eager"
        return "triton" if n >= LONG_ON_CUDA or weights >= MANY_ON_CUDA else "eager"
    return "eager"


@called_while_tracing
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def folds(inputs: CBSAInputs, out_weight: Tensor) -> bool:
    """Whether it is fewer operations to project the contractions than the heads of every token.

    Per head, with C output channels: N M C products to broadcast projected contractions and P M C to project
    them, against N P M to broadcast and N P C to project afterwards.
    """
    if torch.compiler.is_exporting():  # a comparison would limit N in the exported program
        return False
    (_, _, m, p), n, c = inputs.representatives.shape, inputs.keys.shape[2], out_weight.shape[0]
    return (n + p) * m * c < n * p * (m + c)
