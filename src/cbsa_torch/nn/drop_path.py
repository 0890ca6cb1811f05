"""Stochastic depth: layers whose update is left out for some items of a batch while training."""

from __future__ import annotations

from torch import Tensor, nn

from cbsa_torch.nn.packing import Packing
from cbsa_torch.ops.parallel import ContextParallel, of_first


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, the update of an item is zero with a probability.

    The others are scaled up, so that the mean stays. Of packed sequences each is an item.

    Args:
        rate: the probability, at least 0 and below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {rate!r}")
        self.rate = rate

    def forward(
        self,
        update: Tensor,
        cu_seqlens: Tensor | Packing | None = None,
        parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Drop updates ``(B, N, C)``, or of packed sequences ``(1, T, C)``.

        Where tokens are spread over processes, what the first one draws is for all.
        """
        if not self.training or self.rate == 0:
            return update
        if cu_seqlens is None:
            kept = self._draw(update, update.shape[0])
            return update * (kept if parallel is None else of_first(kept, parallel.group))
        ends = cu_seqlens.cu_seqlens if isinstance(cu_seqlens, Packing) else cu_seqlens
        kept = self._draw(update, len(ends) - 1).repeat_interleave(ends.diff(), 0, output_size=update.shape[-2])
        return update * kept[:, 0]

    def _draw(self, update: Tensor, count: int) -> Tensor:
        """``(count, 1, 1)``: 0, or what keeps the mean."""
        return update.new_empty(count, 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        """Show the rate when the module is printed."""
        return f"rate={self.rate}"
