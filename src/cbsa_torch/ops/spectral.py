"""Eigendecomposition of Gram matrices, with NaN where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch.ops.definite import has_no_factorisation


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(..., P)`` and eigenvectors ``(..., P, P)`` (columns) of symmetric matrices.

    A matrix with entries that are not finite gives NaN and leaves the others of the batch alone, where
    ``torch.linalg.eigh`` would raise.

    Raises:
        ValueError: in an export to ONNX.
    """
    if has_no_factorisation():
        raise ValueError(
            "ONNX has no eigendecomposition: use solver='cholesky', the same function, for solver='eigh', and "
            "LinearCBSA for representatives='principal'"
        )
    broken = ~gram.isfinite().all(-1).all(-1)[..., None]  # (..., 1)
    eigenvalues, eigenvectors = torch.linalg.eigh(gram.masked_fill(broken[..., None], 0.0))
    nan = float("nan")
    return eigenvalues.masked_fill(broken, nan), eigenvectors.masked_fill(broken[..., None], nan)
