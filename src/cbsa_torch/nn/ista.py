"""ISTA as a layer: the white-box feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_number, check_positive, check_positive_int
from cbsa_torch._core.fx import fx_leaf
from cbsa_torch.nn.fused import Fused, check_fusable
from cbsa_torch.nn.scripted import ScriptedFusedISTA, ScriptedISTA
from cbsa_torch.ops.ista import ista_by_matrix


class ISTA(nn.Module):
    """One iteration of ISTA with a learned square dictionary: see :func:`cbsa_torch.ops.ista_step`.

    Its output replaces the tokens: there is no residual connection around it.

    Args:
        dim: channels.
        step_size: eta. sparsity: lambda.
        device, dtype: of the dictionary.

    Attributes:
        weight: the dictionary D, ``(dim, dim)``, Kaiming uniform (gain sqrt(2)).

    Examples:
        >>> from cbsa_torch import ISTA
        >>> code = ISTA(384)(torch.randn(2, 197, 384))
        >>> code.shape, bool((code >= 0).all())
        (torch.Size([2, 197, 384]), True)
    """

    def __init__(
        self,
        dim: int,
        *,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive("step_size", step_size)
        check_number("sparsity", sparsity)
        if sparsity < 0:
            raise ValueError(f"sparsity must not be negative, got {sparsity}")
        self.step_size = step_size
        self.sparsity = sparsity
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the dictionary anew."""
        nn.init.kaiming_uniform_(self.weight)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Code ``(..., dim)`` tokens; same shape."""
        return ops.ista_step(x, self.weight, step_size=self.step_size, sparsity=self.sparsity)

    @torch.no_grad()
    def fuse(self) -> FusedISTA:
        """The same layer for inference, by one product for any number of tokens; timm's convention.

        Raises:
            ValueError: it has hooks, or its ``forward`` was replaced. TypeError: a subclass with a ``forward``
                of its own, or a weight that is quantised.
        """
        check_fusable(self, ISTA)
        return FusedISTA(ops.ista_matrix(self.weight, step_size=self.step_size), self.step_size * self.sparsity)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of the layer."""
        return ScriptedISTA(self.weight, self.step_size, self.sparsity)

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return f"dim={self.weight.shape[0]}, step_size={self.step_size}, sparsity={self.sparsity}"


class FusedISTA(Fused):
    """relu(x + V x - threshold), what :meth:`ISTA.fuse` makes.

    Args:
        matrix: V, ``(dim, dim)``, see :func:`cbsa_torch.ops.ista_matrix`.
        threshold: eta lambda.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.hold(matrix=matrix)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Code ``(..., dim)`` tokens; same shape."""
        return ista_by_matrix(x, self.matrix, self.threshold)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of the layer."""
        return ScriptedFusedISTA(self.matrix, self.threshold)

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return f"dim={self.matrix.shape[0]}, threshold={self.threshold}"
