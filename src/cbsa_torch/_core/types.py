"""Names for option values and for results that several modules share."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

Contraction = Literal["softmax", "exact", "none"]
Broadcast = Literal["shared", "softmax"]
Impl = Literal["auto", "eager"]
Layout = Literal["standard", "official"]
RepresentativeKind = Literal["pool", "learned"]
QKV = Literal["shared", "separate"]

CONTRACTIONS: tuple[str, ...] = get_args(Contraction)
BROADCASTS: tuple[str, ...] = get_args(Broadcast)
IMPLS: tuple[str, ...] = get_args(Impl)
LAYOUTS: tuple[str, ...] = get_args(Layout)
REPRESENTATIVE_KINDS: tuple[str, ...] = get_args(RepresentativeKind)
QKVS: tuple[str, ...] = get_args(QKV)

GridSize = tuple[int, ...]


class Representatives(NamedTuple):
    """Initial representatives and which of them exist.

    ``values`` is ``(B, H, M, P)``; ``mask`` is ``(B, M)`` bool with True = real, or None if all are.
    """

    values: Tensor
    mask: Tensor | None


class CBSAStages(NamedTuple):
    """Every intermediate of one CBSA evaluation, in the order it is computed.

    Shapes: B batch, H heads, M representatives, N tokens (keys), P head dimension.
    """

    tokens: Tensor
    """``(B, H, N, P)`` the tokens in each subspace, U_k^T Z (the queries, if keys are given separately)."""
    representatives: Tensor
    """``(B, H, M, P)`` the initial guess Q_ini."""
    attention: Tensor
    """``(B, H, M, N)`` A^T of Eq. 5: each row is a softmax over the keys (N of them, the tokens unless keys
    are given separately), or zero for a representative that does not exist."""
    extracted: Tensor
    """``(B, H, M, P)`` Q_ini + step_representatives * A^T values: the representatives of Eq. 5."""
    contraction_attention: Tensor | None
    """``(B, H, M, M)`` softmax attention among representatives (Eq. 8); None for other contractions."""
    contracted: Tensor
    """``(B, H, M, P)`` C: the representatives after Eq. 7 or Eq. 8."""
    broadcast_attention: Tensor
    """``(B, H, N, M)`` the weights that carry contractions back to tokens: A, or a fresh softmax."""
    output: Tensor
    """``(B, H, N, P)`` the operator's value, step_tokens included."""
