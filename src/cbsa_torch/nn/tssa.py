"""TSSA as a layer: channel attention, in the form ToST trains or as Eq. 13."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_bool, check_choice, check_positive
from cbsa_torch._core.types import TSSA_FORMS, TSSAForm
from cbsa_torch.nn.mixer import TokenMixer
from cbsa_torch.nn.scripted import ScriptedTSSA, not_scriptable
from cbsa_torch.nn.tokens import Heads
from cbsa_torch.ops import counting


class TSSA(TokenMixer):
    """Token Statistics Self-Attention of ToST: channels scaled by their second moments; O(N).

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        form: ``"tost"``, what its authors train (:func:`cbsa_torch.ops.tssa`): tokens belong to heads by a
            softmax with a learned temperature; or ``"channel"``, Eq. 13 along the standard basis of each
            subspace (:func:`cbsa_torch.ops.channel_attention`) times a learned step.
        eps: quantisation precision epsilon of ``"channel"`` (the operator's default is 0.1, for sums);
            ``"tost"`` has the constant 1 in its place.
        average: of ``"channel"``: take the mean over the tokens where Eq. 13 takes the sum (epsilon^2 becomes
            N epsilon^2), so that the layer does the same at any number of tokens; ``"tost"`` always does.
        **options: of every mixer, see :class:`cbsa_torch.nn.TokenMixer`.

    Attributes:
        temperature: ``(H,)``, ones at first; None for ``"channel"``.
        step_tokens: kappa, ``(H,)``, standard normal at first; None for ``"tost"``.

    Examples:
        >>> from cbsa_torch import TSSA
        >>> TSSA(384, num_heads=6)(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    shards = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        form: TSSAForm = "tost",
        eps: float = 1.0,
        average: bool = True,
        **options: Any,
    ) -> None:
        check_choice("form", form, TSSA_FORMS)
        check_positive("eps", eps)
        check_bool("average", average)
        if form == "tost" and (eps != 1.0 or not average):
            raise ValueError(
                f"eps and average belong to form='channel'; form='tost' has eps=1 and average=True, got {eps} "
                f"and {average}"
            )
        super().__init__(dim, num_heads, qkv="shared", **options)
        self.form: TSSAForm = form
        self.eps = eps
        self.average = average
        self.temperature = self._per_head() if form == "tost" else None
        self.step_tokens = None if form == "tost" else self._per_head()
        self._reset_steps()

    def _reset_steps(self) -> None:
        if self.temperature is not None:
            nn.init.ones_(self.temperature)
        if self.step_tokens is not None:
            nn.init.normal_(self.step_tokens)

    def mix(self, heads: Heads) -> Tensor:
        """Apply :func:`cbsa_torch.ops.tssa` or :func:`cbsa_torch.ops.channel_attention`."""
        tokens, mask, parallel = heads.queries, heads.source.token_mask, heads.source.parallel
        if self.temperature is not None:
            return ops.tssa(tokens, temperature=self.temperature, token_mask=mask, parallel=parallel)
        assert self.step_tokens is not None, "one of the two forms"
        out = ops.channel_attention(
            tokens, eps=self.eps, average=self.average, token_mask=mask, parallel=parallel
        )
        return self.step_tokens[:, None, None].to(out.dtype) * out

    def scripted_operator(self) -> nn.Module:
        """The form of ToST."""
        if self.temperature is None:
            raise not_scriptable(self, "form must be 'tost'")
        return ScriptedTSSA(self.temperature)

    def count_heads(self, heads: Heads) -> counting.Counts:
        """Count the weighted means of ``"tost"``; the rest is work per element."""
        return counting.channel_attention(
            heads.queries.shape[2],
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            weighted=self.form == "tost",
        )

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        channel = f", eps={self.eps}, average={self.average}" if self.form == "channel" else ""
        return f"{super().extra_repr()}, form={self.form!r}{channel}"
