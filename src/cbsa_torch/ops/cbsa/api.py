"""The public CBSA operator: semantics, argument checks, choice of implementation."""

from __future__ import annotations

from torch import Tensor

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.types import IMPLS, Broadcast, CBSAStages, Contraction, Impl
from cbsa_torch.ops.cbsa.dispatch import run
from cbsa_torch.ops.cbsa.operands import check_operands, check_projection
from cbsa_torch.ops.cbsa.reference import cbsa_reference

DEFAULT_EPS = 0.1
"""Quantisation precision epsilon: epsilon^2 = 0.01, the value behind the official rate measurements."""


def cbsa(
    tokens: Tensor,
    representatives: Tensor,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    attention: Tensor | None = None,
    step_representatives: Tensor | float = 1.0,
    step_tokens: Tensor | float = 1.0,
    scale: float | None = None,
    contraction: Contraction = "softmax",
    broadcast: Broadcast = "shared",
    eps: float = DEFAULT_EPS,
    token_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    representative_mask: Tensor | None = None,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Contract-and-Broadcast Self-Attention (paper, section 3.2) inside each head's subspace.

    Three stages, O(N) in the number of tokens: *extract* representatives by cross-attention (Eq. 5),
    *contract* them (Eq. 7 or 8), and *broadcast* the contractions back with the same attention matrix,
    transposed and not renormalised. The projection into the subspaces is the caller's, and so is the one out
    of them without ``out_weight`` (:class:`cbsa_torch.CBSA` has both).

    B batch, H heads, N tokens, M representatives, P head dimension.

    Args:
        tokens: ``(B, H, N, P)`` tokens in each subspace, U_k^T Z.
        representatives: ``(B, H, M, P)`` the initial guess Q_ini, e.g. pooled tokens; M may exceed N.
        keys: ``(B, H, K, P)`` what representatives are matched against. Default: ``tokens``.
        values: ``(B, H, K, P)`` what they collect. Default: ``keys``.
        attention: ``(B, H, M, N)`` A^T, in place of the softmax of Eq. 5; ``representatives`` are then U_k^T Q
            itself, not a first guess, and nothing is extracted. With the identity and the tokens this is
            MSSA (9), with directions (``ops.principal_directions``, ``ops.basis_directions``) and the exact
            contraction linear (12) or channel attention (13).
        step_representatives: eta, the step of the residual extraction: a number or ``(H,)``.
        step_tokens: kappa, the step of the update (6), any sign: a number or ``(H,)``.
        scale: factor on all logits. Default: P^-1/2.
        contraction: ``"softmax"`` (Eq. 8), ``"exact"`` (Eq. 7) or ``"none"`` (with
            ``broadcast="softmax"``, agent attention up to the residual of the extraction).
        broadcast: ``"shared"``, the extraction's attention matrix again, or ``"softmax"``, a fresh softmax
            of tokens over representatives (agent attention; needed if keys are of another length).
        eps: epsilon of the coding rate (1); used by ``contraction="exact"``.
        token_mask: ``(B, N)`` bool, True = a real token. The others are ignored, whatever they hold, and
            get zeros and zero gradients; so does an item without any real token.
        key_mask: ``(B, K)`` bool for keys and values. Default: ``token_mask``; required beside it if keys
            have another length than tokens.
        representative_mask: ``(B, M)`` bool, True = a representative that exists for this item.
        out_weight: ``(C, H * P)`` joins the heads and projects them out like a linear layer. Given here, it
            can be folded into the contractions, which saves time and memory. Used in the dtype of ``tokens``.
        out_bias: ``(C,)``.
        impl: ``"eager"`` computes equation by equation, in float32 or better, and stores the attention;
            ``"tiled"`` goes over tiles of tokens and keeps nothing of size M x N, forward or backward;
            ``"triton"`` has fused kernels for CUDA (experimental: checked in Triton's interpreter, not yet on
            a GPU). ``"auto"`` is ``"tiled"`` on the CPU from B H M N = 2^20 on (2^22 unless the output
            projection folds in: about N >= C), where it is measured to be the fastest, and ``"eager"``
            otherwise: for small problems, on other devices, for ``attention`` and ``broadcast="softmax"``, and
            in ``torch.export``.

    Returns:
        ``(B, H, N, P)``, or ``(B, N, C)`` with ``out_weight``, in the dtype of ``tokens``; add it to (or
        subtract it from) the tokens after projecting back. An autocast context has no effect inside.

    Raises:
        ValueError: shapes, options or devices that do not fit. TypeError: wrong dtypes.
    """
    check_choice("impl", impl, IMPLS)
    operands = check_operands(
        tokens,
        representatives,
        keys=keys,
        values=values,
        attention=attention,
        step_representatives=step_representatives,
        step_tokens=step_tokens,
        scale=scale,
        contraction=contraction,
        broadcast=broadcast,
        eps=eps,
        token_mask=token_mask,
        key_mask=key_mask,
        representative_mask=representative_mask,
    )
    check_projection(operands, out_weight, out_bias)
    return run(operands, impl, out_weight, out_bias)


def cbsa_stages(
    tokens: Tensor,
    representatives: Tensor,
    *,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    attention: Tensor | None = None,
    step_representatives: Tensor | float = 1.0,
    step_tokens: Tensor | float = 1.0,
    scale: float | None = None,
    contraction: Contraction = "softmax",
    broadcast: Broadcast = "shared",
    eps: float = DEFAULT_EPS,
    token_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    representative_mask: Tensor | None = None,
) -> CBSAStages:
    """Evaluate :func:`cbsa` (same arguments) and return every intermediate, computed eagerly.

    Returns:
        :class:`CBSAStages`: attention, extracted and contracted representatives, output, ... in the dtype
        they were computed in (float32 for low-precision inputs).
    """
    operands = check_operands(
        tokens,
        representatives,
        keys=keys,
        values=values,
        attention=attention,
        step_representatives=step_representatives,
        step_tokens=step_tokens,
        scale=scale,
        contraction=contraction,
        broadcast=broadcast,
        eps=eps,
        token_mask=token_mask,
        key_mask=key_mask,
        representative_mask=representative_mask,
    )
    return cbsa_reference(**operands._asdict())


__all__ = ["DEFAULT_EPS", "CBSAStages", "cbsa", "cbsa_stages"]
