"""Keep the rows of a weight orthonormal while it trains, whatever the optimiser does to its parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class OrthonormalRows(nn.Module):
    """A ``(rows, columns)`` weight, rows <= columns, as a product of Householder reflections.

    The parameter holds the reflectors below its diagonal; the signs are a buffer. (In torch's own
    parametrisation the signs are part of the parameter: weight decay or averaging turns them into zeros.)
    There is no matrix product in it that autocast would cast down.
    """

    signs: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("signs", torch.ones_like(weight[:, 0], requires_grad=False))

    def forward(self, reflectors: Tensor) -> Tensor:
        """The weight of any parameter of its shape; ``ValueError`` below float32."""
        check_factorable(reflectors)
        below = reflectors.mT.tril(-1)  # (columns, rows); the reflectors' leading ones are implied
        tau = 2 / (1 + below.square().sum(-2))
        # Averaging layers may leave no sign, or less than one; a weight of lower rank has none to begin with.
        signs = 1 - 2 * (self.signs < 0).to(reflectors.dtype)
        return (torch.linalg.householder_product(below, tau) * signs).mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter of ``weight``; if its rows are not orthonormal, of the Q of its QR decomposition."""
        below, tau = torch.geqrf(weight.mT)
        signs = below.diagonal().sign()
        # geqrf leaves a reflection out (tau = 0) where there is nothing to reflect; forward does not.
        self.signs = torch.where(tau == 0, -signs, signs)
        return below.tril(-1).mT.contiguous()


def keep_rows_orthonormal(module: nn.Linear) -> None:
    """Make ``module.weight`` orthonormal and keep it so; it is a computed attribute from now on."""
    parametrize.register_parametrization(module, "weight", OrthonormalRows(module.weight))


def is_orthonormal(module: nn.Linear) -> bool:
    """Whether :func:`keep_rows_orthonormal` keeps its weight."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return any(isinstance(step, OrthonormalRows) for step in module.parametrizations["weight"])  # type: ignore[index]


def check_factorable(weight: Tensor) -> None:
    """Raise ``ValueError`` where Householder products do not exist: below full precision."""
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"orthogonal needs float32 or float64 parameters, got {weight.dtype}; use autocast")
