"""Linear attention as a layer: CBSA along the principal directions (Eq. 12)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_bool, check_choice, check_positive
from cbsa_torch._core.types import LINEAR_SOLVERS, LinearSolver
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.scripted import ScriptedLinearCBSA, not_scriptable
from cbsa_torch.nn.tokens import Heads
from cbsa_torch.ops import counting


class LinearCBSA(TokenMixer):
    """CBSA with principal directions as representatives: linear attention (Eq. 12); O(N), no grid.

    Use it as ``x + LinearCBSA(norm(x))``.

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        eps: quantisation precision epsilon (the operator's default is 0.1, for sums).
        average: take the mean over the tokens where Eq. 12 takes the sum (epsilon^2 becomes N epsilon^2), so
            that a layer does the same at any number of tokens and its output does not fade with N.
        solver: ``"cholesky"`` or ``"eigh"``: the same function, see :func:`cbsa_torch.ops.linear_cbsa`.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`.

    Attributes:
        step_tokens: kappa, ``(H,)``, learned, any sign, standard normal at first.

    Examples:
        >>> from cbsa_torch import LinearCBSA
        >>> LinearCBSA(384, num_heads=6)(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    shards = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        eps: float = 1.0,
        average: bool = True,
        solver: LinearSolver = "cholesky",
        **options: Any,
    ) -> None:
        check_positive("eps", eps)
        check_choice("solver", solver, LINEAR_SOLVERS)
        check_bool("average", average)
        super().__init__(dim, num_heads, qkv="shared", **options)
        self.eps = eps
        self.average = average
        self.solver: LinearSolver = solver
        self.step_tokens = self._per_head()
        self._reset_steps()

    def _reset_steps(self) -> None:
        nn.init.normal_(self.step_tokens)

    def mix(self, heads: Heads) -> Tensor:
        """Apply :func:`cbsa_torch.ops.linear_cbsa`."""
        out = ops.linear_cbsa(
            heads.queries,
            eps=self.eps,
            average=self.average,
            solver=self.solver,
            token_mask=heads.source.token_mask,
            parallel=heads.source.parallel,
        )
        return self.step_tokens[:, None, None].to(out.dtype) * out

    def scripted_operator(self) -> nn.Module:
        """The filter, by a linear solve."""
        if self.solver != "cholesky":
            raise not_scriptable(self, "solver must be 'cholesky': TorchScript has no autograd functions")
        return ScriptedLinearCBSA(self.step_tokens, self.eps, self.average)

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count the Gram matrix, its filter, and the filter applied."""
        return counting.linear_cbsa(
            heads.queries.shape[2], num_heads=self.num_heads, head_dim=self.head_dim, solver=self.solver
        )

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return f"{super().extra_repr()}, eps={self.eps}, average={self.average}, solver={self.solver!r}"
